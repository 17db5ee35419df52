"""Loss, perplexity and bits per byte of a trained model on a split.

python -m tokenformer_jax.evaluate --workdir=W [--step=N] [--split=validation] [--mesh=1,1,1,1]
python -m tokenformer_jax.evaluate --workdir=W --examples=96:104   # of training, by their order: each text and its loss
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from tokenformer_jax.checkpoint import Checkpoints, Read, Record
from tokenformer_jax.config import (
    Config,
    MeshConfig,
    UserError,
    load_config,
    read_config,
    run_command,
    validate,
    workdir_flag,
)
from tokenformer_jax.corpus import Corpus, TokenSplit, prepare
from tokenformer_jax.data import eval_batches, training_examples
from tokenformer_jax.metrics import Progress, replace_file
from tokenformer_jax.sharding import MESH_AXES, make_mesh, this_process
from tokenformer_jax.step import Step, TrainState, make_step, put_batch
from tokenformer_jax.tokenizer import Tokenizer
from tokenformer_jax.transformer import count_params


def evaluate_split(
    step: Step, state: TrainState, split: TokenSplit, cfg: Config, *, max_batches: int = 0, progress: bool = False
) -> dict[str, float]:
    """Evaluates every token of a split once (or `max_batches` batches spread over it).

    Returns:
      `loss` in nats a token, `perplexity` = exp(loss), `bits_per_byte` of the UTF-8 text, and `tokens` predicted.
    """
    batches = eval_batches(
        split,
        cfg.batch_size // cfg.accumulation,
        cfg.model.context_length,
        max_batches=max_batches,
        **this_process(step.mesh),
    )
    bar = Progress(0, len(batches), "batch") if progress else None
    sums: list[Any] = []
    for i, batch in enumerate(batches):
        sums.append(step.evaluate(state, put_batch(step, batch)))
        if bar and i:  # one behind, so that the devices stay busy
            jax.block_until_ready(sums[i - 1])
            bar.update(i + 1)
    if bar:
        bar.close()
    host = jax.device_get(sums)
    nll, tokens = (math.fsum(float(row[name]) for row in host) for name in ("nll", "weights"))
    loss = nll / tokens
    tokens_per_byte = (split.num_tokens - 1) / split.num_bytes  # the first token has nothing that predicts it
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * tokens_per_byte,
        "tokens": tokens,
    }


@dataclasses.dataclass(frozen=True)
class Trained:
    """The model of a workdir, loaded to be used."""

    cfg: Config
    step_number: int
    record: Record
    tokenizer: Tokenizer
    step: Step
    state: TrainState  # without optimizer state
    num_params: int


def newest_good(workdir: pathlib.Path, step_number: int | None, read: Callable[[int], Read]) -> Read:
    """What `read` makes of the given checkpoint of a run or, without one, of the newest that is not damaged."""
    load_config(workdir / "config.json")  # what is no run's directory is told first
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
      UserError: there is none, or it is damaged; without `step_number` a damaged one is passed over, which is told.
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
    state = TrainState(**checkpoints.restore(step_number, step.abstract_state.without_moments()), opt_state=())
    trained = Trained(
        cfg, step_number, record, checkpoints.tokenizer(step_number), step, state, count_params(state.params)
    )
    checkpoints.close()
    return trained


def choose_split(corpus: Corpus, name: str) -> TokenSplit:
    splits = {"train": corpus.train, "validation": corpus.validation}
    if name not in splits:
        raise UserError(f"--split={name}: must be one of {', '.join(splits)}")
    return splits[name]


def mesh_flag() -> Any:
    """Defines `--mesh=slice,data,fsdp,tensor`, where slice may be left out; returns its reader."""
    holder = flags.DEFINE_string("mesh", None, "[slice,]data,fsdp,tensor; by default the run's own, or a single device")

    def read() -> tuple[int, ...] | None:
        if holder.value is None:
            return None
        sizes = [int(part) if part.isdecimal() else 0 for part in holder.value.split(",")]
        if len(sizes) not in (3, 4) or min(sizes) < 1:
            raise UserError(f"--mesh={holder.value}: must be sizes slice,data,fsdp,tensor, such as 1,1,1,1")
        return (1,) * (4 - len(sizes)) + tuple(sizes)

    return read


def show_examples(run: Trained, split: TokenSplit, examples: range) -> None:
    """Prints the loss and the text of training examples, such as those of a step whose loss was not finite."""
    batches = training_examples(split, run.cfg, examples, **this_process(run.step.mesh))
    for example, batch in zip(examples, batches, strict=True):
        sums = jax.device_get(run.step.evaluate(run.state, put_batch(run.step, batch)))
        if jax.process_index() == 0:  # the first row is its own
            print(f"--- example {example}, loss {sums['nll'] / sums['weights']:.4f} nats")
            print(run.tokenizer.decode(batch.tokens_BL[0].tolist()), flush=True)


def examples_flag() -> Callable[[], range | None]:
    """Defines `--examples=first:end`; returns its reader."""
    holder = flags.DEFINE_string("examples", None, "first:end, of training in its order, to be shown with their losses")

    def read() -> range | None:
        if holder.value is None:
            return None
        numbers = holder.value.split(":")
        if len(numbers) != 2 or not all(n.isascii() and n.isdecimal() and len(n) < 16 for n in numbers):
            raise UserError(f"--examples={holder.value}: must be two numbers, first:end, such as 0:8")
        examples = range(*map(int, numbers))
        if not examples:
            raise UserError(f"--examples={holder.value}: are none; the second number is the one after the last")
        return examples

    return read


def main() -> None:
    examples = _EXAMPLES()
    run = load_trained(_WORKDIR(), _STEP.value, _MESH())
    if examples:
        show_examples(run, prepare(run.cfg, run.tokenizer).train, examples)
        return
    split = choose_split(prepare(run.cfg, run.tokenizer), _SPLIT.value)
    figures = evaluate_split(run.step, run.state, split, run.cfg, progress=True)
    result = {
        "split": _SPLIT.value,
        "step": run.step_number,
        "params": run.num_params,
        "trained_tokens": run.record.tokens,
        "train_flops": run.record.train_flops,
        **figures,
    }
    if jax.process_index() == 0:
        replace_file(_WORKDIR() / "eval.json", json.dumps(result, indent=2) + "\n")
        print(
            f"step {run.step_number}, {run.num_params:,} parameters, {figures['tokens']:,.0f} tokens of the "
            f"{_SPLIT.value} split: loss {figures['loss']:.4f} nats, perplexity {figures['perplexity']:.3f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte"
        )


if __name__ == "__main__":
    _WORKDIR = workdir_flag()
    _STEP = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
    _SPLIT = flags.DEFINE_string("split", "validation", "train or validation")
    _MESH = mesh_flag()
    _EXAMPLES = examples_flag()
    run_command(main)
