"""What benchmarks/growth_beyond.py found: losses at equal FLOPs, costs at equal loss, and a plot."""

import itertools
import json
import pathlib
import statistics
from typing import Any

import matplotlib

from benchmarks.gpu_growth.report import frontiers, markdown, ratio

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Record = dict[str, Any]
ENDS = 1.02  # by so much a run's FLOPs may exceed those of a size's longest run and be compared with it


def family(lineage: str) -> str:
    """A lineage without its learning rates."""
    return lineage.partition(", rate")[0]


def summarize(tree: Record) -> dict[str, dict[float, Record]]:
    """Of each lineage and budget, seed by seed: loss, nats ahead of scratch at equal FLOPs, cost over scratch's.

    Scratch is each size at the rate that is best for the seed and the budget; "best" is the best size of those that
    were trained for as many FLOPs.
    """
    runs, large = list(tree["runs"].values()), int(max(tree["sizes"], key=int))
    found: dict[str, dict[float, Record]] = {}
    for seed in dict.fromkeys(run["seed"] for run in runs):
        lines = frontiers(runs, seed)
        for run in (run for run in runs if run["seed"] == seed and run["loss"] is not None):
            flops = run["cumulative_flops"]
            row = found.setdefault(run["lineage"], {}).setdefault(
                run["budget"], {"sizes": run["sizes"], "flops": flops}
            )
            row.setdefault("loss", []).append(run["loss"])
            reached = {n: each for n, each in lines.items() if flops <= ENDS * max(each.costs)}
            for name, sizes in {"large": [large], "best": list(reached)}.items():
                theirs = [reached[n] for n in sizes if n in reached]
                if len(run["sizes"]) > 1 and theirs:
                    ahead = min(each.loss_at(flops) for each in theirs) - run["loss"]
                    row.setdefault(f"ahead of {name}", []).append(ahead)
                    row.setdefault(f"cost over {name}", []).append(ratio(run, theirs))
    return found


def at_best_rate(found: dict[str, dict[float, Record]]) -> dict[str, dict[float, Record]]:
    """Of each family the lineage with the lowest mean loss, budget by budget."""
    best: dict[str, dict[float, Record]] = {}
    for name, rows in found.items():
        for budget, row in rows.items():
            others = best.setdefault(family(name), {})
            if budget not in others or statistics.fmean(row["loss"]) < statistics.fmean(others[budget]["loss"]):
                others[budget] = row
    return best


def told(row: Record, other: str) -> str:
    """Nats ahead with the standard error, the seeds that are, and the cost; a bound if that of one seed is."""
    if f"ahead of {other}" not in row:
        return ""
    ahead, ratios = row[f"ahead of {other}"], row[f"cost over {other}"]
    error = f" ± {statistics.stdev(ahead) / len(ahead) ** 0.5:.3f}" if len(ahead) > 1 else ""
    bound = min({each["bound"] for each in ratios} - {""}, default="")
    cost = f"{bound}{statistics.fmean(each['ratio'] for each in ratios):.0%}"
    return f"{statistics.fmean(ahead):+.3f}{error} ({sum(a > 0 for a in ahead)} of {len(ahead)}; {cost})"


def speeds(rows: dict[float, Record]) -> dict[float, Record]:
    """From each budget to the next: FLOPs of the largest from scratch for the same fall of the loss, over a ladder's.

    Above 1 the grown model learns faster than one from scratch of the same loss: more than a head start.
    """
    found = {}
    for before, after in itertools.pairwise(sorted(rows)):
        pair = rows[before], rows[after]
        if all("cost over large" in row and not any(r["bound"] for r in row["cost over large"]) for row in pair):
            costs = [[row["flops"] / each["ratio"] for each in row["cost over large"]] for row in pair]
            own = pair[1]["flops"] - pair[0]["flops"]
            found[after] = {"speed": [(new - old) / own for old, new in zip(*costs, strict=True)]}
    return found


