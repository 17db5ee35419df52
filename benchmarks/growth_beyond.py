"""Does growth pay far beyond the crossing? Ladders and every size from scratch, at equal FLOPs, on one GPU.

python -m benchmarks.growth_beyond [--workdir=runs/growth_beyond] [--minutes=9] [--seeds=0,1,2,3] [--repeat=0]

One TokenFormer of 2 layers and width 128 with n = 16, 64 or 256 parameter tokens (4 n in the feed-forward) trains on
text that the machine has installed. The cost of a token differs 7 times. A budget is what the largest model from
scratch spends on 5 to 100 tokens a parameter; all rungs of a ladder count. Every run warms up, stays at its peak rate,
and falls to zero in the last 20 % of its budget. Budgets branch off one trunk. The models of all seeds train side by
side.

First each size's best peak rate from scratch is searched. Ladders use it too, unless they say otherwise. The most
valuable runs come first; what has no time is listed as dropped. The same command goes on. Leaves growth_beyond.json and
.png in the workdir, and prints tables; `--report_only --workdir=docs/growth_beyond` prints those of the docs. With
--repeat=30 the largest model's longest run reads its text 30 times.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.gpu_growth.data import ROOTS
from benchmarks.gpu_growth.plan import DECAY, Run, Rung, Setting, Trunk, marks
from benchmarks.gpu_growth.programs import Programs, keep_compiled
from benchmarks.gpu_growth.training import Trainer, prepare_once, say
from benchmarks.growth_beyond_report import report
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.errors import UserError

SMALL, MIDDLE, LARGE = 16, 64, 256
SETTING = Setting(
    tokens=(SMALL, MIDDLE, LARGE),
    width=128,
    layers=2,
    heads=2,
    context=64,
    vocabulary=512,
    batch=32,
    chunk=100,
    evaluate_every=1000,
    evaluated=32,
    max_tokens=400_000_000,
)
RATES = 1e-3, 2e-3, 4e-3  # that a search begins with
RAMP = 500  # steps of τ
SCRATCH = 5, 10, 20, 50, 100  # budgets: tokens a parameter of the largest model


class Lineage(NamedTuple):
    """Runs of several budgets off one trunk. `spent` is what all rungs before a growth cost, in the unit of budgets."""

    sizes: tuple[int, ...]
    rates: tuple[float, ...]  # of each size
    budgets: tuple[float, ...]
    spent: tuple[float, ...] = ()  # at each growth
    recipe: str = "zero_keys"
    restarts: bool = False  # each rung's rate falls to zero, and the next warms up again
    warmup: int = 0  # steps; 0: the setting's

    @property
    def name(self) -> str:
        rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(self.rates))
        rates += f", warm-up {self.warmup}" if self.warmup else ""
        if not self.spent:
            return f"{self.sizes[0]} from scratch, rate {rates}"
        how = "each rung decayed, " if self.restarts else ""
        grown = ", ".join(f"{spent:g}" for spent in self.spent)
        return f"{' → '.join(map(str, self.sizes))}, {self.recipe} at {grown}, {how}rate {rates}"

    def runs(self, seeds: tuple[int, ...], unit: float) -> list[Run]:
        """In whole chunks of steps; a budget of 1 has `unit` FLOPs."""
        steps = SETTING.steps
        rungs, spent = [Rung(0, self.sizes[0], self.rates[0], warmup=self.warmup)], 0.0
        for goal, n, rate in zip(self.spent, self.sizes[1:], self.rates[1:], strict=True):
            before = rungs[-1]
            count = steps(goal * unit - spent, before.n)
            spent += count * SETTING.flops(before.n)
            end = before.step + count
            if self.restarts:
                rungs[-1] = before._replace(falls=(end - round(DECAY * count), end))
            rungs.append(Rung(end, n, rate, self.recipe, RAMP))
        trunk, last, found = Trunk(seeds, tuple(rungs)), rungs[-1], []
        for budget in self.budgets:
            own = steps(budget * unit - spent, last.n)
            decay = steps(DECAY * (own * SETTING.flops(last.n) if self.restarts else budget * unit), last.n)
            constant = max(own - decay, SETTING.chunk)
            found.append(Run(self.name, trunk, budget, last.step + constant, decay, spent))
        return found


def paper(rates: dict[int, float], cost: dict[int, float]) -> Lineage:
    """The paper's protocol: small for as many tokens as the largest from scratch, then for each rung a tenth."""
    longest = max(SCRATCH)
    spent = [longest * cost[SMALL]]
    for n in (MIDDLE, LARGE):
        spent.append(spent[-1] + longest / 10 * cost[n])
    sizes = SMALL, MIDDLE, LARGE
    return Lineage(sizes, tuple(map(rates.get, sizes)), (spent[2],), tuple(spent[:2]), restarts=True)  # type: ignore


