"""All that an evaluation config asks for, in one run: data sets of text, and tasks of lm-evaluation-harness."""

import dataclasses
import importlib.metadata
import pathlib
import re
from typing import Any

import jax

from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.perplexity import evaluate_own, evaluate_run, evaluate_split, summary, write_result
from tokenformer_jax.evaluation.scoring import Scorer
from tokenformer_jax.evaluation.settings import DataSet, EvalConfig, applied
from tokenformer_jax.evaluation.zero_shot import require_harness, run_tasks, task_figures
from tokenformer_jax.storage.trained import Trained

_OF_DATA = re.compile(r"(?:config\.)?\bdata\.(dataset|path|text_key|split)\b")


def evaluate_all(
    run: Trained, settings: EvalConfig, workdir: pathlib.Path, split: str, out: pathlib.Path | None = None
) -> None:
    """Evaluates what the settings name, or else the run's own split; prints tables and writes the figures to a file.

    Raises:
      UserError: something of it cannot be used.
    """
    run = applied(run, settings)
    if not (settings.datasets or settings.task_names):
        return evaluate_run(run, workdir, split, out, length=settings.context_length, stride=settings.stride)
    if settings.task_names:
        require_harness()  # before the data sets take their time
    result: dict[str, Any] = summary(run) | {"settings": _described(run, settings)}
    first = jax.process_index() == 0
    if settings.datasets:
        result["datasets"] = {name: _evaluate(run, name, data, settings) for name, data in settings.data_sets.items()}
        if first:
            print(_table(result["datasets"]), flush=True)
    if settings.task_names:
        scorer = Scorer(run, settings.batch_size, settings.context_length)
        found = run_tasks(scorer, settings)
        result["tasks"] = task_figures(found)
        result["settings"]["lm_eval"] = importlib.metadata.version("lm_eval")
        if first:
            from lm_eval.utils import make_table

            print(make_table(found), flush=True)
    write_result(result, workdir, out)


def _described(run: Trained, settings: EvalConfig) -> dict[str, Any]:
    """The settings with what was left to the run filled in."""
    cfg = run.cfg
    return dataclasses.asdict(settings) | {
        "datasets": {name: vars(data) for name, data in settings.data_sets.items()},
        "context_length": settings.context_length or cfg.model.context_length,
        "batch_size": cfg.batch_size // cfg.accumulation,
        "mesh": dict(run.step.mesh.shape),
        "dtype": cfg.model.dtype,
    }


def _evaluate(run: Trained, name: str, data: DataSet, settings: EvalConfig) -> dict[str, float]:
    how = {"length": settings.context_length, "stride": settings.stride}
    if not data.dataset:
        return evaluate_own(run, data.split, **how)
    given: Any = {"dataset": data.dataset, "path": data.path, "text_key": data.text_key, "sources": ()}
    given |= dict.fromkeys(("train_split", "validation_split"), data.split)
    cfg = dataclasses.replace(run.cfg, data=dataclasses.replace(run.cfg.data, **given))
    try:
        split = prepare(cfg, run.tokenizer).validation
    except UserError as error:  # which names keys of a training config
        told = re.sub(r"(train|validation)_split", "split", str(error))
        raise UserError(_OF_DATA.sub(rf"config.datasets.{name}.\1", told)) from None
    return evaluate_split(run.step, run.state, split, cfg, progress=True, **how)


def _table(figures: dict[str, dict[str, float]]) -> str:
    width = max(len(name) for name in ["data set", *figures])
    lines = [f"{'data set':<{width}}  {'tokens':>13}  {'loss':>7}  {'perplexity':>10}  {'bits/byte':>9}"]
    for name, found in figures.items():
        lines.append(
            f"{name:<{width}}  {found['tokens']:>13,.0f}  {found['loss']:>7.4f}  {found['perplexity']:>10.5g}  "
            f"{found['bits_per_byte']:>9.4f}"
        )
    return "\n".join(lines)
