"""The one way from a model to its successor of other token counts: `grow`, `shrink` and the next rung of a run go it.

The parameters first, which are compared with the former ones before anything is kept; then Adam's moments, for which
the former parameters make room; then the record. On a mesh each device works on its own part of every array.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import Config, ModelConfig, validate
from tokenformer_jax.data.batches import keep_position
from tokenformer_jax.devices.hardware import peak_host_bytes
from tokenformer_jax.devices.sharding import constrain, make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, parse_json, replace_file
from tokenformer_jax.growth.figures import size_figures
from tokenformer_jax.growth.ladder import stages, with_budget
from tokenformer_jax.storage.checkpoints import Checkpoints, save_one
from tokenformer_jax.storage.fingerprint import model_fingerprint
from tokenformer_jax.storage.record import Record
from tokenformer_jax.storage.trained import newest_good, open_checkpoint
from tokenformer_jax.storage.workdir import new_workdir, require_empty
from tokenformer_jax.training import nested
from tokenformer_jax.training.learned import alone
from tokenformer_jax.training.schedule import grown_tokens, new_tokens
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import Step, make_step
from tokenformer_jax.training.tasks import Prepared, task_of

# Figures that checkpoints keep.
RECORDED = "recipe", "criterion", "tau_ramp_steps", "max_logit_difference", "max_logit", "loss_before", "loss_after"
RECORDED_OF_NEW = "train", "base", "base_tau"  # where new tokens learn alone


class Source(Protocol):
    """Where a former state is. Each part is asked for once, the parameters first."""

    def model(self, step: Step) -> TrainState:
        """The state without moments, sharded as `step` asks for."""

    def moments(self, step: Step) -> Any:
        """The optimizer state, filled up with zeros to the shapes that `step` asks for."""


@dataclasses.dataclass(frozen=True)
class InCheckpoint:
    checkpoints: Checkpoints
    number: int

    def model(self, step: Step) -> TrainState:
        return TrainState(**self.checkpoints.restore(self.number, step.abstract_state.without_moments()), opt_state=())

    def moments(self, step: Step) -> Any:
        wanted = {"opt_state": step.abstract_state.opt_state}
        return self.checkpoints.restore(self.number, wanted, padded=True)["opt_state"]


class InMemory:
    """A state that is given up for its successor: each array is freed once the larger one is there."""

    def __init__(self, state: TrainState) -> None:
        self.parameters: TrainState | None = state._replace(opt_state=())
        self.opt_state = state.opt_state

    def model(self, step: Step) -> TrainState:
        state, self.parameters = self.parameters, None
        return jax.device_put(state, jax.tree.map(lambda a: a.sharding, step.abstract_state._replace(opt_state=())))

    def moments(self, step: Step) -> Any:
        def larger(old: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
            old = jax.device_put(old, new.sharding)
            if old.shape == new.shape:
                return old
            padded = jax.jit(lambda x: pad(x, new), out_shardings=new.sharding)(old)
            padded.block_until_ready()
            old.delete()
            return padded

        leaves, tree = jax.tree.flatten(self.opt_state)
        self.opt_state = None
        with jax.set_mesh(step.mesh):
            wanted = jax.tree.leaves(step.abstract_state.opt_state)
            return jax.tree.unflatten(tree, [larger(leaves.pop(0), new) for new in wanted])


def pad(old: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
    """The array with zeros appended, up to the new shape.

    Tokens are sharded, and an appended one moves all borders between devices. So each device first gets all tokens of
    fewer columns, in one exchange, and appends to those; padding in place would gather whole columns on all of them.
    """
    if old.shape == new.shape:
        return old
    widths = [(0, after - before) for before, after in zip(old.shape, new.shape, strict=True)]
    return by_columns(jnp.pad(by_columns(old), widths))


def by_columns(x_YND: jax.Array) -> jax.Array:
    return constrain(x_YND, None, None, "columns")


class Change(Protocol):
    """What growing and shrinking do each in its own way."""

    file: str  # of a successor's workdir, which holds the figures
    verb: str
    appends: bool  # tokens, which then may learn alone
    recipe: str
    ramps: bool  # τ goes to that of a newborn model

    def check(self, old: ModelConfig, new: ModelConfig) -> None:
        """Raises a UserError where the old model cannot become the new one."""

    def model(self, resize: "Resize", old: TrainState, data: Prepared) -> tuple[TrainState, Any]:
        """The new state without moments, and what `moments` must know of the old one."""

    def compare(self, resize: "Resize", old: TrainState, new: TrainState, validation: Any) -> dict[str, Any]:
        """Figures of the two models. Raises a UserError where the new one is not what it must be."""

    def moments(self, resize: "Resize", source: Source, known: Any) -> Any:
        """The new optimizer state."""


@dataclasses.dataclass(frozen=True)
class Resize:
    """A model that becomes another at a step of its run, on the other one's mesh."""

    change: Change
    number: int  # of the step
    cfg: Config
    old_cfg: Config  # the same with the old model
    step: Step
    old_step: Step

    @property
    def ramp_steps(self) -> int:
        """Over which τ may go to that of a newborn model; 0 where it stays."""
        if self.cfg.model.tau_tokens:
            return 0
        return math.ceil(self.cfg.grow.tau_ramp * (self.cfg.steps - self.number))

    def apply(self, source: Source, data: Prepared) -> tuple[TrainState, dict[str, Any]]:
        """The new state, and the figures that `grow.json` or `shrink.json` hold.

        Raises:
          UserError: the new model is not what it must be.
        """
        seconds: dict[str, float] = {}
        with timed(seconds, "restore"):
            old = source.model(self.old_step)
        nested.check_tau(self.old_cfg.model, old.tau_now())
        if alone(self.step.new_tokens):
            tau = old.tau_values()
            base = {"train": "new", "base": model_fingerprint(old.params, tau), "base_tau": tau}
        else:
            base = {}
        with timed(seconds, self.change.verb), jax.set_mesh(self.step.mesh):
            new, known = jax.block_until_ready(self.change.model(self, old, data))
        with timed(seconds, "verify"):
            compared = self.change.compare(self, old, new, data.validation)
        figures = {
            "step": self.number,
            "recipe": self.change.recipe,
            "tau_ramp_steps": self.ramp_steps if self.change.ramps else 0,
            "tokens_before": self.old_cfg.model.tokens,
            "tokens_after": self.cfg.model.tokens,
            **size_figures(old, new),
            **compared,
            **base,
        }
        del old  # the moments need its memory
        with timed(seconds, "restore"), jax.set_mesh(self.step.mesh):
            if alone(self.step.new_tokens) or alone(self.old_step.new_tokens):
                opt_state = self.no_moments()
            else:
                opt_state = self.change.moments(self, source, known)
        return new._replace(opt_state=opt_state), figures | {"seconds": seconds}

    def no_moments(self) -> Any:
        """The optimizer state of what has not learnt yet, at this step of its schedule."""
        wanted = self.step.abstract_state.opt_state

        def begin(part: Any) -> Any:
            value = self.number if isinstance(part, optax.ScaleByScheduleState) else 0
            return jax.tree.map(lambda a: jnp.full(a.shape, value, a.dtype), part)

        make = jax.jit(
            lambda: jax.tree.map(begin, wanted, is_leaf=lambda part: isinstance(part, optax.ScaleByScheduleState)),
            out_shardings=jax.tree.map(lambda a: a.sharding, wanted),
        )
        return make()

    def record(self, record: Record, figures: dict[str, Any]) -> Record:
        """The old model's record, with what the new one changes in it."""
        growth = {"step": self.number, "from": figures["tokens_before"], "to": figures["tokens_after"]}
        growth |= {name: figures[name] for name in (*RECORDED, *RECORDED_OF_NEW) if name in figures}
        return dataclasses.replace(
            record,
            model=dataclasses.asdict(self.cfg.model),
            batch_size=self.cfg.batch_size,
            growth=[*record.growth, growth],
            plateau={},
        )


