"""Training of benchmarks/gpu_growth: trunks, decays and growth, from saved states where there are any."""

import hashlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_growth.data import prepare
from benchmarks.gpu_growth.plan import Run, Rung, Setting, Size, Trunk
from benchmarks.gpu_growth.programs import Programs
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import replace_file
from tokenformer_jax.growth.recipes import RECIPES
from tokenformer_jax.growth.verify import LOGIT_BOUND
from tokenformer_jax.training.state import TrainState

# Rows (FLOPs of all rungs and one seed, step, training losses [A] since the last row, validation losses [A]).
Curve = list[list]


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def prepare_once(workdir: pathlib.Path, folders: Iterable[str], setting: Setting, limit: float) -> None:
    """`data.prepare` in the workdir, unless that was done."""
    data = workdir / "data"
    data.mkdir(parents=True, exist_ok=True)
    if not (data / "data.json").exists():
        prepare(data, folders, setting.max_tokens, setting.vocabulary, setting.held_out, limit)


class Trainer:
    """Trains trunks and decays, keeps the states that others begin from, and writes what it finds at once."""

    def __init__(
        self,
        setting: Setting,
        programs: Programs,
        workdir: pathlib.Path,
        deadline: float,
        results: str = "gpu_growth.json",
    ):
        self.setting, self.programs, self.workdir, self.deadline = setting, programs, workdir, deadline
        train, validation = (np.load(workdir / "data" / f"{split}.npy") for split in ("train", "validation"))
        self.train_T, self.validation_T = (
            jax.device_put(np.pad(ids, (0, setting.max_tokens - len(ids)))) for ids in (train, validation)
        )
        self.num_windows, rest = ((len(ids) - 1) // setting.context for ids in (train, validation))
        shape = setting.last_evaluations, setting.evaluated, setting.batch
        if rest < math.prod(shape):
            raise UserError(f"only {len(validation):,} tokens of validation")
        self.windows_PEB = np.linspace(0, rest - 1, math.prod(shape)).astype(np.int32).reshape(shape, order="F")
        self.orders: dict[tuple[int, int], np.ndarray] = {}
        self.memory: dict[str, TrainState] = {}
        self.marks: dict[Trunk, set[int]] = {}

        self.data = json.loads((workdir / "data" / "data.json").read_text())
        prints = [self.data[split]["fingerprint"] for split in ("train", "validation")]
        identity = {"setting": vars(setting), "data": prints}
        self.tree: dict[str, Any] = {"identity": identity, "trunks": {}, "growths": {}, "runs": {}}
        self.path = workdir / results
        if self.path.exists():
            begun = json.loads(self.path.read_text())
            if begun["identity"] != json.loads(json.dumps(identity)):
                raise UserError(f"--workdir={workdir}: holds runs with other data or sizes; use a new directory")
            self.tree = begun

    def missing(self, runs: list[Run]) -> list[str]:
        """The names of what these runs are still to leave."""
        return [name for run in runs for name in run.names if name not in self.tree["runs"]]

    def write(self, **new: Any) -> None:
        self.tree |= new
        replace_file(self.path, json.dumps(self.tree, indent=1) + "\n")

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """All windows, in an order that the seed decides and each epoch anew."""
        if (seed, epoch) not in self.orders:
            rng = np.random.default_rng((seed, epoch) if epoch else seed)
            self.orders[seed, epoch] = rng.permutation(self.num_windows).astype(np.int32)
        return self.orders[seed, epoch]

    def windows(self, seeds: tuple[int, ...], start: int) -> np.ndarray:
        """The windows of a chunk of steps [S, A, B]: none twice before all were read."""
        shape = self.setting.chunk, self.setting.batch
        places = start * self.setting.batch + np.arange(math.prod(shape)).reshape(shape)
        epochs, places = np.divmod(places, self.num_windows)
        first, last = int(epochs[0, 0]), int(epochs[-1, -1])
        of_seeds = [
            np.select(
                [epochs == epoch for epoch in (first, last)], [self.order(seed, e)[places] for e in (first, last)]
            )
            for seed in seeds
        ]
        return np.stack(of_seeds, axis=1)

    def evaluate(self, n: Size, state: TrainState, parts: int = 1) -> np.ndarray:
        """Validation losses [A]."""
        evaluate = self.programs("evaluate", n)
        losses = [evaluate(state, self.validation_T, windows) for windows in self.windows_PEB[:parts]]
        return np.mean(jax.device_get(losses), axis=0)

    def birth(self, n: Size, seeds: tuple[int, ...]) -> TrainState:
        return self.programs("init", n)(jax.vmap(jax.random.key)(np.asarray(seeds)))

    def measure(self, n: Size) -> float:
        """Seconds of a step with its share of an evaluation: the fastest of several short trainings."""
        seeds, steps, times = tuple(range(self.programs.copies)), self.setting.evaluate_every, []
        trunk = Trunk(seeds, (Rung(0, n, 1e-3),))
        for _ in range(4):
            state, began = self.birth(n, seeds), time.monotonic()
            self.advance(state, trunk, 0, steps, [])
            times.append(time.monotonic() - began)
        return min(times) / steps

    def advance(
        self, state: TrainState, trunk: Trunk, start: int, end: int, curve: Curve, decay: bool = False
    ) -> tuple[TrainState, Curve]:
        """Trains from step to step on a trunk's last rung; the state, and the curve with what was added to it."""
        setting, rung, spent = self.setting, trunk.last, curve[-1][0] if curve else 0.0
        train, losses = self.programs("train", rung.n), []
        for step in range(start, end, setting.chunk):
            if time.monotonic() > self.deadline:
                raise TimeoutError("the time was over before the first run")
            steps, done = np.arange(step, step + setting.chunk), step + setting.chunk
            rates = trunk.rates(steps, setting.warmup)
            rates *= 1 - (steps - start) / (end - start) if decay else 1
            windows = self.windows(trunk.seeds, step)
            state, losses_SA = train(state, self.train_T, windows, rates.astype(np.float32))
            losses.append(np.mean(jax.device_get(losses_SA), axis=0))
            if (done - start) % setting.evaluate_every == 0 or done == end:
                flops = spent + (done - start) * setting.flops(rung.n)
                found = np.mean(losses, axis=0), self.evaluate(rung.n, state)
                curve, losses = (
                    [*curve, [flops, done, *(np.round(each.astype(float), 5).tolist() for each in found)]],
                    [],
                )
        return state, curve

    def reach(self, trunk: Trunk, step: int) -> tuple[TrainState, Curve]:
        """A trunk's state at a step, before that step's growth, and the curve to it; both are kept."""
        part, trunks = trunk.up_to(step), self.tree["trunks"]
        name, rung = f"{part.name} to {step}", part.last
        file = hashlib.sha256(f"{self.path.stem} {name}".encode()).hexdigest()[:16]
        path = self.workdir / "states" / f"{file}.npz"
        if name not in self.memory and name in trunks and path.exists():
            with np.load(path) as saved:
                leaves = [jax.device_put(saved[f"leaf{i}"]) for i in range(len(saved.files))]
            self.memory[name] = jax.tree.unflatten(jax.tree.structure(self.programs.state(rung.n)), leaves)
        if name in self.memory:
            return self.memory[name], trunks[name]

        start = max((mark for mark in self.marks[part] if mark < step), default=rung.step)
        state, curve = self.reach(trunk, start) if start else (self.birth(rung.n, trunk.seeds), [])
        if start == rung.step and len(part.rungs) > 1:
            state = self.grow(part, state)
        state, curve = self.advance(state, part, start, step, curve)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **{f"leaf{i}": leaf for i, leaf in enumerate(jax.device_get(jax.tree.leaves(state)))})
        partial.replace(path)
        self.memory[name], trunks[name] = state, curve
        self.write()
        return state, curve

    def grow(self, trunk: Trunk, state: TrainState) -> TrainState:
        """Grows to the trunk's last rung, and writes what that changed."""
        before, rung = trunk.rungs[-2:]
        grow = self.programs("grow", before.n, rung.n, rung.recipe)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), rung.step))(np.asarray(trunk.seeds))
        shape = 4, min(64, self.setting.context)
        tokens_BL = np.asarray(self.validation_T[: math.prod(shape)]).reshape(shape).astype(np.int32)
        new, *found = grow(state, keys, np.int32(rung.ramp), tokens_BL)
        difference, largest = (float(np.max(each)) for each in found)
        ramp = rung.ramp if RECIPES[rung.recipe].ramps else 0
        figures: dict[str, Any] = {
            "step": rung.step,
            "from": before.n,
            "to": rung.n,
            "recipe": rung.recipe,
            "tau_ramp_steps": ramp,
        }
        for when, n, each in ("loss_before", before.n, state), ("loss_after", rung.n, new):
            figures[when] = float(np.mean(self.evaluate(n, each)))
        figures |= {"max_logit_difference": difference, "max_logit": largest}
        figures |= {"meant_lossless": RECIPES[rung.recipe].lossless}
        figures |= {"lossless": difference <= LOGIT_BOUND * max(largest, 1.0)}
        self.tree["growths"][trunk.name] = figures
        return new

    def run(self, run: Run) -> None:
        """Trains a run to its end and writes it, for each seed."""
        began, rungs = time.monotonic(), run.trunk.rungs
        state, curve = self.reach(run.trunk, run.trunk_steps)
        state, curve = self.advance(state, run.trunk, run.trunk_steps, run.steps, curve, decay=True)
        losses, flops, seeds = self.evaluate(rungs[-1].n, state, len(self.windows_PEB)), curve[-1][0], run.trunk.seeds
        tokens = run.steps * self.setting.batch * self.setting.context
        params = self.programs.num_params(rungs[-1].n)
        row: dict[str, Any] = {"lineage": run.lineage, "recipe": run.trunk.last.recipe, "budget": run.budget}
        row |= {"sizes": [rung.n for rung in rungs], "rates": [rung.rate for rung in rungs]}
        row |= {"grown_at_steps": [rung.step for rung in rungs[1:]], "steps": run.steps, "decay_steps": run.decay_steps}
        row |= {"cumulative_flops": flops, "flops_before_last_rung": run.before, "parameters": params, "tokens": tokens}
        row |= {"tokens_per_parameter": tokens / params, "epochs": run.steps * self.setting.batch / self.num_windows}
        for i, (name, seed) in enumerate(zip(run.names, seeds, strict=True)):
            loss = round(float(losses[i]), 5)
            points = [[spent, step, found[i], each[i]] for spent, step, found, each in curve]
            diverged = not math.isfinite(loss)
            row |= {"seed": seed, "curve": [*points, [flops, run.steps, None, loss]]}
            self.tree["runs"][name] = row | {"loss": None if diverged else loss}
        self.write()
        took, told = time.monotonic() - began, ", ".join(f"{loss:.4f}" for loss in losses)
        say(f"{run.lineage}, {run.budget:g}: {told} with {flops:.3g} FLOPs, {tokens / 1e6:.1f}M tokens; {took:.1f} s")
