"""The paper's protocol in miniature: is it cheaper to grow a trained model than to train the large one from scratch?

python -m benchmarks.growth_study --workdir=runs/growth_study [--workers=2] [--report_only]

Trains a small TokenFormer, grows it with each recipe, and trains the controls: the small one continued, the large one
from scratch, a plain Transformer from scratch. Each has its own best learning rate, searched with seed 0, and is then
run with every seed. Runs that are done are kept: the same command goes on after an interruption. Leaves
growth_study.json and growth_study.png in --out; docs/growth_study.md says why the sizes are what they are.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from absl import flags

from configs import base
from tokenformer_jax.config import Config, UserError, read_config, run_command, workdir_flag
from tokenformer_jax.grow import grow
from tokenformer_jax.metrics import read_metrics, replace_file, train_flops_per_token
from tokenformer_jax.train import train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SEEDS = (0, 1, 2)
SEARCH_STEPS = 5_000  # at which the rates of what is large and trained from scratch are searched
SMALL_SEARCH_STEPS = 20_000
GROWTH_STEPS = (2_500, 5_000)
FAILED = "failed.txt"  # in the workdir of a run that diverged


@dataclasses.dataclass(frozen=True)
class Study:
    """A width, and the parameter tokens of the two sizes: n in the attention's projections, 4 n in the feed-forward."""

    name: str
    width: int
    small: int
    large: int
    recipes: tuple[str, ...]
    small_steps: int
    scratch_steps: tuple[int, ...]  # of the large model; each is a run with a cosine of its own
    transformer_steps: tuple[int, ...] = ()  # of the plain one with as many parameters