def resize_run(
    change: Change, source: pathlib.Path, cfg: Config, workdir: pathlib.Path, number: int | None = None
) -> dict[str, Any]:
    """Makes a new workdir out of the newest (or given) checkpoint of `source`, with the config's token counts.

    Where the config has rungs of its own, `train` grows to them later. The target appears whole or not at all; the
    source is only read.

    Returns:
      What `grow.json` or `shrink.json` holds.

    Raises:
      UserError: the two models do not fit, the target is taken, a check fails, or the checkpoint is damaged; nothing is
        written then. Without `number` a damaged one is skipped, with a warning.
    """
    return newest_good(source, number, lambda found: resize_checkpoint(change, source, cfg, workdir, found))


def resize_checkpoint(
    change: Change, source: pathlib.Path, cfg: Config, workdir: pathlib.Path, number: int
) -> dict[str, Any]:
    """Resizes that checkpoint, as `resize_run` does."""
    source_cfg, checkpoints, record = open_checkpoint(source, number)
    plan = with_budget(stages(cfg), 0, number, record.tokens, record.train_flops)
    first, cfg = plan[0], dataclasses.replace(cfg, steps=plan[-1].steps)
    old_cfg = dataclasses.replace(first, model=source_cfg.model)
    check_successor(change, old_cfg, first, workdir, number)
    if first.grow.restart_schedule:
        record = dataclasses.replace(record, schedule_start=number)
    new = grown_tokens(first, old_cfg.model, number) if change.appends else None
    former = new_tokens(old_cfg, record.growth[-1]) if record.growth else None
    step = make_step(first, make_mesh(first.mesh), record.schedule_start, new_tokens=new)
    resize = Resize(change, number, first, old_cfg, step, make_step(old_cfg, step.mesh, new_tokens=former))
    task, assets = task_of(first), checkpoints.assets(number)
    prepared = task.prepare(first, assets)
    state, figures = resize.apply(InCheckpoint(checkpoints, number), prepared)

    data, identity = task.train_batches(prepared, first, step.mesh), task.identity(prepared, first)
    if record.data == identity:  # other data begin at their beginning
        checkpoints.restore_data(number, data)
        keep_position(data, record.batch_size, first.batch_size)
    checkpoints.close()
    record = dataclasses.replace(resize.record(record, figures), data=identity, rung=0)
    seconds = figures["seconds"]
    with new_workdir(workdir) as folder:
        with timed(seconds, "write"):
            save_one(folder / "checkpoints", number, state, data, assets, record)
        figures = {"source": str(source), **figures, "peak_host_bytes": peak_host_bytes()}
        if jax.process_index() == 0:
            replace_file(folder / "config.json", cfg.to_json())
            replace_file(folder / change.file, json_text(figures, indent=2) + "\n")
    return figures


