"""Loss, perplexity and bits per byte of a model on a split."""

import math
import pathlib
import sys
from typing import Any

import jax

from tokenformer_jax.config import Config
from tokenformer_jax.data.tokens import TokenSplit
from tokenformer_jax.devices.progress import Progress
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, replace_file
from tokenformer_jax.storage.trained import Trained
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import Step, put_batch
from tokenformer_jax.training.tasks import Prepared, task_of


def evaluate_split(
    step: Step,
    state: TrainState,
    split: Any,
    cfg: Config,
    *,
    max_batches: int = 0,
    length: int = 0,
    stride: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """Evaluates all of a split once (or `max_batches` batches spread over it), as `Task.eval_batches` cuts it.

    Returns:
      The task's figures: of a language model `loss`, `perplexity`, `bits_per_byte` and `tokens`; of a mixture, whose
      sources are evaluated apart, each one's `loss_NAME` too.
    """
    task = task_of(cfg)
    if parts := task.parts(split):
        how: Any = {"max_batches": max_batches, "length": length, "stride": stride, "progress": progress}
        each = {name: evaluate_split(step, state, part, cfg, **how) for name, part in parts.items()}
        return task.joint_figures(split, each)
    batches = task.eval_batches(split, cfg, step.mesh, cfg.batch_size // cfg.accumulation, max_batches, length, stride)
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
    return task.figures(split, {name: math.fsum(float(row[name]) for row in host) for name in host[0]})


def choose_split(corpus: Prepared, name: str) -> TokenSplit:
    splits = {"train": corpus.train, "validation": corpus.validation}
    if name not in splits:
        raise UserError(f"--split={name}: must be one of {', '.join(splits)}")
    return splits[name]


def own_split(run: Trained, name: str) -> Any:
    """A split of a run's own data. Raises a UserError where there is none of that name."""
    return choose_split(_prepared(run), name)


def _prepared(run: Trained) -> Prepared:
    """The data of a run's config; says where they are not those that it was trained on."""
    task = task_of(run.cfg)
    corpus = task.prepare(run.cfg, run.assets)
    if task.identity(corpus, run.cfg) != run.record.data and jax.process_index() == 0:
        print(
            "warning: the data have changed since the run: its figures here are of others; if they were moved, use "
            "--config.data.path=PLACE",
            file=sys.stderr,
        )
    return corpus


def summary(run: Trained) -> dict[str, Any]:
    """What an `eval.json` says of the model."""
    return {
        "step": run.step_number,
        "params": run.num_params,
        "fingerprint": run.fingerprint,
        "trained_tokens": run.record.tokens,
        "train_flops": run.record.train_flops,
    } | ({"adapters": [adapter.file for adapter in run.adapters]} if run.adapters else {})


def write_result(result: dict[str, Any], workdir: pathlib.Path, out: pathlib.Path | None) -> None:
    """Writes figures to a file, by default WORKDIR/eval.json; where that can't be written, a warning says so."""
    if jax.process_index() == 0:
        try:
            replace_file(out or workdir / "eval.json", json_text(result, indent=2) + "\n")
        except UserError as error:
            if out:
                raise
            print(f"warning: {error}; --out=FILE writes the figures elsewhere", file=sys.stderr)


def evaluate_run(
    run: Trained, workdir: pathlib.Path, split_name: str, out: pathlib.Path | None = None, **how: int
) -> None:
    """Evaluates a run on a split of its own data, prints the result and writes it to a file (`write_result`).

    `how` are the `length` and `stride` of `evaluate_split`.
    """
    figures = evaluate_own(run, split_name, **how)
    if jax.process_index() == 0:
        told = task_of(run.cfg).report(figures, split_name)
        print(f"step {run.step_number}, {run.num_params:,} parameters, {told}", flush=True)
        if not math.isfinite(figures["loss"]):
            print(
                f"warning: the model of step {run.step_number} is broken: its loss is not finite; an earlier "
                f"checkpoint, by --step, may be good: {workdir / 'checkpoints'} holds them",
                file=sys.stderr,
            )
    write_result({"split": split_name, **summary(run), **figures}, workdir, out)


def evaluate_own(run: Trained, split_name: str, **how: int) -> dict[str, float]:
    """Figures of a split of the run's own data."""
    return evaluate_split(run.step, run.state, own_split(run, split_name), run.cfg, progress=True, **how)


def show_examples(run: Trained, examples: range) -> None:
    """Prints training examples, such as those of a step whose loss was not finite: each loss, and text or image."""
    found = task_of(run.cfg).training_examples(_prepared(run), run.cfg, run.step.mesh, examples)
    for example, (batch, told) in zip(examples, found, strict=True):
        sums = jax.device_get(run.step.evaluate(run.state, put_batch(run.step, batch)))
        if jax.process_index() == 0:
            loss = f"loss {sums['nll'] / sums['weights']:.4f} nats" if sums["weights"] else "damaged: weighs nothing"
            print(f"--- example {example}, {loss}\n{told}", flush=True)
