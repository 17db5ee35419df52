"""What a run says of itself: metrics.jsonl and TensorBoard, a progress bar with an ETA, FLOPs, MFU, profiles."""

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from tokenformer_jax.config import ModelConfig, UserError
from tokenformer_jax.fingerprint import parse_json

Row = dict[str, Any]

# Peak dense bfloat16 FLOP/s of one device as jax lists them, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

PROFILED_STEPS = 5
FLUSH_EVERY = 30  # seconds between TensorBoard's sights of a run


def peak_flops(devices: int) -> float | None:
    """Peak FLOP/s of so many devices together; None where it is not known (CPUs)."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return peak * devices if peak else None


def train_flops_per_token(cfg: ModelConfig) -> float:
    """Model FLOPs of forward and backward for one token: 6 a weight, and 12 · layers · L · D for attention.

    The attention's L × L product is counted whole, as is customary; rematerialisation is not counted.
    """
    per_layer = 4 * cfg.embed_dim + 2 * cfg.ffn_tokens  # a plain Transformer's rows of width D
    if cfg.projection == "pattention":
        per_layer = 2 * sum(cfg.tokens.values())  # a key and a value each
    weights = cfg.embed_dim * (cfg.num_layers * per_layer + cfg.vocab_size)
    return 6.0 * weights + 12.0 * cfg.num_layers * cfg.context_length * cfg.embed_dim


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
        replace_file(self.path, "".join(json.dumps(row) + "\n" for row in self.kept))
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
            self.file.write(json.dumps(row) + "\n")
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


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all. Raises UserError where it can't be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def environment() -> Row:
    """Versions and devices, for whoever has to reproduce the run."""
    names = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "tensorflow-datasets",
        "tokenizers",
        "numpy",
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


class Progress:
    """A bar with an ETA on a terminal; plain lines, now and then, everywhere else."""

    def __init__(self, start: int, total: int, unit: str = "step"):
        self.total, self.unit = total, unit
        self.bar = tqdm(
            total=total,
            initial=start,
            unit=unit,
            disable=jax.process_index() != 0 or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.plain = jax.process_index() == 0 and not sys.stderr.isatty()
        self.start, self.began, self.said = start, time.monotonic(), 0.0

    def update(self, done: int, **figures: float) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if self.plain and (now - self.said > 10 or done == self.total):
            self.said = now
            eta = (now - self.began) / max(done - self.start, 1) * (self.total - done)
            self.say(f"{self.unit} {done}/{self.total}  {text}  ETA {eta:.0f} s")

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if jax.process_index() == 0:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


class Profiler:
    """Writes a profile of PROFILED_STEPS steps from step `at` on, to be seen in TensorBoard; 0 does nothing."""

    def __init__(self, at: int, workdir: pathlib.Path):
        self.at, self.directory, self.running = at, workdir / "tensorboard", False

    def __enter__(self) -> "Profiler":
        return self

    def before_step(self, step: int) -> None:
        if self.at and step == self.at:
            jax.profiler.start_trace(str(self.directory))
            self.running = True
        elif self.running and step >= self.at + PROFILED_STEPS:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False


def give_back_memory() -> None:
    """Returns what is free in this process to the system: cycles hold some of it, and glibc keeps small pieces."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