def ladders(rates: dict[int, float], cost: dict[int, float]) -> Iterator[Lineage]:
    """What is run once each size's best rate is known, the most valuable first. `cost` is of a token; largest: 1."""
    small, middle, large = (rates[n] for n in (SMALL, MIDDLE, LARGE))
    three = (SMALL, MIDDLE, LARGE), (small, middle, large)
    early = 0.32, 1.6  # 8 % of 20 tokens a parameter
    yield Lineage((LARGE,), (large,), SCRATCH)
    yield Lineage(*three, (5, 10, 20, 50, 100), early)
    yield Lineage((MIDDLE,), (middle,), (5, 10, 20))
    # A longer warm-up explained a third of the gain on a CPU (growth_rates.py). It may also bear a higher rate.
    for warmup, times in ((1000, 1), (3000, 1), (3000, 2)):
        yield Lineage((LARGE,), (times * large,), (10, 20, 50), warmup=warmup)
        yield Lineage((MIDDLE, LARGE), (times * middle, times * large), (10, 20, 50), (1.6,), warmup=warmup)
    yield Lineage((MIDDLE, LARGE), (middle, large), (5, 10, 20, 50), (1.6,))
    yield Lineage(*three, (10, 20, 50), (1.0, 5.0))
    yield paper(rates, cost)
    yield Lineage(*three, (10, 20), early, "random_keys")
    yield Lineage(*three, (10, 20), early, "isometric")
    yield Lineage((SMALL, LARGE), (small, large), (5, 10, 20), (0.32,))
    yield Lineage((LARGE,), (large / 2,), SCRATCH)
    yield Lineage((SMALL, MIDDLE, LARGE), (small, middle, large / 2), (10, 20, 50, 100), early)
    yield Lineage((MIDDLE,), (middle,), (50,))
    yield Lineage(*three, (50, 100), (1.6, 8.0))
    yield Lineage((SMALL,), (small,), (5, 10))
    yield Lineage((SMALL, MIDDLE, LARGE), (small, middle, 2 * large), (10, 20), early)
    yield Lineage(*three, (20,), early, "released")
    yield Lineage((MIDDLE,), (middle,), (100,))


def prepare_text(args: argparse.Namespace) -> None:
    prepare_once(args.workdir, ROOTS, SETTING, args.prepare_seconds)


class Study:
    def __init__(self, args: argparse.Namespace):
        deadline = time.monotonic() + 60 * args.minutes
        prepare_text(args)
        keep_compiled(args.workdir)
        self.seeds = tuple(map(int, args.seeds.split(",")))
        self.programs = Programs(SETTING, len(self.seeds))
        for n in (LARGE, MIDDLE, SMALL):
            for part in ("train", "evaluate", "init"):
                self.programs.start(part, n)
        for pair in ((SMALL, MIDDLE), (MIDDLE, LARGE)):
            self.programs.start("grow", *pair, "zero_keys")
        trainer = self.trainer = Trainer(SETTING, self.programs, args.workdir, deadline, "growth_beyond.json")
        per_token = {n: SETTING.flops(n) / SETTING.batch / SETTING.context for n in SETTING.tokens}
        params = {n: self.programs.num_params(n) for n in SETTING.tokens}
        self.cost = {n: flops / per_token[LARGE] for n, flops in per_token.items()}
        self.unit = params[LARGE] * per_token[LARGE]
        if args.repeat:
            tokens = max(SCRATCH) * params[LARGE] / args.repeat
            trainer.num_windows = min(trainer.num_windows, round(tokens / SETTING.context))
        windows = {"windows": trainer.num_windows, "tokens_read_once": trainer.num_windows * SETTING.context}
        trainer.tree |= {"data": trainer.data | windows, "environment": environment(), "unit_flops": self.unit}
        trainer.tree["sizes"] = {n: {"parameters": params[n], "flops_per_token": per_token[n]} for n in params}
        say(f"data: {trainer.data['train']['tokens'] / 1e6:.1f}M tokens; sizes: {json.dumps(trainer.tree['sizes'])}")

    def run(self, *lineages: Lineage) -> dict[float, list[float]]:
        """Runs what is missing; the last lineage's losses of each seed, by budget."""
        runs = [run for lineage in lineages for run in lineage.runs(self.seeds, self.unit)]
        for trunk, steps in marks(runs).items():
            self.trainer.marks.setdefault(trunk, set()).update(steps)
        done = self.trainer.tree["runs"]
        for run in runs:
            if self.trainer.missing([run]):
                self.trainer.run(run)
        return {run.budget: [done[name]["loss"] or 99.0 for name in run.names] for run in runs}

    def best_rate(self, n: int, *budgets: float) -> float:
        """The peak rate with the lowest mean loss from scratch at the last budget; searched on beyond an end."""
        means: dict[float, float] = {}
        rates = list(RATES)
        while rates:
            rate = rates.pop()
            losses = self.run(Lineage((n,), (rate,), budgets))[budgets[-1]]
            means[rate] = sum(losses) / len(losses)
            if not rates:
                best = min(means, key=means.__getitem__)
                rates = [each for each in (best / 2, 2 * best) if each not in means]
        return best

    def all(self) -> None:
        lineages: list[Lineage] = []
        try:
            rates = {
                LARGE: self.best_rate(LARGE, 5, 10),
                MIDDLE: self.best_rate(MIDDLE, 5),
                SMALL: self.best_rate(SMALL, 2),
            }
            self.trainer.write(rates=rates)
            say(f"best rates: {rates}")
            lineages = list(ladders(rates, self.cost))
            for lineage in lineages:
                self.run(lineage)
        except TimeoutError:
            say("the time is over; the same command with more --minutes goes on")
        self.programs.pool.shutdown(wait=False, cancel_futures=True)
        runs = [run for lineage in lineages for run in lineage.runs(self.seeds, self.unit)]
        self.trainer.write(dropped=self.trainer.missing(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/growth_beyond"))
    parser.add_argument("--minutes", type=float, default=9, help="for everything but the text")
    parser.add_argument("--seeds", default="0,1,2,3")
    parser.add_argument(
        "--repeat", type=float, default=0, help="how often the longest run of the largest reads its text"
    )
    parser.add_argument("--prepare_only", action="store_true", help="the text alone, which needs no device")
    parser.add_argument("--prepare_seconds", type=float, default=240, help="for the text")
    parser.add_argument("--report_only", action="store_true", help="print the tables of the workdir, and run nothing")
    args = parser.parse_args()
    try:
        if args.prepare_only:
            prepare_text(args)
        elif not args.report_only:
            Study(args).all()
        if not args.prepare_only:
            report(args.workdir / "growth_beyond.json")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