def tables(tree: Record) -> str:
    found = summarize(tree)
    best = at_best_rate(found)
    budgets = sorted({budget for rows in best.values() for budget in rows})

    def table(head: str, rows_of: dict[str, dict[float, Record]], cell: Any) -> str:
        cells = {name: [cell(rows[b]) if b in rows else "" for b in budgets] for name, rows in rows_of.items()}
        return markdown(
            [head, *(f"{b:g}" for b in budgets)], *([name, *row] for name, row in cells.items() if any(row))
        )

    sizes = [["n", "parameters", "FLOPs a token", "best rate from scratch"]]
    for n, size in tree["sizes"].items():
        rate = tree.get("rates", {}).get(n, "")
        sizes.append([n, f"{size['parameters']:,}", f"{size['flops_per_token']:.3g}", f"{rate}"])
    parts = [
        markdown(*sizes),
        f"Columns are budgets, all rungs counted, in units of {tree['unit_flops']:.3g} FLOPs: a token for each "
        "parameter of the largest model.",
        table("loss at the best rate, mean of seeds", best, lambda row: f"{statistics.fmean(row['loss']):.3f}"),
    ]
    for other, what in ("best", "the best size from scratch"), ("large", "the largest from scratch"):
        head = f"nats ahead of {what} at equal FLOPs (seeds ahead; cost over its cost of the same loss)"
        parts.append(table(head, best, lambda row, other=other: told(row, other)))
    head = "learns so many times as fast as the largest from scratch of the same loss, since the budget before"
    rates = {name: speeds(rows) for name, rows in best.items()}
    parts.append(table(head, rates, lambda row: f"{statistics.fmean(row['speed']):.1f}"))
    parts.append(table("every rate: loss", found, lambda row: f"{statistics.fmean(row['loss']):.3f}"))
    parts.append(table("every rate: nats ahead of the best size", found, lambda row: told(row, "best")))
    lossless = [each for each in tree["growths"].values() if each["meant_lossless"]]
    moved = max((each["max_logit_difference"] / max(each["max_logit"], 1.0) for each in lossless), default=0.0)
    parts.append(f"{len(lossless)} growths meant lossless; logits moved by at most {moved:.1e} of the largest.")
    return "\n\n".join(parts)


def plot(tree: Record, path: pathlib.Path) -> None:
    """Left the losses, right by how much ladders are ahead of the best size from scratch."""
    found = at_best_rate(summarize(tree))
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    for number, (name, rows) in enumerate(sorted(found.items(), key=lambda item: "scratch" in item[0])):
        ordered = [rows[budget] for budget in sorted(rows)]
        ladder = len(ordered[0]["sizes"]) > 1
        style: Record = {"color": f"C{number % 10}" if ladder else "black", "label": name}
        style |= {"marker": "os^vDPX*"[number % 8], "linestyle": "-" if ladder else "--"}
        left.plot([row["flops"] for row in ordered], [statistics.fmean(row["loss"]) for row in ordered], **style)
        if known := [row for row in ordered if "ahead of best" in row]:
            aheads = [row["ahead of best"] for row in known]
            errors = [statistics.stdev(a) / len(a) ** 0.5 if len(a) > 1 else 0 for a in aheads]
            means = list(map(statistics.fmean, aheads))
            right.errorbar([row["flops"] for row in known], means, errors, capsize=3, **style)
    right.axhline(0, color="black", linestyle="--")
    left.set(ylabel="validation loss (nats a token)")
    right.set(ylabel="nats ahead of the best size from scratch, at equal FLOPs")
    left.legend(fontsize="small")
    for axis in (left, right):
        axis.set(xscale="log", xlabel="all training FLOPs, every rung counted")
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(path: pathlib.Path) -> None:
    tree = json.loads(path.read_text())
    plot(tree, path.with_suffix(".png"))
    print(tables(tree))