def check_successor(change: Change, old_cfg: Config, cfg: Config, workdir: pathlib.Path, number: int) -> None:
    """Raises a UserError where the two do not fit, or the target is taken."""
    change.check(old_cfg.model, cfg.model)
    for name in ("grow.json", "shrink.json"):
        if (workdir / name).exists():
            raise UserError(f"--workdir={workdir}: {_what_is_there(workdir / name)}; train goes on with it")
    require_empty(workdir, "holds something already")
    if change.appends and cfg.grow.train == "new" and cfg.model.tokens == old_cfg.model.tokens:
        raise UserError(
            f"grow.train = 'new': the source has as many tokens, so nothing would learn; use more than "
            f"model.ffn_tokens = {cfg.model.ffn_tokens}, or of another projection"
        )
    if cfg.steps <= number:
        raise UserError(f"{cfg.length}: the source was trained for {number} already; use a larger number")
    validate(old_cfg)  # the source, too, must divide by the mesh
    warmup, left = cfg.optimizer.warmup_steps, cfg.steps - number
    if cfg.grow.restart_schedule and warmup >= left:
        raise UserError(
            f"optimizer.warmup_steps = {warmup}: must be below the {left} "
            f"steps from the source's {number} to {cfg.length}"
        )


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds that a phase takes; it must wait for what it computes."""
    began = time.monotonic()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - began


def _what_is_there(path: pathlib.Path) -> str:
    try:
        made = parse_json(path.read_text())
        return (
            f"holds a model of {made['params_after']:,} parameters, made from step {made['step']} of {made['source']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "holds a run already"
