"""What benchmarks/growth_beyond.py found: losses at equal FLOPs, costs at equal loss, and a plot."""

import json
import pathlib
import statistics
from typing import Any

import matplotlib

from benchmarks.gpu_growth.report import frontiers, ratio

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Record = dict[str, Any]
ENDS = 1.02  # by so much a run's FLOPs may exceed those of a size's longest run and be compared with it


def mean(values: list[float]) -> str:
    """With the standard error, where there are several."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):+.3f} ± {error:.3f}"


def summarize(tree: Record) -> dict[str, dict[float, Record]]:
    """Of each lineage and budget, seed by seed: loss, nats ahead of scratch at equal FLOPs, cost over scratch's."""
    runs, large = list(tree["runs"].values()), max(tree["sizes"], key=int)
    found: dict[str, dict[float, Record]] = {}
    for seed in dict.fromkeys(run["seed"] for run in runs):
        lines = frontiers(runs, seed)
        for run in (run for run in runs if run["seed"] == seed and run["loss"] is not None):
            row = found.setdefault(run["lineage"], {}).setdefault(run["budget"], {"sizes": run["sizes"]})
            row.setdefault("flops", run["cumulative_flops"])
            row.setdefault("loss", []).append(run["loss"])
            flops = run["cumulative_flops"]
            reached = {n: each for n, each in lines.items() if flops <= ENDS * max(each.costs)}
            known = {"large": [int(large)], "best": list(reached)}
            for name, sizes in known.items():
                theirs = [reached[n] for n in sizes if n in reached]
                if len(run["sizes"]) > 1 and theirs:
                    ahead = min(each.loss_at(flops) for each in theirs) - run["loss"]
                    row.setdefault(f"ahead of {name}", []).append(ahead)
                    row.setdefault(f"cost over {name}", []).append(ratio(run, theirs))
    return found


def markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def costs(ratios: list[Record]) -> str:
    """Their mean, as a bound if one of them is."""
    bounds = {each["bound"] for each in ratios} - {""}
    return f"{min(bounds, default='')}{statistics.fmean(each['ratio'] for each in ratios):.0%}"


def tables(tree: Record) -> str:
    found = summarize(tree)
    budgets = sorted({budget for rows in found.values() for budget in rows})
    shown = [budget for budget in budgets if sum(budget in rows for rows in found.values()) > 1]
    sizes = [["n", "parameters", "FLOPs a token", "best rate from scratch"]]
    for n, size in tree["sizes"].items():
        rate = tree.get("rates", {}).get(n, "")
        sizes.append([n, f"{size['parameters']:,}", f"{size['flops_per_token']:.3g}", f"{rate}"])
    parts = [markdown(sizes)]

    def rows_of(cell: Any, chosen: list[str]) -> list[list[str]]:
        return [[name, *(cell(found[name][b]) if b in found[name] else "" for b in shown)] for name in chosen]

    head = ["loss; FLOPs", *(f"{budget * tree['unit_flops']:.2g}" for budget in shown)]
    parts.append(markdown([head, *rows_of(lambda row: f"{statistics.fmean(row['loss']):.3f}", list(found))]))
    grown = [name for name, rows in found.items() if any(len(row["sizes"]) > 1 for row in rows.values())]
    for other, what in ("best", "the best size from scratch"), ("large", "the largest from scratch"):
        ahead, cost = f"ahead of {other}", f"cost over {other}"
        head = [f"nats ahead of {what} at equal FLOPs (cost over its at equal loss)", *(f"{each:g}" for each in shown)]
        rows = rows_of(lambda row, a=ahead, c=cost: f"{mean(row[a])} ({costs(row[c])})" if a in row else "", grown)
        parts.append(markdown([head, *rows]))
    odd = [(name, b, row) for name, rows in found.items() for b, row in rows.items() if b not in shown]
    for name, budget, row in odd:
        told = f"{name}, budget {budget:.3g}: loss {statistics.fmean(row['loss']):.3f}"
        for other in ("best", "large"):
            if f"ahead of {other}" in row:
                told += f"; {mean(row[f'ahead of {other}'])} ahead of {other} ({costs(row[f'cost over {other}'])})"
        parts.append(told)
    growths = list(tree["growths"].values())
    lossless = [each for each in growths if each["meant_lossless"]]
    if lossless:
        moved = max(each["max_logit_difference"] / max(each["max_logit"], 1.0) for each in lossless)
        parts.append(f"{len(lossless)} growths meant lossless; logits moved by at most {moved:.1e} of the largest.")
    return "\n\n".join(parts)


def plot(tree: Record, path: pathlib.Path) -> None:
    """Left the losses, right by how much ladders are ahead of the best size from scratch."""
    found = summarize(tree)
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    best: dict[int, dict[float, float]] = {}
    for rows in found.values():
        for row in rows.values():
            if len(row["sizes"]) == 1:
                points, loss = best.setdefault(row["sizes"][0], {}), statistics.fmean(row["loss"])
                points[row["flops"]] = min(loss, points.get(row["flops"], loss))
    for dashes, (n, points) in zip(("-", "--", ":"), sorted(best.items(), reverse=True), strict=False):
        left.plot(*zip(*sorted(points.items()), strict=True), f"ko{dashes}", label=f"n = {n} from scratch")
    ladders = {name: rows for name, rows in found.items() if len(next(iter(rows.values()))["sizes"]) > 1}
    for number, (name, rows) in enumerate(ladders.items()):
        style: Record = {"color": f"C{number % 10}", "marker": "os^vD"[number // 2 % 5], "label": name}
        ordered = [rows[budget] for budget in sorted(rows)]
        left.plot([row["flops"] for row in ordered], [statistics.fmean(row["loss"]) for row in ordered], **style)
        known = [row for row in ordered if "ahead of best" in row]
        aheads = [row["ahead of best"] for row in known]
        errors = [statistics.stdev(a) / len(a) ** 0.5 if len(a) > 1 else 0 for a in aheads]
        right.errorbar([row["flops"] for row in known], list(map(statistics.fmean, aheads)), errors, capsize=3, **style)
    right.axhline(0, color="black")
    left.set(xscale="log", ylabel="validation loss (nats a token)", xlabel="all training FLOPs, every rung counted")
    right.set(xscale="log", ylabel="nats ahead of the best size from scratch", xlabel=left.get_xlabel())
    right.legend(fontsize="x-small")
    left.legend(fontsize="x-small")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(path: pathlib.Path) -> None:
    tree = json.loads(path.read_text())
    plot(tree, path.with_suffix(".png"))
    print(tables(tree))