# What a recipe's name stands for: grow.recipe and grow.tau_ramp.
RECIPES = {
    "zero keys": ("zero_keys", 0.25),
    "zero keys, fast ramp": ("zero_keys", 0.05),
    "isometric": ("isometric", 0.0),
    "random keys (lossy)": ("random_keys", 0.0),
    "released (lossy)": ("released", 0.0),
}
STUDIES = (
    Study("n < d", 64, 16, 64, tuple(RECIPES), 40_000, (2_500, 5_000, 10_000, 20_000), (5_000, 10_000)),
    Study(
        "n >= d",
        32,
        32,
        128,
        ("zero keys, fast ramp", "isometric", "random keys (lossy)"),
        20_000,
        (2_500, 5_000, 10_000),
    ),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. With a parent it begins from the parent's last checkpoint, grown to this one's size."""

    study: Study
    kind: str  # small, continued, grown, scratch, transformer
    steps: int  # of its own
    rate: float  # peak learning rate; the final one is a tenth
    seed: int = 0
    parent: "Run | None" = None
    recipe: str = ""

    @property
    def name(self) -> str:
        recipe = "".join(c if c.isalnum() else "_" for c in self.recipe)
        parts = [self.kind, recipe, str(self.steps), f"{self.rate:g}"]
        parts += [f"from_{self.parent.steps}_{self.parent.rate:g}"] if self.parent else []
        return f"{self.study.width}-{self.study.large}/" + "-".join(filter(None, [*parts, f"seed{self.seed}"]))

    @property
    def config(self) -> Config:
        config = base.get_config()
        config.seed = self.seed
        config.steps = self.steps + (self.parent.steps if self.parent else 0)
        config.batch_size = 8
        config.log_every = 500
        config.eval_every = 1250
        config.eval_batches = 128  # 65 536 tokens, the same for all
        config.checkpoint_every = 2500
        config.checkpoints_kept = 1
        n = self.study.small if self.kind in ("small", "continued") else self.study.large
        config.model.update(vocab_size=512, context_length=64, num_layers=2, num_heads=2, embed_dim=self.study.width)
        config.model.update(qkv_tokens=n, out_tokens=n, ffn_tokens=4 * n)
        if self.kind == "transformer":  # as many parameters: 4 D² + 2 D h in a layer
            hidden = 8 * n - 2 * self.study.width
            config.model.update(projection="linear", qkv_tokens=0, out_tokens=0, ffn_tokens=hidden)
        config.optimizer.update(peak_learning_rate=self.rate, final_learning_rate=self.rate / 10, warmup_steps=200)
        if self.recipe:
            config.grow.recipe, config.grow.tau_ramp = RECIPES[self.recipe]
        return read_config(config.to_dict())


Loss = Callable[[Run], float | None]  # a run's last validation loss; infinite where it diverged, None if not done yet


def rows(run: Run, root: pathlib.Path) -> list[dict[str, Any]]:
    """The run's evaluations."""
    return [row for row in read_metrics(root / run.name) if "eval_loss" in row]


def last_loss(run: Run, root: pathlib.Path) -> float | None:
    if (root / run.name / FAILED).exists():
        return math.inf
    try:
        last = rows(run, root)[-1]
    except (FileNotFoundError, IndexError):
        return None
    return last["eval_loss"] if last["step"] == run.config.steps else None


# The plan.


def with_seeds(run: Run, steps: tuple[int, ...]) -> list[Run]:
    return [
        dataclasses.replace(
            run, steps=count, seed=seed, parent=run.parent and dataclasses.replace(run.parent, seed=seed)
        )
        for seed in SEEDS
        for count in steps
    ]


def search(run: Run, loss: Loss) -> tuple[list[Run], Run | None]:
    """Runs at rates around the given one, further until the best lies inside; and that best one, once all are done."""
    rates = [run.rate / 2, run.rate, run.rate * 2]
    while True:
        runs = [dataclasses.replace(run, rate=rate) for rate in rates]
        losses = [loss(each) for each in runs]
        if any(value is None for value in losses):
            return runs, None
        best = min(range(len(runs)), key=lambda i: losses[i] or 0.0)
        if 0 < best < len(runs) - 1:
            return runs, runs[best]
        rates = [rates[0] / 2, *rates] if best == 0 else [*rates, rates[-1] * 2]


@dataclasses.dataclass
class Plan:
    """What a study needs, as far as the results so far tell: `groups` name the runs to report, `searches` the rest."""

    groups: dict[str, list[Run]]
    searches: dict[str, list[Run]]

    @property
    def runs(self) -> list[Run]:
        """All, the most urgent first."""
        return [run for name, runs in self.searches.items() for run in (*runs, *self.groups.get(name, ()))]


def make_plan(study: Study, loss: Loss) -> Plan:
    plan = Plan({}, {})

    def seek(name: str, run: Run, steps: tuple[int, ...]) -> Run | None:
        plan.searches[name], best = search(run, loss)
        if best:
            plan.groups[name] = with_seeds(best, steps)
        return best

    small = seek("small", Run(study, "small", SMALL_SEARCH_STEPS, 8e-3), (study.small_steps,))
    seek("scratch", Run(study, "scratch", SEARCH_STEPS, 4e-3), study.scratch_steps)
    if small:
        parent = dataclasses.replace(small, steps=study.small_steps)
        for recipe in study.recipes:
            seek(recipe, Run(study, "grown", GROWTH_STEPS[0], 4e-3, parent=parent, recipe=recipe), GROWTH_STEPS)
        equal = [math.ceil(steps * cost(study, "grown") / cost(study, "small")) for steps in GROWTH_STEPS]
        seek("continued", Run(study, "continued", equal[0], 4e-3, parent=parent), tuple(equal))
    if study.transformer_steps:
        seek("transformer", Run(study, "transformer", SEARCH_STEPS, 4e-3), study.transformer_steps)
    return plan


def cost(study: Study, kind: str) -> float:
    """Training FLOPs of a token."""
    return train_flops_per_token(Run(study, kind, 1000, 1e-3).config.model)


# Running it.


def start_worker(cores: Any) -> None:
    """Pins this process to a core of its own: two runs on a thread each beat one on two."""
    os.sched_setaffinity(0, {cores.get()})


def execute(run: Run, root: pathlib.Path) -> None:
    """Trains a run to its end, from where it was left."""
    workdir = root / run.name
    workdir.parent.mkdir(parents=True, exist_ok=True)
    try:
        if run.parent and not workdir.exists():
            grow(root / run.parent.name, run.config, workdir)
        train(run.config, workdir)
    except UserError as error:
        if "grad_norm" not in str(error):  # anything but a loss that is not finite
            raise
        replace_file(workdir / FAILED, f"{error}\n")


def work(plans: Callable[[], dict[str, Plan]], loss: Loss, root: pathlib.Path, workers: int) -> None:
    """Runs whatever the plans want, parents first, until they want nothing more."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((root / "compiled").absolute()))
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    available = sorted(os.sched_getaffinity(0))
    for worker in range(workers):
        cores.put(available[worker % len(available)])
    began: dict[concurrent.futures.Future, tuple[Run, float]] = {}
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (cores,)) as pool:
        while True:
            running = [run for run, _ in began.values()]
            open_runs = [run for plan in plans().values() for run in plan.runs if loss(run) is None]
            if not hasattr(base.get_config().grow, "recipe"):
                open_runs = [r for r in open_runs if not r.recipe]  # TEMP
            ready = [run for run in open_runs if run not in running and not (run.parent and loss(run.parent) is None)]
            for run in list(dict.fromkeys(ready))[: workers - len(running)]:
                began[pool.submit(execute, run, root)] = run, time.monotonic()
            if not began:
                return
            for future in concurrent.futures.wait(began, return_when="FIRST_COMPLETED").done:
                run, since = began.pop(future)
                future.result()
                value = loss(run)
                if value is None:
                    raise UserError(f"{run.name} was stopped; the same command goes on from there")
                print(f"{run.name}: {value:.4f} after {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)


# The report.


@dataclasses.dataclass(frozen=True)
class Curve:
    """What so much training from scratch reaches: the loss falls with the cost, interpolated over log cost."""

    costs: list[float]
    losses: list[float]

    @classmethod
    def of(cls, runs: list[Run], seed: int, root: pathlib.Path) -> "Curve":
        ends = sorted((own_cost(run), last_loss(run, root)) for run in runs if run.seed == seed)
        return cls([c for c, _ in ends], list(np.minimum.accumulate([loss for _, loss in ends])))

    def cost_of(self, loss: float) -> float:
        """The cost of a loss; for one beyond the longest or shortest run, that run's cost, which is a bound."""
        return float(np.exp(np.interp(-loss, -np.array(self.losses), np.log(self.costs))))

    def loss_at(self, cost: float) -> float:
        return float(np.interp(np.log(cost), np.log(self.costs), self.losses))


def own_cost(run: Run) -> float:
    return run.steps * run.config.batch_size * run.config.model.context_length * cost(run.study, run.kind)


def total_cost(run: Run) -> float:
    return own_cost(run) + (total_cost(run.parent) if run.parent else 0.0)


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def done_runs(runs: list[Run], root: pathlib.Path) -> list[Run]:
    return [run for run in runs if math.isfinite(last_loss(run, root) or math.inf)]


def summarise(plan: Plan, root: pathlib.Path) -> dict[str, Any]:
    """The searches, and for every group and number of steps the seeds' losses and fractions of the scratch cost."""
    searches = {
        name: {f"{run.rate:g}": last_loss(run, root) for run in sorted(runs, key=lambda run: run.rate)}
        for name, runs in plan.searches.items()
    }
    groups = {name: done_runs(runs, root) for name, runs in plan.groups.items()}
    results = []
    for name, runs in groups.items():
        for steps in sorted({run.steps for run in runs}):
            chosen = [run for run in runs if run.steps == steps]
            losses = {run.seed: rows(run, root)[-1]["eval_loss"] for run in chosen}
            own, total = own_cost(chosen[0]), total_cost(chosen[0])
            result: dict[str, Any] = {
                "run": name,
                "steps": steps,
                "peak_learning_rate": chosen[0].rate,
                "parameters": rows(chosen[0], root)[-1]["params"],
                "own_flops": own,
                "cumulative_flops": total,
                "losses": losses,
                "loss": spread(list(losses.values())),
            }
            for control in ("scratch", "transformer"):
                curves = {seed: Curve.of(groups.get(control, []), seed, root) for seed in losses}
                if name == control or not all(len(curve.costs) > 1 for curve in curves.values()):
                    continue
                costs = {seed: curves[seed].cost_of(loss) for seed, loss in losses.items()}
                result[control] = {
                    "marginal_fraction": spread([own / costs[seed] for seed in losses]),
                    "cumulative_fraction": spread([total / costs[seed] for seed in losses]),
                    "loss_at_cumulative_cost": spread([curves[seed].loss_at(total) for seed in losses]),
                    "seeds_below_its_lowest_loss": sum(losses[seed] < min(curves[seed].losses) for seed in losses),
                    "seeds_above_its_highest_loss": sum(losses[seed] > max(curves[seed].losses) for seed in losses),
                }
            results.append(result)
    return {"searches": searches, "results": results}


def table(summary: dict[str, Any]) -> str:
    """The results for people; < and > mark bounds, where no scratch run has so low or high a loss."""
    lines = [
        "run                    steps  peak lr  own FLOPs  cumulative    loss (range of seeds)  marginal (range) cumul."
    ]
    for row in summary["results"]:
        mean, low, high = row["loss"].values()
        line = f"{row['run']:<21}{row['steps']:>7,}{row['peak_learning_rate']:>9g}{row['own_flops']:>11.2e}"
        line += f"{row['cumulative_flops']:>12.2e}  {mean:>7.3f} ({low:.3f} .. {high:.3f})"
        if scratch := row.get("scratch"):
            bound = (
                "<"
                if scratch["seeds_below_its_lowest_loss"]
                else ">"
                if scratch["seeds_above_its_highest_loss"]
                else ""
            )
            mean, low, high = scratch["marginal_fraction"].values()
            line += f"{bound + format(mean, '.0%'):>8} ({low:.0%} .. {high:.0%})"
            line += f"{bound + format(scratch['cumulative_fraction']['mean'], '.0%'):>8}"
        lines.append(line)
    return "\n".join(lines)


def plot(plans: dict[str, Plan], root: pathlib.Path, path: pathlib.Path) -> None:
    """Loss against all training FLOPs and, below, those after the small model: mean and range of seeds."""
    figure, axes = plt.subplots(2, len(plans), figsize=(7 * len(plans), 9), layout="constrained", squeeze=False)
    for column, (title, plan) in enumerate(plans.items()):
        lowest = math.inf
        for name, group in plan.groups.items():
            runs = done_runs(group, root)
            curves = [rows(run, root) for run in runs if run.steps == max(each.steps for each in runs)]
            if name in (
                "scratch",
                "transformer",
            ):  # a point for each run: its end, since each has a schedule of its own
                seeds = [[rows(run, root)[-1] for run in runs if run.seed == seed] for seed in SEEDS]
                length = max(map(len, seeds))
                curves = [curve for curve in seeds if length and len(curve) == length]
            if not curves:
                continue
            points = list(zip(*curves, strict=True))
            losses = [[row["eval_loss"] for row in point] for point in points]
            lowest = min(lowest, *map(min, losses))
            for row, start in enumerate((0.0, points[0][0]["train_flops"] if runs[0].parent else 0.0)):
                costs = [point[0]["train_flops"] - start for point in points]
                style = "o--" if not runs[0].parent and name != "small" else "-"
                (line,) = axes[row, column].plot(costs, [statistics.fmean(each) for each in losses], style, label=name)
                bounds = [min(each) for each in losses], [max(each) for each in losses]
                axes[row, column].fill_between(costs, *bounds, color=line.get_color(), alpha=0.2)
        for axis, given in zip(axes[:, column], ("", ", the small model given"), strict=True):
            axis.set(xlabel=f"training FLOPs{given}", ylabel="validation loss (nats a token)", title=title)
            if math.isfinite(lowest):
                axis.set_ylim(lowest - 0.03, lowest + 0.5)
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    root, out = _WORKDIR(), pathlib.Path(_OUT.value)
    loss = functools.partial(last_loss, root=root)

    def plans() -> dict[str, Plan]:
        return {study.name: make_plan(study, loss) for study in STUDIES}

    if not _REPORT_ONLY.value:
        work(plans, loss, root, _WORKERS.value)
    summaries = {name: summarise(plan, root) for name, plan in plans().items()}
    replace_file(out / "growth_study.json", json.dumps(summaries, indent=1) + "\n")
    plot(plans(), root, out / "growth_study.png")
    for name, summary in summaries.items():
        print(f"{name}\n{table(summary)}\n")


if __name__ == "__main__":
    _WORKDIR = workdir_flag(help_text="holds all runs")
    _OUT = flags.DEFINE_string("out", "docs", "directory for growth_study.json and growth_study.png")
    _WORKERS = flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "runs at a time, each on one core")
    _REPORT_ONLY = flags.DEFINE_bool("report_only", False, "report what is done, and run nothing")
    run_command(main)
