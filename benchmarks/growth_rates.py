"""Does growth pay beyond the crossing, at which learning rates? A small study on two cores, every FLOP counted.

python -m benchmarks.growth_rates [--workdir=runs/growth_rates] [--seeds=0,1,2,3]

One TokenFormer of 2 layers and width 64 with n = 16 or 64 parameter tokens (4 n in the feed-forward) trains on the
source code of all packages of the interpreter's environment, each window read once. All arms spend the same FLOPs:

- the large model from scratch, the small one, and a plain Transformer as large, for all of them;
- the small one for 3000, 1000 or 100 steps, then grown to the large one, by each recipe.

All warm up (over 200 steps, or more), stay at a peak rate, and fall to zero in the last 20 %; the peak of the last size
differs between arms, and is 0.002 before. Arms that are finished are not run again. Leaves growth_rates.json in the
workdir, and prints a table. `--report_only --workdir=docs` prints that of the file in docs.
"""

import argparse
import json
import pathlib
import statistics
import sysconfig
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu_growth.plan import Run, Rung, Setting, Size, Trunk, marks
from benchmarks.gpu_growth.programs import Programs, keep_compiled
from benchmarks.gpu_growth.training import Trainer, prepare_once, say

SMALL, LARGE = 16, 64
SETTING = Setting(
    tokens=(SMALL, LARGE, LARGE),
    width=64,
    layers=2,
    heads=2,
    context=64,
    vocabulary=1024,
    dtype="float32",
    batch=8,
    chunk=100,
    evaluate_every=500,
    evaluated=32,
    max_tokens=60_000_000,
)
FLOPS, DECAY, RATE, RAMP = 4.2e12, 0.2, 2e-3, 500


TRANSFORMER = (0, 384)  # with as many parameters as LARGE


class Arm(NamedTuple):
    sizes: tuple[Size, ...]
    rate: float = RATE  # peak, of the last size
    grown_at: tuple[int, ...] = ()
    recipe: str = ""
    warmup: int = 0  # steps; 0: the setting's
    ramp: int = RAMP

    @property
    def name(self) -> str:
        how = f"{self.recipe} at step {', '.join(map(str, self.grown_at))}" if self.recipe else "from scratch"
        warmup = f", warm-up {self.warmup}" if self.warmup else ""
        ramp = "" if self.ramp == RAMP else f", τ ramped over {self.ramp} steps" if self.ramp else ", τ kept"
        sizes = " -> ".join("plain Transformer" if size == TRANSFORMER else str(size) for size in self.sizes)
        return f"{sizes}, {how}, rate {self.rate:g}{warmup}{ramp}"

    def run(self, seed: int) -> Run:
        """In whole chunks, with as many FLOPs as all others."""
        rates = [RATE] * (len(self.sizes) - 1) + [self.rate]
        rungs, spent = [Rung(0, self.sizes[0], rates[0], warmup=self.warmup)], 0.0
        for step, n, rate in zip(self.grown_at, self.sizes[1:], rates[1:], strict=True):
            spent += (step - rungs[-1].step) * SETTING.flops(rungs[-1].n)
            rungs.append(Rung(step, n, rate, self.recipe, self.ramp))
        last = rungs[-1].n
        steps, decay = (SETTING.steps(flops, last) for flops in (FLOPS - spent, DECAY * FLOPS))
        return Run(self.name, Trunk((seed,), tuple(rungs)), 1.0, rungs[-1].step + steps - decay, decay, spent)


LADDER = SMALL, LARGE
DRAWS: dict[str, Any] = {}  # initializers of other studies' recipes
ARMS = (
    Arm((LARGE,)),
    Arm(LADDER, RATE, (3000,), "zero_keys"),
    *(arm for rate in (1e-3, 4e-3) for arm in (Arm((LARGE,), rate), Arm(LADDER, rate, (3000,), "zero_keys"))),
    Arm((SMALL,)),
    Arm(LADDER, RATE, (1000,), "zero_keys"),
    Arm(LADDER, RATE, (3000,), "random_keys"),
    Arm(LADDER, RATE, (3000,), "isometric"),
    # Is it growth, or what it is for the large model: a gentle beginning, or other keys to begin with?
    Arm((LARGE,), warmup=2000),
    Arm((LARGE,), 4e-3, warmup=2000),
    Arm((LARGE,), warmup=5000),
    Arm(LADDER, RATE, (1000,), "zero_keys", warmup=2000),
    Arm(LADDER, RATE, (100,), "zero_keys"),
    *(Arm((TRANSFORMER,), rate, warmup=2000) for rate in (1e-3, 2e-3, 4e-3)),
)


def table(runs: dict[str, Any], against: str = "") -> str:
    """Losses of each arm over its seeds, and by how much it beats another one: the best large model from scratch."""
    losses: dict[str, dict[int, float]] = {}
    for run in runs.values():
        losses.setdefault(run["lineage"], {})[run["seed"]] = run["loss"]
    means = {name: statistics.fmean(each.values()) for name, each in losses.items()}
    other = against or min((name for name in losses if name.startswith(f"{LARGE},")), key=means.__getitem__)
    than = "default" if against else "best from scratch"
    lines = [f"| arm | loss: mean (least .. most) | seeds | ahead of the {than}, mean ± standard error |"]
    lines.append("|---" * 4 + "|")
    for name in sorted(losses, key=means.__getitem__):
        each = losses[name]
        ahead = [losses[other][seed] - loss for seed, loss in each.items() if seed in losses[other]]
        error = statistics.stdev(ahead) / len(ahead) ** 0.5 if len(ahead) > 1 else 0.0
        told = f"{statistics.fmean(ahead):+.3f} ± {error:.3f}" if name != other and ahead else ""
        spread = f"{means[name]:.3f} ({min(each.values()):.3f} .. {max(each.values()):.3f})"
        lines.append(f"| {name} | {spread} | {len(each)} | {told} |")
    return "\n".join(lines)


def study(
    workdir: pathlib.Path, seeds: list[int], arms: Sequence[Arm], name: str = "growth_rates", epochs: int = 0
) -> None:
    """Runs what is missing. With `epochs` the large model from scratch reads the same text so many times."""
    prepare_once(workdir, [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")], SETTING, 600)
    keep_compiled(workdir)
    programs = Programs(SETTING)
    programs.draws = DRAWS
    trainer = Trainer(SETTING, programs, workdir, np.inf, f"{name}.json")
    if epochs:
        trainer.num_windows = Arm((LARGE,)).run(0).steps * SETTING.batch // epochs
    trainer.tree |= {"command": f"python -m benchmarks.{name}", "data": trainer.data, "flops": FLOPS}
    runs = [arm.run(seed) for seed in seeds for arm in arms]
    trainer.marks = marks(runs)
    for number, run in enumerate(runs, 1):
        if trainer.missing([run]):
            began = time.monotonic()
            trainer.run(run)
            left = (time.monotonic() - began) * (len(runs) - number)
            say(f"{number} of {len(runs)}, about {left / 60:.0f} minutes left")
    trainer.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/growth_rates"))
    parser.add_argument("--seeds", default="0,1,2,3")
    parser.add_argument(
        "--report_only", action="store_true", help="print the table of the workdir's file, and run nothing"
    )
    args = parser.parse_args()
    if not args.report_only:
        study(args.workdir, [int(seed) for seed in args.seeds.split(",")], ARMS)
    print(table(json.loads((args.workdir / "growth_rates.json").read_text())["runs"]))


if __name__ == "__main__":
    main()
