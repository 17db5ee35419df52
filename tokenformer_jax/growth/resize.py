"""A new workdir made from a checkpoint of another run, with other token counts: what growing and shrinking share."""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from tokenformer_jax.config import Config, ModelConfig, validate
from tokenformer_jax.data.batches import data_identity, keep_position, train_batches
from tokenformer_jax.data.tokenizer import Tokenizer
from tokenformer_jax.data.tokens import Corpus, prepare
from tokenformer_jax.devices.hardware import peak_host_bytes
from tokenformer_jax.devices.sharding import make_mesh, this_process
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import parse_json
from tokenformer_jax.growth.ladder import stages
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.storage.checkpoints import Checkpoints, write_workdir
from tokenformer_jax.storage.record import Record
from tokenformer_jax.storage.trained import open_checkpoint
from tokenformer_jax.storage.workdir import require_empty
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import Step, make_step


@dataclasses.dataclass(frozen=True)
class Succession:
    """A checkpoint of a run, and the config that goes on from it on a mesh of its own."""

    source: pathlib.Path
    checkpoints: Checkpoints
    step_number: int
    record: Record  # of the checkpoint, with the successor's learning-rate schedule
    tokenizer: Tokenizer
    corpus: Corpus
    written_cfg: Config  # as given, with its rungs
    cfg: Config  # its first stage
    old_cfg: Config  # the same with the source's model
    step: Step
    old_step: Step  # on the same mesh

    @classmethod
    def open(
        cls,
        source: pathlib.Path,
        cfg: Config,
        workdir: pathlib.Path,
        step_number: int,
        check: Callable[[ModelConfig, ModelConfig], None],
    ) -> "Succession":
        """Reads a checkpoint's record and the corpus; no arrays yet.

        Args:
          source: the run's workdir.
          cfg: the successor's config; of its rungs only the first stage counts here.
          workdir: where `write` will put the successor.
          step_number: which checkpoint.
          check: raises a UserError where the old model cannot become the new one.

        Raises:
          UserError: the two do not fit, or the target is taken.
        """
        written_cfg, cfg = cfg, stages(cfg)[0]
        source_cfg, checkpoints, record = open_checkpoint(source, step_number)
        old_cfg = dataclasses.replace(cfg, model=source_cfg.model)
        check(old_cfg.model, cfg.model)
        for name in ("grow.json", "shrink.json"):
            if (workdir / name).exists():
                raise UserError(f"--workdir={workdir}: {_what_is_there(workdir / name)}; train goes on with it")
        require_empty(workdir, "holds something already")
        if cfg.steps <= step_number:
            raise UserError(
                f"steps = {cfg.steps}: the source was trained for {step_number} already; a larger number would do"
            )
        validate(old_cfg)  # the source, too, must divide by the mesh
        if cfg.grow.restart_schedule:
            record = dataclasses.replace(record, schedule_start=step_number)
            left = cfg.steps - step_number
            if cfg.optimizer.warmup_steps >= left:
                raise UserError(
                    f"optimizer.warmup_steps = {cfg.optimizer.warmup_steps}: must be below the {left} "
                    f"steps from the source's {step_number} to steps = {cfg.steps}"
                )
        step = make_step(cfg, make_mesh(cfg.mesh), record.schedule_start)
        tokenizer = checkpoints.tokenizer(step_number)
        old_step, corpus = make_step(old_cfg, step.mesh), prepare(cfg, tokenizer)
        return cls(
            source, checkpoints, step_number, record, tokenizer, corpus, written_cfg, cfg, old_cfg, step, old_step
        )

    def write(
        self, workdir: pathlib.Path, state: TrainState, history: dict[str, Any], name: str, figures: dict[str, Any]
    ) -> None:
        """Writes the successor whole or not at all: `state`, the data position, and a record with `history` added.

        `figures` go to the file `name`, with the seconds that writing took and the peak of memory.
        """
        cfg, record = self.cfg, self.record
        data = train_batches(self.corpus.train, cfg, **this_process(self.step.mesh))
        identity = data_identity(self.corpus.train, cfg)
        if record.data == identity:  # other data begin at their beginning
            self.checkpoints.restore_data(self.step_number, data)
            keep_position(data, record.batch_size, cfg.batch_size)
        self.checkpoints.close()
        record = dataclasses.replace(
            record,
            model=dataclasses.asdict(cfg.model),
            data=identity,
            batch_size=cfg.batch_size,
            growth=[*record.growth, history],
            rung=0,
            plateau={},
        )
        began = time.monotonic()

        def files() -> dict[str, str]:
            figures["seconds"] = figures.get("seconds", {}) | {"write": time.monotonic() - began}
            figures["peak_host_bytes"] = peak_host_bytes()
            return {"config.json": self.written_cfg.to_json(), name: json.dumps(figures, indent=2) + "\n"}

        write_workdir(workdir, self.step_number, (state, data, self.tokenizer, record), files)


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds that a phase takes; it must wait for what it computes."""
    began = time.monotonic()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - began


def spent(figures: dict[str, Any]) -> str:
    """A line with the seconds of each phase and the peak of memory; nothing where they were not measured."""
    if "peak_host_bytes" not in figures:
        return ""
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in figures["seconds"].items())
    return f"\n{phases}; peak host memory {figures['peak_host_bytes'] / 1e9:.2f} GB"


def _what_is_there(path: pathlib.Path) -> str:
    try:
        made = parse_json(path.read_text())
        return (
            f"holds a model of {made['params_after']:,} parameters, made from step {made['step']} of {made['source']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "holds a run already"


def token_counts(state: TrainState) -> dict[str, int]:
    """Parameter tokens of each projection."""
    return {name: state.params["blocks"][name]["keys"].shape[1] for name in state.tau}


def size_figures(old: TrainState, new: TrainState) -> dict[str, Any]:
    """The sizes of two models, as `grow.json` and `shrink.json` hold them."""
    return {
        "params_before": count_params(old.params),
        "params_after": count_params(new.params),
        "groups_before": group_sizes(old),
        "groups_after": group_sizes(new),
    }


def group_sizes(state: TrainState) -> dict[str, dict[str, int]]:
    """Parameter tokens, parameters, and bytes with Adam's moments, of each part of a model and in all."""
    tokens = token_counts(state)
    groups = {name: tree for name, tree in state.params.items() if name != "blocks"} | state.params["blocks"]
    sizes = {
        name: {"tokens": tokens.get(name, 0), "params": count_params(tree), "bytes": 3 * 4 * count_params(tree)}
        for name, tree in groups.items()
    }
    return sizes | {"all": {key: sum(size[key] for size in sizes.values()) for key in ("tokens", "params", "bytes")}}


def size_table(figures: dict[str, Any]) -> str:
    """The sizes before and after as a table for people."""
    lines = [f"{'':<12}{'parameter tokens':^20}  {'parameters':^28}  {'with moments, MB':^20}"]
    for name, after in figures["groups_after"].items():
        before = figures["groups_before"][name]
        tokens, params = (f"{before[key]:,} -> {after[key]:,}" for key in ("tokens", "params"))
        memory = f"{before['bytes'] / 1e6:,.1f} -> {after['bytes'] / 1e6:,.1f}"
        lines.append(f"{name:<12}{tokens if after['tokens'] else '':^20}  {params:^28}  {memory:^20}")
    return "\n".join(line.rstrip() for line in lines)
