"""Tasks of lm-evaluation-harness on a trained model. Needs the extra `eval`."""

import contextlib
import importlib.metadata
import logging
import os
import random
import sys
from typing import Any

import numpy as np

from tokenformer_jax.config import suggest
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.scoring import Scorer
from tokenformer_jax.evaluation.settings import EvalConfig
from tokenformer_jax.files import local_path

BOOTSTRAPS = 1000  # draws for the standard error of what is no mean, such as a perplexity


def require_harness() -> None:
    """Raises a UserError where the harness is not installed."""
    try:
        importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{sys.executable}: has no lm_eval, which tasks need; use pip install -r requirements-eval.txt, or pip "
            "install 'tokenformer-jax[eval]'"
        ) from None


def run_tasks(scorer: Scorer, settings: EvalConfig) -> dict[str, Any]:
    """Runs the tasks of the settings.

    Returns:
      The harness' results: `results` by task and metric, `versions`, `n-shot`, `n-samples`, `group_subtasks`.

    Raises:
      UserError: the harness is missing, knows no such task, or cannot get its data.
    """
    require_harness()
    # What takes a second to import stays here.
    import datasets
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    from tokenformer_jax.evaluation.harness import HarnessModel

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every task that is given num_fewshot
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with contextlib.redirect_stdout(sys.stderr), no_forks():
        # As the harness' own command does.
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        loaded = _load(settings)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if settings.num_fewshot >= 0 and own != 0:
                task.set_config(key="num_fewshot", value=settings.num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        limit = settings.limit if 0 < settings.limit < 1 else int(settings.limit) or None
        model = HarnessModel(scorer)
        return evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)  # type: ignore


@contextlib.contextmanager
def no_forks():
    """Keeps the harness from forking this process, which JAX's threads do not survive, for a standard error."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC") if before is None else os.environ.update(DISABLE_MULTIPROC=before)


def _load(settings: EvalConfig) -> dict[str, Any]:
    """The tasks by name, with their data."""
    from lm_eval.tasks import TaskManager

    folder = local_path(settings.include_path, "config.include_path") if settings.include_path else None
    if folder and not folder.is_dir():
        raise UserError(f"config.include_path = {settings.include_path!r}: is no folder; use one with files of tasks")
    names = settings.task_names
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([name]) or os.path.isfile(name) for name in names):
        manager = TaskManager(include_path=folder)  # takes seconds to read the harness' own
    chosen: list[str] = []
    for name in names:
        found = [name] if os.path.isfile(name) else manager.match_tasks([name])
        if not found:
            near = suggest(name, manager.all_tasks)
            raise UserError(f"--tasks={name}: no such task{near}; use a name that `lm_eval ls tasks` prints, or a file")
        chosen += found
    try:
        return manager.load(chosen)
    except Exception as error:  # of a task's own code, its data or the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"--tasks={','.join(names)}: cannot be loaded ({reason}); their data are downloaded on first use: where "
            "there is no network, copy ~/.cache/huggingface from where there is one"
        ) from None


def task_figures(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By task its version, shots, number of questions, and metrics, each with its standard error (None: not known).

    A metric of several filters is named `metric,filter`.
    """
    figures = {}
    for name, found in results["results"].items():
        metrics = {}
        for key, value in found.items():
            metric, comma, rest = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{rest}")
                metrics[metric if rest == "none" else key] = {
                    "value": value,
                    "stderr": error if isinstance(error, int | float) else None,
                }
        figures[name] = {
            "version": results["versions"].get(name),
            "num_fewshot": results["n-shot"].get(name),
            "samples": results["n-samples"].get(name, {}).get("effective"),
            "metrics": metrics,
        }
    return figures
