"""metrics.jsonl and TensorBoard: what a run says of itself, step by step."""

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, parse_json, replace_file

Row = dict[str, Any]
FLUSH_EVERY = 30  # seconds between TensorBoard's sights of a run


def _tensorboard() -> Any:
    """tensorboardX, late: where torch is installed it imports that, for a second and 180 MB."""
    import tensorboardX

    return tensorboardX


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl and WORKDIR/tensorboard; only process 0 writes."""

    def __init__(self, workdir: pathlib.Path, start_step: int, params: int):
        """Drops rows that a run left which died before its next checkpoint: of later steps, or of a larger model.

        Args:
          workdir: the run's directory.
          start_step: the step that training goes on from.
          params: size of the model that it goes on with; a model may have grown at that step.
        """
        self.path = workdir / "metrics.jsonl"
        self.active = jax.process_index() == 0
        if not self.active:
            return
        rows = read_metrics(workdir) if self.path.exists() else []
        self.kept = [row for row in rows if (row["step"], row["params"]) <= (start_step, params)]
        replace_file(self.path, "".join(json_text(row) + "\n" for row in self.kept))
        (workdir / "tensorboard").mkdir(exist_ok=True)
        with self._writing():
            self.file = self.path.open("a", buffering=1)
            # Its SummaryWriter would wait forever for a thread that ended since the disk was full.
            board = _tensorboard()
            self.tensorboard = board.event_file_writer.EventsWriter(str(workdir / "tensorboard" / "events"))
            events = board.proto.event_pb2
            restart = events.SessionLog(status=events.SessionLog.START)
            purge = events.Event(wall_time=time.time(), step=start_step + 1, session_log=restart)
            self.tensorboard.write_event(purge)
        self.flushed = time.monotonic()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None

    def holds(self, row: Row, name: str) -> bool:
        """Whether an earlier start wrote this figure of the same step and model. The same on all processes."""
        same = self.active and any(
            name in old and (old["step"], old["params"]) == (row["step"], row["params"]) for old in self.kept
        )
        with jax.transfer_guard("allow"):
            return bool(multihost_utils.broadcast_one_to_all(np.bool_(same)))

    def write(self, row: Row) -> None:
        if not self.active:
            return
        with self._writing():
            self.file.write(json_text(row) + "\n")
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    summary = _tensorboard().summary.scalar(name, value)
                    event = _tensorboard().proto.event_pb2.Event(
                        wall_time=time.time(), step=row["step"], summary=summary
                    )
                    self.tensorboard.write_event(event)
            if time.monotonic() - self.flushed > FLUSH_EVERY:
                self.tensorboard.flush()
                self.flushed = time.monotonic()

    def close(self) -> None:
        if self.active:
            with self._writing():
                self.tensorboard.close()
                self.file.close()


def read_metrics(workdir: pathlib.Path) -> list[Row]:
    """The rows of WORKDIR/metrics.jsonl; a line that a crash cut short or damage made another is passed over."""
    rows = []
    for line in (workdir / "metrics.jsonl").read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and all(type(row.get(key)) is int for key in ("step", "params")):
                rows.append(row)
    return rows
