"""What benchmarks/gpu_growth found: costs for the same loss, tables, a plot."""

import json
import pathlib
from typing import Any

import matplotlib

from benchmarks.growth_report import Frontier
from tokenformer_jax.files import replace_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Record = dict[str, Any]


def frontiers(runs: list[Record], seed: int) -> dict[int, Frontier]:
    """What each size reaches from scratch, where at least two budgets are known."""
    found: dict[int, list[Record]] = {}
    for run in runs:
        if len(run["sizes"]) == 1 and run["seed"] == seed and run["loss"] is not None:
            found.setdefault(run["sizes"][0], []).append(run)
    return {n: Frontier(each) for n, each in found.items() if len(each) > 1}


def ratio(run: Record, lines: list[Frontier]) -> Record | None:
    """A run's cost over what the cheapest of these sizes pays from scratch for its loss.

    `bound` is ">" where that size's first budget already reached a lower loss, so that the ratio is higher than said.
    It is "<" where no size reached so low a loss on any budget: then the largest budget stands for its cost.
    """
    if not lines or run["loss"] is None:
        return None
    costs = {line.cost_of(run["loss"]): line.bound(run["loss"]) for line in lines}
    cost = min((cost for cost, bound in costs.items() if bound != "<"), default=max(costs))
    return {"ratio": run["cumulative_flops"] / cost, "bound": costs[cost]}


def label(run: Record) -> str:
    seed = f", seed {run['seed']}" if run["seed"] else ""
    return f"{run['lineage']} ({'→'.join(map(str, run['sizes']))}){seed}"


def shown(run: Record) -> str:
    """The loss, and in brackets the costs over those of the large and of the best size."""
    costs = []
    for found in (run["cost_over_large"], run["cost_over_best_size"]):
        if found:
            costs.append("not reached" if found["bound"] == "<" else f"{found['bound']}{100 * found['ratio']:.0f} %")
    return ("diverged" if run["loss"] is None else f"{run['loss']:.3f}") + (f" ({', '.join(costs)})" if costs else "")


def markdown(*rows: list) -> str:
    """A table whose first row is its head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def table(tree: Record) -> str:
    """Every loss, the sizes with their speed, and what growth changed, as Markdown."""
    runs, whole = tree["runs"].values(), tree["plan"]["flops"]
    budgets = sorted({run["budget"] for run in runs})
    losses: dict[str, dict[float, str]] = {}
    for run in runs:
        losses.setdefault(label(run), {})[run["budget"]] = shown(run)
    rows = [[name, *(cells.get(budget, "") for budget in budgets)] for name, cells in losses.items()]
    parts = [markdown(["FLOPs of all rungs", *(f"{budget * whole:.2e}" for budget in budgets)], *rows)]
    rows = [["n", "parameters", "FLOPs a token", "tokens a parameter, whole budget", "ms a step", "TFLOP/s"]]
    for n, size in tree["sizes"].items():
        tokens = whole / size["flops_per_token"] / size["parameters"]
        rows.append([n, f"{size['parameters']:,}", f"{size['flops_per_token']:.3g}", f"{tokens:.1f}"])
        rows[-1] += [f"{1e3 * size['step_seconds']:.2f}", f"{size['flops_per_second'] / 1e12:.1f}"]
    parts.append(markdown(*rows))
    rows = [["growth", "recipe", "step", "loss before", "loss after", "largest logit", "logits moved by", "lossless"]]
    for each in tree["growths"].values():
        rows.append([f"{each['from']} → {each['to']}", each["recipe"], each["step"]])
        rows[-1] += [f"{each['loss_before']:.6f}", f"{each['loss_after']:.6f}", f"{each['max_logit']:.3g}"]
        rows[-1] += [f"{each['max_logit_difference']:.1e}", "yes" if each["lossless"] else "no"]
    return "\n\n".join([*parts, markdown(*rows)])


def plot(tree: Record, path: pathlib.Path) -> None:
    """Loss against all training FLOPs: trunks thin, the decayed ends of a lineage joined."""
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    groups: dict[str, list[Record]] = {}
    for run in sorted(tree["runs"].values(), key=lambda run: run["budget"]):
        if run["loss"] is not None:
            groups.setdefault(label(run), []).append(run)
    names = list(dict.fromkeys(run["lineage"] for run in tree["runs"].values()))
    for name, runs in sorted(groups.items(), key=lambda item: names.index(item[1][0]["lineage"])):
        last, flops, losses = runs[-1], [run["cumulative_flops"] for run in runs], [run["loss"] for run in runs]
        style: Record = {"color": f"C{names.index(last['lineage'])}", "alpha": 0.5 if last["seed"] else 1.0}
        trunk = [row for row in last["curve"] if row[1] <= last["steps"] - last["decay_steps"]]
        axis.plot([row[0] for row in trunk], [row[3] for row in trunk], linewidth=0.7, **style)
        axis.plot(flops, losses, "o--" if len(last["sizes"]) == 1 else "s-", label=name, **style)
    if groups:
        ends = [run["loss"] for runs in groups.values() for run in runs]
        axis.set_ylim(min(ends) - 0.05, max(ends) + 0.8)
        axis.legend(fontsize="small")
    axis.set(xscale="log", xlabel="all training FLOPs, every rung counted", ylabel="validation loss (nats a token)")
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(path: pathlib.Path) -> None:
    """Sums up what the JSON holds: costs into itself, a plot beside it, and tables."""
    tree = json.loads(path.read_text())
    runs, large = list(tree["runs"].values()), tree["identity"]["setting"]["tokens"][-1]
    for run in runs:
        lines = frontiers(runs, run["seed"])
        run["cost_over_large"] = run["cost_over_best_size"] = None
        if run["sizes"] != [large] and large in lines:
            run["cost_over_large"] = ratio(run, [lines[large]])
        if len(run["sizes"]) > 1:
            run["cost_over_best_size"] = ratio(run, list(lines.values()))
    tree.pop("summary", None)
    replace_file(path, json.dumps(tree, indent=1) + "\n")
    plot(tree, path.with_suffix(".png"))
    print(table(tree))
