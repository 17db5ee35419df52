"""A trained run, opened to be used."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from tokenformer_jax.config import Config, MeshConfig, read_config, validate
from tokenformer_jax.data.tokenizer import Tokenizer, tokenizer_from_json
from tokenformer_jax.devices.sharding import MESH_AXES, make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.storage.checkpoints import Checkpoints, Read
from tokenformer_jax.storage.fingerprint import model_fingerprint
from tokenformer_jax.storage.record import Record
from tokenformer_jax.storage.workdir import load_config
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import Step, make_step


class PutOn(NamedTuple):
    """An adapter that a model wears."""

    file: str
    counts: dict[str, int]  # projection -> tokens that it adds


@dataclasses.dataclass(frozen=True)
class Trained:
    """The model of a workdir, loaded to be used."""

    cfg: Config
    step_number: int
    record: Record
    assets: dict[str, str]  # what its data needs, by name
    step: Step
    state: TrainState  # without optimizer state; its parameters are the mean where the run has one
    num_params: int
    adapters: tuple[PutOn, ...] = ()  # in the order of their tokens

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of a language model; a UserError says so of another."""
        if "tokenizer" not in self.assets:
            raise UserError(
                f"--workdir: holds a run of task = {self.cfg.task!r}, which has no text; use `evaluate` or `predict`"
            )
        return tokenizer_from_json(self.assets["tokenizer"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names parameters and τ: the same on any mesh. All processes ask for it together."""
        return model_fingerprint(self.state.params, self.state.tau_now())


def newest_good(workdir: pathlib.Path, step_number: int | None, read: Callable[[int], Read]) -> Read:
    """What `read` makes of the given checkpoint of a run or, without one, of the newest that is not damaged."""
    load_config(workdir / "config.json")  # a directory without a run is reported first
    return Checkpoints(workdir / "checkpoints").newest_good(step_number, read)


def open_checkpoint(workdir: pathlib.Path, step_number: int) -> tuple[Config, Checkpoints, Record]:
    """A run's config, with the model of a checkpoint, and that checkpoint's record.

    On a ladder each rung has a model of its own.
    """
    cfg = load_config(workdir / "config.json")
    checkpoints = Checkpoints(workdir / "checkpoints")
    record = checkpoints.record(step_number)
    cfg = read_config(dataclasses.asdict(cfg) | {"model": record.model}, str(workdir / "checkpoints"))
    return cfg, checkpoints, record


def load_trained(workdir: pathlib.Path, step_number: int | None = None, mesh: tuple[int, ...] | None = None) -> Trained:
    """Loads config, tokenizer, parameters and τ of a run's newest (or given) checkpoint onto a mesh.

    Args:
      workdir: of `train`, `grow` or `convert`.
      step_number: which checkpoint.
      mesh: (slice, data, fsdp, tensor); by default the run's own if there are as many devices, else a single device.

    Raises:
      UserError: there is none, or it is damaged; without `step_number` a damaged one is skipped, with a warning.
    """
    return newest_good(workdir, step_number, lambda number: _load_trained(workdir, number, mesh))


def _load_trained(workdir: pathlib.Path, step_number: int, mesh: tuple[int, ...] | None) -> Trained:
    cfg, checkpoints, record = open_checkpoint(workdir, step_number)
    if mesh is not None:
        cfg = dataclasses.replace(cfg, mesh=MeshConfig(**dict(zip(MESH_AXES, mesh, strict=True))))
    elif math.prod(dataclasses.astuple(cfg.mesh)) > jax.device_count():
        cfg = dataclasses.replace(cfg, mesh=MeshConfig(1, 1, 1))
    validate(cfg)
    step = make_step(cfg, make_mesh(cfg.mesh), record.schedule_start)
    found = checkpoints.restore(step_number, step.abstract_state.to_use())
    state = TrainState(found["step"], found.get("average") or found["params"], (), found["tau"])
    trained = Trained(
        cfg, step_number, record, checkpoints.assets(step_number), step, state, count_params(state.params)
    )
    checkpoints.close()
    return trained
