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
import math
import multiprocessing
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from benchmarks.growth_report import Record, report
from configs import base
from tokenformer_jax.cli import run_command, workdir_flag
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import replace_file
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.metrics_file import read_metrics
from tokenformer_jax.training.metrics import train_flops_per_token

SEEDS = (0, 1, 2)
FIRST_RATE = 4e-3  # where a search begins
FAILED = "failed.txt"  # in the workdir of a run that diverged


@dataclasses.dataclass(frozen=True)
class Study:
    """A width, and the parameter tokens of the two sizes: n in the attention's projections, 4 n in the feed-forward.

    Budgets are steps of runs, each with a cosine of its own. A tuple of them shares the rate best for its first.
    """

    name: str
    width: int
    small_tokens: int
    large_tokens: int
    recipes: tuple[str, ...]
    small: tuple[int, ...]
    growth: tuple[int, ...]
    scratch: tuple[tuple[int, ...], ...]  # of the large model
    transformer: tuple[tuple[int, ...], ...] = ()  # of the plain one with as many parameters


# What a recipe's name stands for: grow.recipe and grow.tau_ramp.
RECIPES = {
    "zero keys": ("zero_keys", 0.25),
    "zero keys, fast ramp": ("zero_keys", 0.05),
    "isometric": ("isometric", 0.0),
    "random keys (lossy)": ("random_keys", 0.0),
    "released (lossy)": ("released", 0.0),
}
STUDIES = (
    Study(
        "n < d",
        64,
        16,
        64,
        tuple(RECIPES),
        small=(20_000, 40_000),
        growth=(2_500, 5_000),
        scratch=((5_000, 2_500), (10_000, 20_000)),
        transformer=((5_000, 10_000),),
    ),
    Study(
        "n >= d",
        32,
        32,
        128,
        ("zero keys, fast ramp", "isometric", "random keys (lossy)"),
        small=(10_000,),
        growth=(2_500,),
        scratch=((5_000, 2_500),),
    ),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. With a parent it begins from the parent's last checkpoint, grown to this one's size."""

    study: Study
    kind: str  # small, continued, grown, scratch, transformer
    steps: int  # of its own
    rate: float  # peak learning rate
    seed: int = 0
    parent: "Run | None" = None
    recipe: str = ""
    final: float = 0.1  # the final learning rate, as a part of the peak

    @property
    def name(self) -> str:
        recipe = "".join(c if c.isalnum() else "_" for c in self.recipe)
        parts = [self.kind, recipe, str(self.steps), f"{self.rate:g}"]
        parts += [f"to_{self.final:g}"] if self.final != 0.1 else []
        parts += [f"from_{self.parent.steps}_{self.parent.rate:g}"] if self.parent else []
        return f"{self.study.width}-{self.study.large_tokens}/" + "-".join(filter(None, [*parts, f"seed{self.seed}"]))

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
        n = self.study.small_tokens if self.kind in ("small", "continued") else self.study.large_tokens
        config.model.update(vocab_size=512, context_length=64, num_layers=2, num_heads=2, embed_dim=self.study.width)
        config.model.update(qkv_tokens=n, out_tokens=n, ffn_tokens=4 * n)
        if self.kind == "transformer":  # as many parameters: 4 D² + 2 D h in a layer
            hidden = 8 * n - 2 * self.study.width
            config.model.update(projection="linear", qkv_tokens=0, out_tokens=0, ffn_tokens=hidden)
        config.optimizer.update(
            peak_learning_rate=self.rate, final_learning_rate=self.rate * self.final, warmup_steps=200
        )
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
    """The run with every seed (of its parent, too) and every number of steps."""
    runs = []
    for seed in SEEDS:
        parent = run.parent and dataclasses.replace(run.parent, seed=seed)
        runs += [dataclasses.replace(run, steps=count, seed=seed, parent=parent) for count in steps]
    return runs


def search(run: Run, loss: Loss) -> tuple[list[Run], Run | None]:
    """Runs at rates around the given one, further until the best lies inside; and that best one, once all are done."""
    rates = [run.rate / 2, run.rate, run.rate * 2]
    while True:
        runs = [dataclasses.replace(run, rate=rate) for rate in rates]
        losses = [value for value in map(loss, runs) if value is not None]
        if len(losses) < len(runs):
            return runs, None
        best = losses.index(min(losses))
        if 0 < best < len(runs) - 1:
            return runs, runs[best]
        rates = [rates[0] / 2, *rates] if best == 0 else [*rates, rates[-1] * 2]


class Plan:
    """All runs that a study needs, as far as the results so far tell; the most urgent first."""

    def __init__(self, study: Study, loss: Loss):
        self.study, self.loss = study, loss
        self.searches: dict[str, list[Run]] = {}
        self.groups: dict[str, list[Run]] = {}  # what is reported
        self.runs: list[Run] = []
        small = self.seek("small", "small", study.small)
        self.seek("scratch", "scratch", *study.scratch)
        self.decay_further("scratch", 0.025)
        if small:
            for recipe in study.recipes:
                self.seek(recipe, "grown", study.growth, parent=small, recipe=recipe)
            ratio = cost(study, "grown") / cost(study, "small")
            self.seek("continued", "continued", tuple(math.ceil(n * ratio) for n in study.growth), parent=small)
        self.seek("transformer", "transformer", *study.transformer)

    def seek(
        self, group: str, kind: str, *budgets: tuple[int, ...], parent: Run | None = None, recipe: str = ""
    ) -> Any:
        """Wants runs of all budgets, and returns the last; those of a tuple share a rate, searched at its first."""
        best = None
        for steps in budgets:
            start = Run(self.study, kind, steps[0], best.rate if best else FIRST_RATE, 0, parent, recipe)
            tried, best = search(start, self.loss)
            self.searches[f"{group}, {steps[0]} steps"] = tried
            self.runs += tried
            if best is None:
                return None
            found = with_seeds(best, steps[-1:] if kind == "small" else steps)
            self.groups[group] = self.groups.get(group, []) + found
            self.runs += found
        return best and dataclasses.replace(best, steps=steps[-1])

    def decay_further(self, group: str, final: float) -> None:
        """Wants a group's runs once more, with a lower final rate."""
        again = [dataclasses.replace(run, final=final) for run in self.groups.get(group, [])]
        self.groups[f"{group}, decayed to {final:g}"] = again
        self.runs += again


def cost(study: Study, kind: str) -> float:
    """Training FLOPs of a token."""
    return train_flops_per_token(Run(study, kind, 1000, FIRST_RATE).config.model)


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


def work(plans: Callable[[], dict[str, Plan]], loss: Loss, root: pathlib.Path, workers: int, only: str) -> None:
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
            wanted = [run for plan in plans().values() for run in plan.runs if re.search(only, run.name)]
            open_runs = [run for run in wanted if loss(run) is None]
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


def record(group: str, run: Run, root: pathlib.Path) -> Record:
    """A finished run, as the report wants it."""
    curve = [(row["train_flops"], row["eval_loss"]) for row in rows(run, root)]
    total, loss = curve[-1]
    tokens = run.steps * run.config.batch_size * run.config.model.context_length
    own = tokens * train_flops_per_token(run.config.model)
    return {
        "group": group,
        "seed": run.seed,
        "steps": run.steps,
        "peak_learning_rate": run.rate,
        "parameters": rows(run, root)[-1]["params"],
        "own_flops": own,
        "cumulative_flops": total,
        "loss": loss,
        "curve": [(flops, round(value, 5)) for flops, value in curve],
    }


def main() -> None:
    root, out = _WORKDIR(), pathlib.Path(_OUT.value)
    loss = functools.partial(last_loss, root=root)

    def plans() -> dict[str, Plan]:
        return {study.name: Plan(study, loss) for study in STUDIES}

    if not _REPORT_ONLY.value:
        work(plans, loss, root, _WORKERS.value, _ONLY.value)
    studies = {}
    for name, plan in plans().items():
        finished = [
            (group, run) for group, runs in plan.groups.items() for run in runs if math.isfinite(loss(run) or math.inf)
        ]
        searches = {what: {f"{run.rate:g}": loss(run) for run in runs} for what, runs in plan.searches.items()}
        studies[name] = {"searches": searches, "runs": [record(group, run, root) for group, run in finished]}
    report(studies, out)


if __name__ == "__main__":
    _WORKDIR = workdir_flag(help_text="holds all runs")
    _OUT = flags.DEFINE_string("out", "docs", "directory for growth_study.json and growth_study.png")
    _WORKERS = flags.DEFINE_integer("workers", len(os.sched_getaffinity(0)), "runs at a time, each on one core")
    _ONLY = flags.DEFINE_string("only", "", "a regular expression: only such runs (WORKDIR/STUDY/RUN) are made now")
    _REPORT_ONLY = flags.DEFINE_bool("report_only", False, "report what is done, and run nothing")
    run_command(main)
