"""Growth that pays, counted from the first step, on one GPU: ladders against every size from scratch, on fresh data.

python -m benchmarks.gpu_growth [--workdir=runs/gpu_growth] [--minutes=5] [--flops=3e15]

Three sizes of one TokenFormer, n = 16, 64, 256 parameter tokens (4 n in the feed-forward), train on text that the
machine has installed, each token read once in a run. The learning rate warms up, stays, and falls to zero in the last
20 % of a budget. Every budget branches off one trunk at the constant rate, so a trunk gives the loss at several
budgets, and ladders grow on the trunk: they begin as the smaller model that another run trains anyway. The model FLOPs
of all rungs count (`language.train_flops_per_token`).

The budget is chosen so that the first --fit lineages end in the given minutes, preparation included; the others run
while there is time. Each finished run is written at once, and not run again: the same command goes on from the trunks
that it saved. Leaves gpu_growth.json and .png in the workdir, and prints tables last; docs/gpu_growth.md reads them.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import shlex
import sys
import sysconfig
import time

from benchmarks.gpu_growth.data import ROOTS
from benchmarks.gpu_growth.plan import LINEAGES, SETTINGS, Size, marks, runs_of, whole_budget
from benchmarks.gpu_growth.programs import Programs, keep_compiled
from benchmarks.gpu_growth.report import report
from benchmarks.gpu_growth.training import Trainer, prepare_once, say
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.errors import UserError

RESERVE = 10.0  # seconds for the report
RUN_SECONDS = 1.0  # of a run: its last evaluation, and what it saves


def prepare_data(args: argparse.Namespace) -> None:
    folders = [sysconfig.get_path("stdlib")] if args.size == "tiny" else ROOTS
    prepare_once(args.workdir, folders, SETTINGS[args.size], args.prepare_seconds)


def study(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * args.minutes - RESERVE
    setting, lineages = SETTINGS[args.size], LINEAGES[: args.lineages]
    if args.rates:
        small, middle, large = map(float, args.rates.split(","))
        setting = dataclasses.replace(setting, rates=(small, middle, large))
    fit = lineages[: args.fit]
    keep_compiled(args.workdir)
    programs = Programs(setting)
    if not (args.workdir / "gpu_growth.json").exists():  # else most are not needed
        for n, part in itertools.product(reversed(setting.tokens), ("train", "evaluate", "init")):
            programs.start(part, n)
        for lineage, (before, after) in ((each, pair) for each in fit for pair in itertools.pairwise(each.sizes)):
            programs.start("grow", setting.tokens[before], setting.tokens[after], lineage.recipe)
    prepare_data(args)
    trainer = Trainer(setting, programs, args.workdir, deadline)
    enough = trainer.num_windows // setting.batch
    say(f"data: {trainer.data['train']['tokens'] / 1e6:.1f}M tokens, {enough} steps")

    if "plan" not in trainer.tree:
        for key in programs.futures:  # what still compiles keeps the device from what is measured
            programs(*key)
        say(f"compiled: {json.dumps(programs.seconds)}")
        step_seconds: dict[Size, float] = {n: trainer.measure(n) for n in reversed(setting.tokens)}
        say("measured: " + ", ".join(f"n = {n}: {1e3 * s:.2f} ms a step" for n, s in step_seconds.items()))
        left = deadline - time.monotonic() - RUN_SECONDS * sum(len(each.budgets) for each in fit)
        limit = enough - 3 * setting.chunk  # by as much the rounding to chunks may exceed it
        flops, by = whole_budget(setting, fit, step_seconds, max(left, 1.0), limit)
        sizes = {n: {"step_seconds": s, "flops_per_second": setting.flops(n) / s} for n, s in step_seconds.items()}
        for tokens, size in sizes.items():
            size["parameters"] = programs.num_params(tokens)
            size["flops_per_token"] = setting.flops(tokens) / setting.batch / setting.context
        plan = {"flops": args.flops or flops, "limited_by": "--flops" if args.flops else by, "seconds_left": left}
        trainer.tree |= {
            "command": shlex.join(["python", "-m", "benchmarks.gpu_growth", *sys.argv[1:]]),
            "environment": environment(),
            "data": trainer.data,
        }
        trainer.tree |= {"plan": plan, "sizes": sizes}  # written with the first trunk
    plan = trainer.tree["plan"]
    runs = [run for lineage in lineages for run in runs_of(lineage, setting, plan["flops"])]
    longest = max(run.steps for run in runs)
    say(f"plan: {plan['flops']:.3g} FLOPs (limited by {plan['limited_by']}), the longest run takes {longest} steps")
    if longest > enough:
        raise UserError(f"there is text for {enough} steps only: give fewer --flops")
    trainer.marks = marks(runs)
    try:
        for run in runs:
            if trainer.missing([run]):
                trainer.run(run)
    except TimeoutError:
        say("the time is over; the same command with more --minutes goes on")
    programs.pool.shutdown(wait=False, cancel_futures=True)
    trainer.write(dropped=trainer.missing(runs))
    report(trainer.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/gpu_growth"))
    parser.add_argument("--minutes", type=float, default=5, help="for everything")
    parser.add_argument("--flops", type=float, default=0, help="the whole budget, instead of what fits the time")
    parser.add_argument("--rates", default="", help="peak learning rates of the three sizes, with commas between")
    parser.add_argument("--size", choices=sorted(SETTINGS), default="full")
    parser.add_argument("--fit", type=int, default=4, help="how many lineages must end in time")
    parser.add_argument("--lineages", type=int, default=len(LINEAGES), help="how many there are at most")
    parser.add_argument("--prepare_only", action="store_true", help="the text alone, which needs no device")
    parser.add_argument("--prepare_seconds", type=float, default=75, help="for the text")
    parser.add_argument("--report_only", action="store_true", help="sum up the workdir's JSON, and run nothing")
    args = parser.parse_args()
    try:
        if args.report_only:
            report(args.workdir / "gpu_growth.json")
        else:
            prepare_data(args) if args.prepare_only else study(args)
    except (UserError, TimeoutError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
