"""Compares runs: a table of their evaluations, and a plot of validation loss against training FLOPs."""

import math
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib

from tokenformer_jax.buckets import is_bucket, is_outage
from tokenformer_jax.errors import UserError, shown
from tokenformer_jax.files import local_path, parse_json, run_path
from tokenformer_jax.storage.metrics_file import Row, read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def named_runs(given: list[str]) -> dict[str, pathlib.Path]:
    """The directories that `--runs` names, by their names: NAME=DIR or DIR, each on its own or separated by commas.

    Of several readings the longest path that exists is meant: directories may have commas and equals signs in them.
    """
    runs: dict[str, pathlib.Path] = {}
    for text in given:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        while parts:
            ends = [n for n in range(len(parts), 0, -1) if _named(",".join(parts[:n]))[1].is_dir()]
            count = ends[0] if ends else 1
            name, workdir = _named(",".join(parts[:count]))
            name = shown(name or workdir.name or workdir.resolve().name)
            if name in runs:
                apart = f"--runs=one={shown(runs[name])} --runs=two={shown(workdir)}"
                raise UserError(f"--runs: two runs are named {name!r}; use {apart}")
            runs[name], parts = workdir, parts[count:]
    return runs


def _named(item: str) -> tuple[str, pathlib.Path]:
    """A run's name, which may be empty and has no comma, and its directory."""
    name, equals, path = item.partition("=")
    whole = _path(item)
    if whole.is_dir() or not equals or "," in name:
        return "", whole
    workdir = _path(path)
    return (name, workdir) if workdir.is_dir() or "/" not in name else ("", whole)


def _path(text: str) -> pathlib.Path:
    return run_path(text, "--runs") if is_bucket(text) else local_path(text, "--runs", any_bytes=True, or_bucket=True)


def perplexity(value: float) -> str:
    """With two decimals; a huge one in few digits."""
    return f"{value:.2f}" if value < 1e6 else f"{value:.4g}"


# Of an evaluation, what some tasks have: title, width and how it is told.
FIGURES: dict[str, tuple[str, int, Callable[[float], str]]] = {
    "eval_perplexity": ("perplexity", 10, perplexity),
    "eval_bits_per_byte": ("bits/byte", 9, "{:.4f}".format),
    "eval_top1": ("top-1", 7, "{:.2%}".format),
    "eval_top5": ("top-5", 7, "{:.2%}".format),
}


def read_run(workdir: pathlib.Path) -> tuple[list[Row], list[Row]]:
    """The evaluations of a run and its growths. Raises UserError where it has no evaluation."""
    try:
        rows = read_metrics(workdir)
    except OSError as error:
        if is_outage(error):
            raise
        raise UserError(f"{workdir}: no metrics.jsonl here; is it the directory of a training run?") from None
    # A figure that was not finite is null in the file.
    evaluations = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows if "eval_loss" in row]
    if not evaluations:
        raise UserError(f"{workdir}/metrics.jsonl: no evaluation yet")
    return evaluations, [row for row in rows if "growth" in row and row["growth"]["from"] != row["growth"]["to"]]


def summarise(name: str, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """A run's evaluations on both sides of each growth, and its last one."""
    evaluations, growths = read_run(workdir)
    chosen = []
    for number, growth in enumerate(growths, 1):
        at_growth = [row for row in evaluations if row["step"] == growth["step"]]
        which = f" {number}" if len(growths) > 1 else ""
        for row in at_growth:
            side = "right after" if row["params"] == growth["params"] else "before"
            chosen.append((f"{name}, {side} growth{which}", row))
    chosen.append((name, evaluations[-1]))
    if len(evaluations) == 1:
        chosen = chosen[-1:]
    keys = ("step", "params", "train_flops", "eval_loss", *FIGURES)
    return [{"run": label} | {key: row[key] for key in keys if key in row} for label, row in chosen]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, aligned."""
    width = max(len(row["run"]) for row in rows)
    head = f"{'run':<{width}}  {'step':>7}  {'parameters':>13}  {'train FLOPs':>11}  {'val. loss':>9}"
    shown = {key: figure for key, figure in FIGURES.items() if any(key in row for row in rows)}
    lines = [head + "".join(f"  {title:>{size}}" for title, size, _ in shown.values())]
    for row in rows:
        cells = [f"  {tell(row[key]) if key in row else '':>{size}}" for key, (_, size, tell) in shown.items()]
        lines.append(
            f"{row['run']:<{width}}  {row['step']:>7,}  {row['params']:>13,}  {row['train_flops']:>11.3e}  "
            f"{row['eval_loss']:>9.4f}{''.join(cells)}".rstrip()
        )
    return "\n".join(lines)


def task_table(runs: dict[str, pathlib.Path]) -> str:
    """What the `eval.json` of each run says of tasks, aligned; empty where none has any.

    Of a task's metrics the accuracy is shown, or else the first, with its standard error.
    """
    found = {name: tasks for name, workdir in runs.items() if (tasks := _tasks(workdir))}
    columns = list(dict.fromkeys(task for tasks in found.values() for task in tasks))
    cells = [["run", "step", *columns]]
    for name, tasks in found.items():
        step = next(iter(tasks.values()))["step"]
        cells.append([name, f"{step:,}", *(_metric(tasks[task]) if task in tasks else "" for task in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join(lines) if found else ""


def _tasks(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        result = parse_json((workdir / "eval.json").read_text())
        return {name: task | {"step": result["step"]} for name, task in result["tasks"].items() if task["metrics"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _metric(task: dict[str, Any]) -> str:
    name = next((name for name in ("acc", "acc_norm") if name in task["metrics"]), next(iter(task["metrics"])))
    value, error = (task["metrics"][name][key] for key in ("value", "stderr"))
    value = math.nan if value is None else value
    if name.startswith("acc"):
        return f"{value:.3f}" + (f" ± {error:.3f}" if error else "")
    return f"{name} {value:.4g}" + (f" ± {error:.2g}" if error else "")


def plot(runs: dict[str, pathlib.Path], path: pathlib.Path) -> None:
    """Validation loss against cumulative training FLOPs, a line a run, with a star at each growth."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows: list[Row] = [{}]
    for name, workdir in runs.items():
        rows, growths = read_run(workdir)
        (line,) = axes.plot(
            [row["train_flops"] for row in rows],
            [row["eval_loss"] for row in rows],
            marker="o",
            markersize=3,
            label=f"{name} ({rows[-1]['params'] / 1e6:.2f}M parameters)",
        )
        for growth in growths:
            evaluated = (row["eval_loss"] for row in rows if row["step"] == growth["step"])
            loss = next(evaluated, growth["growth"]["loss_after"])
            if loss is None or not math.isfinite(loss):
                continue
            place = growth["train_flops"], loss
            axes.plot(*place, marker="*", markersize=12, color=line.get_color())
            axes.annotate(f"{growth['params'] / 1e6:.2f}M", place, xytext=(4, 8), textcoords="offset points")
    unit = "an image" if "eval_top1" in rows[-1] else "a token"
    axes.set(xlabel="cumulative training FLOPs", ylabel=f"validation loss (nats {unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        plt.close(figure)
