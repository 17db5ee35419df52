"""metrics.jsonl, and what follows it: what a run says of itself, step by step."""

import contextlib
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tokenformer_jax.buckets import Staged
from tokenformer_jax.config import Config
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, parse_json, replace_file
from tokenformer_jax.storage.trackers import trackers
from tokenformer_jax.storage.workdir import require_still_the_writer

Row = dict[str, Any]
FLUSH_EVERY = 30  # seconds between the trackers' sights of a run


class MetricsWriter:
    """Appends rows to WORKDIR/metrics.jsonl and to the trackers of the config; only process 0 writes."""

    def __init__(self, cfg: Config, workdir: pathlib.Path, start_step: int, params: int):
        """Drops rows that a run left which died before its next checkpoint: of later steps, or of a larger model.

        Args:
          cfg: of the run.
          workdir: the run's directory.
          start_step: the step that training goes on from.
          params: size of the model that it goes on with; a model may have grown at that step.
        """
        self.path = workdir / "metrics.jsonl"
        self.active = jax.process_index() == 0
        if not self.active:
            return
        self.workdir, self.stage = workdir, Staged(workdir)
        rows = read_metrics(workdir) if self.path.exists() else []
        self.kept = [row for row in rows if (row["step"], row["params"]) <= (start_step, params)]
        file = self.stage.folder / self.path.name
        replace_file(file, "".join(json_text(row) + "\n" for row in self.kept))
        with self._writing():
            self.file = file.open("a", buffering=1)
            self.trackers = trackers(cfg, workdir, self.stage.folder, start_step)
        self.flush()

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
            figures = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
            events = {name: value for name, value in row.items() if isinstance(value, dict)}
            for tracker in self.trackers:
                tracker.write(row["step"], figures, events)
        if time.monotonic() - self.flushed > FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Shows what was written, in a bucket to others, too."""
        if not self.active:
            return
        with self._writing():
            for tracker in self.trackers:
                tracker.flush()
        self.send()
        self.flushed = time.monotonic()

    def send(self) -> None:
        """Raises a UserError where the bucket is out of reach, or another process writes there."""
        require_still_the_writer(self.workdir)
        self.stage.send()

    def close(self, in_reach: bool = True) -> None:
        if self.active:
            with self._writing():
                for tracker in self.trackers:
                    tracker.close()
                self.file.close()
            if in_reach:
                self.send()
            self.stage.remove()


def read_metrics(workdir: pathlib.Path) -> list[Row]:
    """The rows of WORKDIR/metrics.jsonl; a line that a crash cut short or damage made another is passed over."""
    rows = []
    for line in (workdir / "metrics.jsonl").read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict) and all(type(row.get(key)) is int for key in ("step", "params")):
                rows.append(row)
    return rows
