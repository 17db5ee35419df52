"""Where the metrics of a run go beside its `metrics.jsonl`: TensorBoard, and Weights & Biases."""

import dataclasses
import importlib.util
import os
import pathlib
import secrets
import time
from collections.abc import Mapping
from typing import Any, Protocol

from tokenformer_jax.config import Config
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, replace_file


class Tracker(Protocol):
    """What a run is followed by. Only process 0 has any."""

    def write(self, step: int, figures: Mapping[str, float], events: Mapping[str, Any]) -> None:
        """Figures of a step, and what happened at it, such as a growth, as groups of keys by name."""

    def flush(self) -> None:
        """Shows what was written."""

    def close(self) -> None:
        """Writes what is left."""


def trackers(cfg: Config, workdir: pathlib.Path, folder: pathlib.Path, start_step: int) -> list[Tracker]:
    """Those of a run that goes on from a step; they write to the folder, which is the workdir or is copied there.

    Raises:
      UserError: `config.track` cannot be used.
    """
    chosen: list[Tracker] = [WeightsAndBiases(cfg, workdir, folder)] if cfg.track == "wandb" else []
    return [TensorBoard(folder / "tensorboard", start_step), *chosen]


class TensorBoard:
    """Events in a folder, written without TensorFlow."""

    def __init__(self, folder: pathlib.Path, start_step: int):
        import tensorboardX  # late: where torch is installed it imports that, for a second and 180 MB

        self._scalar, self._text = tensorboardX.summary.scalar, tensorboardX.summary.text
        self._events = tensorboardX.proto.event_pb2
        folder.mkdir(exist_ok=True)
        # Its SummaryWriter would wait forever for a thread that ended since the disk was full.
        self._writer = tensorboardX.event_file_writer.EventsWriter(str(folder / "events"))
        restart = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(start_step + 1, session_log=restart)  # which drops later steps of an earlier start

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, figures: Mapping[str, float], events: Mapping[str, Any]) -> None:
        for name, value in figures.items():
            self._write(step, summary=self._scalar(name, value))
        for name, event in events.items():
            self._write(step, summary=self._text(name, json_text(event)))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb, which the next start of this workdir goes on with. Its environment variables are wandb's own."""

    def __init__(self, cfg: Config, workdir: pathlib.Path, folder: pathlib.Path):
        key = "config.track = 'wandb'"
        if importlib.util.find_spec("wandb") is None:
            raise UserError(f"{key}: needs the package wandb; use pip install wandb, or --config.track=none")
        import wandb  # takes half a second

        (folder / "wandb").mkdir(exist_ok=True)
        name = workdir / "wandb" / "run_id"
        if not name.exists():
            replace_file(name, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "tokenformer_jax"),
                name=workdir.name,
                id=name.read_text(),
                resume="allow",
                dir=folder,
                config=dataclasses.asdict(cfg),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:  # such as that of a login that is missing
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(
                f"{key}: {reason}; WANDB_MODE=offline keeps all in {workdir / 'wandb'}, for `wandb sync`"
            ) from None
        self._run.define_metric("*", step_metric="step")  # its own steps must not go back, as a run that resumes does

    def write(self, step: int, figures: Mapping[str, float], events: Mapping[str, Any]) -> None:
        flat = {f"{name}/{key}": value for name, event in events.items() for key, value in _flat(event).items()}
        self._run.log({**figures, **flat, "step": step})

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


def _flat(event: Any) -> dict[str, Any]:
    """The keys of an event, those of inner groups with a slash."""
    if not isinstance(event, Mapping):
        return {"value": event}
    flat: dict[str, Any] = {}
    for key, value in event.items():
        inner = {f"{key}/{name}": each for name, each in _flat(value).items()} if isinstance(value, Mapping) else {}
        flat |= inner or {key: value}
    return flat
