"""What benchmarks/growth_study.py found: fractions of the scratch cost, a table, a plot."""

import json
import math
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np

from tokenformer_jax.files import replace_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Record = dict[str, Any]  # of a run: group, seed, steps, own_flops, cumulative_flops, loss, curve, …
CONTROLS = ("scratch", "transformer")


def control_of(run: Record) -> str:
    """The control that a run counts for, whatever its final learning rate; each of its runs has an own schedule."""
    name = run["group"].split(",")[0]
    return name if name in CONTROLS else ""


class Frontier:
    """What training from scratch reaches at a cost: runs of one seed, interpolated over log cost."""

    def __init__(self, runs: Iterable[Record]):
        best: dict[float, float] = {}
        for run in runs:
            best[run["cumulative_flops"]] = min(run["loss"], best.get(run["cumulative_flops"], math.inf))
        self.costs = sorted(best)
        self.log_costs = np.log(self.costs)
        self.losses = np.minimum.accumulate([best[cost] for cost in self.costs])

    def cost_of(self, loss: float) -> float:
        """The cost of a loss; of one that no run spans, the nearest run's cost, which is a bound."""
        return float(np.exp(np.interp(-loss, -self.losses, self.log_costs)))

    def loss_at(self, cost: float) -> float:
        return float(np.interp(np.log(cost), self.log_costs, self.losses))

    def bound(self, loss: float) -> str:
        """Whether a fraction of `cost_of(loss)` is at most ("<") or at least (">") what it seems."""
        return "<" if loss < self.losses[-1] else ">" if loss > self.losses[0] else ""


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def summarise(runs: list[Record]) -> list[dict[str, Any]]:
    """Every group and budget over its seeds: losses, and the cost as a fraction of each control's at the same loss."""
    found: dict[tuple[str, int], dict[int, Record]] = {}
    for run in runs:
        found.setdefault((run["group"], run["steps"]), {})[run["seed"]] = run
    rows = []
    for (group, steps), seeds in sorted(found.items(), key=lambda item: [r["group"] for r in runs].index(item[0][0])):
        first = next(iter(seeds.values()))
        row = {"group": group, "steps": steps, "seeds": len(seeds)}
        row |= {key: first[key] for key in ("peak_learning_rate", "parameters", "own_flops", "cumulative_flops")}
        row["loss"] = spread(run["loss"] for run in seeds.values())
        for control in CONTROLS:
            theirs = {
                seed: [run for run in runs if (control_of(run), run["seed"]) == (control, seed)] for seed in seeds
            }
            if control_of(first) == control or min(map(len, theirs.values())) < 2:
                continue
            pairs = [(run, Frontier(theirs[seed])) for seed, run in seeds.items()]
            row[control] = {
                "marginal": spread(run["own_flops"] / line.cost_of(run["loss"]) for run, line in pairs),
                "cumulative": spread(run["cumulative_flops"] / line.cost_of(run["loss"]) for run, line in pairs),
                "bounds": [line.bound(run["loss"]) for run, line in pairs],
                "its_loss_at_cumulative_flops": spread(line.loss_at(run["cumulative_flops"]) for run, line in pairs),
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown; < and > mark bounds, where no run of the control has so low or high a loss."""
    lines = [
        "| run | steps | peak lr | own FLOPs | cumulative FLOPs | validation loss (seeds) "
        "| marginal: own / scratch's | cumulative / scratch's | own / Transformer's |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        loss = row["loss"]
        cells = [row["group"], f"{row['steps']:,}", f"{row['peak_learning_rate']:g}"]
        cells += [f"{row[key]:.2e}" for key in ("own_flops", "cumulative_flops")]
        cells += [f"{loss['mean']:.3f} ({loss['min']:.3f} .. {loss['max']:.3f})"]
        for control, kind in (("scratch", "marginal"), ("scratch", "cumulative"), ("transformer", "marginal")):
            cells.append("")
            if control in row:
                bound, part = max(row[control]["bounds"]), row[control][kind]
                cells[-1] = f"{bound}{part['mean']:.0%} ({part['min']:.0%} .. {part['max']:.0%})"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def search_table(searches: dict[str, dict[str, float | None]]) -> str:
    """The searches for learning rates as Markdown, with seed 0's losses; the best in bold."""
    lines = ["| search | peak lr: validation loss |", "|---|---|"]
    for name, losses in searches.items():
        known = {rate: loss for rate, loss in sorted(losses.items(), key=lambda item: float(item[0])) if loss}
        cells = [
            f"{rate}: **{x:.3f}**" if x == min(known.values()) else f"{rate}: {x:.3f}" for rate, x in known.items()
        ]
        if cells:
            lines.append(f"| {name} | {', '.join(cells)} |")
    return "\n".join(lines)


def plot(studies: dict[str, list[Record]], path: pathlib.Path) -> None:
    """Loss against all training FLOPs and, below, those after the small model: mean and range of seeds."""
    figure, axes = plt.subplots(2, len(studies), figsize=(7 * len(studies), 9), layout="constrained", squeeze=False)
    for column, (title, runs) in enumerate(studies.items()):
        for number, group in enumerate(dict.fromkeys(run["group"] for run in runs)):
            style = {"color": f"C{number}", "label": group}
            ours = [run for run in runs if run["group"] == group]
            longest = [run for run in ours if run["steps"] == max(run["steps"] for run in ours)]
            points: dict[float, list[float]] = {}  # cost -> the seeds' losses
            for run in ours if control_of(ours[0]) else longest:  # of a control, the ends of all runs
                for cost, loss in run["curve"][-1:] if control_of(run) else run["curve"]:
                    points.setdefault(cost, []).append(loss)
            costs = np.array(sorted(points))
            mean, low, high = ([of(points[cost]) for cost in costs] for of in (statistics.fmean, min, max))
            given = longest[0]["cumulative_flops"] - longest[0]["own_flops"]
            for axis, start in zip(axes[: 1 if group == "small" else 2, column], (0.0, given), strict=False):
                axis.plot(costs - start, mean, "o--" if control_of(ours[0]) else "-", **style)
                axis.fill_between(costs - start, low, high, color=style["color"], alpha=0.2)
        lowest = min((run["loss"] for run in runs), default=math.nan)
        for axis, which in zip(
            axes[:, column], ("all training FLOPs", "training FLOPs, the small model given"), strict=True
        ):
            axis.set(title=title, xlabel=which, ylabel="validation loss (nats a token)")
            if axis.has_data():
                axis.set_ylim(lowest - 0.03, lowest + 0.5)
                axis.legend(fontsize="small")
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(studies: dict[str, dict[str, Any]], out: pathlib.Path) -> None:
    """Writes growth_study.json and growth_study.png and prints the tables."""
    for study in studies.values():
        study["summary"] = summarise(study["runs"])
    replace_file(out / "growth_study.json", json.dumps(studies, indent=1) + "\n")
    plot({name: study["runs"] for name, study in studies.items()}, out / "growth_study.png")
    for name, study in studies.items():
        print(f"{name}\n\n{table(study['summary'])}\n\n{search_table(study['searches'])}\n")
