"""Training of benchmarks/gpu_growth: trunks, decays and growth, from saved states where there are any."""

import hashlib
import json
import math
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_growth.plan import Run, Rung, Setting, Trunk
from benchmarks.gpu_growth.programs import Programs
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import replace_file
from tokenformer_jax.growth.recipes import RECIPES
from tokenformer_jax.growth.verify import LOGIT_BOUND
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.training.state import TrainState

Curve = list[list]  # rows (FLOPs of all rungs, step, training loss since the last row, validation loss)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


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
        self.orders: dict[int, np.ndarray] = {}
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

    def write(self, **new: Any) -> None:
        self.tree |= new
        replace_file(self.path, json.dumps(self.tree, indent=1) + "\n")

    def windows(self, seed: int, start: int) -> np.ndarray:
        """The windows of a chunk of steps [S, B]: none twice in a run, in an order that the seed decides."""
        if seed not in self.orders:
            self.orders[seed] = np.random.default_rng(seed).permutation(self.num_windows).astype(np.int32)
        first, shape = start * self.setting.batch, (self.setting.chunk, self.setting.batch)
        return self.orders[seed][first : first + math.prod(shape)].reshape(shape)

    def evaluate(self, n: int, state: TrainState, parts: int = 1) -> float:
        evaluate, tau = self.programs("evaluate", n), state.tau_now()
        losses = [evaluate(state.params, tau, self.validation_T, windows) for windows in self.windows_PEB[:parts]]
        return float(np.mean(jax.device_get(losses)))

    def birth(self, n: int, seed: int) -> TrainState:
        return self.programs("init", n)(jax.random.key(seed))

    def measure(self, n: int) -> float:
        """Seconds of a step with its share of an evaluation: the fastest of several short trainings."""
        trunk, steps, times = Trunk(0, (Rung(0, n, 1e-3),)), self.setting.evaluate_every, []
        for _ in range(4):
            state, began = self.birth(n, 0), time.monotonic()
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
            rates = rung.rate * np.minimum(1, (steps + 1) / setting.warmup)
            rates *= 1 - (steps - start) / (end - start) if decay else 1
            windows = self.windows(trunk.seed, step)
            state, losses_S = train(state, self.train_T, windows, rates.astype(np.float32))
            losses.append(np.mean(jax.device_get(losses_S)))
            if (done - start) % setting.evaluate_every == 0 or done == end:
                flops = spent + (done - start) * setting.flops(rung.n)
                found = float(np.mean(losses)), self.evaluate(rung.n, state)
                curve, losses = [*curve, [flops, done, *(round(loss, 5) for loss in found)]], []
        return state, curve

    def reach(self, trunk: Trunk, step: int) -> tuple[TrainState, Curve]:
        """A trunk's state at a step, before that step's growth, and the curve to it; both are kept."""
        part, trunks = trunk.up_to(step), self.tree["trunks"]
        name, rung = f"{part.name} to {step}", part.last
        path = self.workdir / "states" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
        if name not in self.memory and name in trunks and path.exists():
            with np.load(path) as saved:
                leaves = [jax.device_put(saved[f"leaf{i}"]) for i in range(len(saved.files))]
            self.memory[name] = jax.tree.unflatten(jax.tree.structure(self.programs.state(rung.n)), leaves)
        if name in self.memory:
            return self.memory[name], trunks[name]

        start = max((mark for mark in self.marks[part] if mark < step), default=rung.step)
        state, curve = self.reach(trunk, start) if start else (self.birth(rung.n, trunk.seed), [])
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
        key = jax.random.fold_in(jax.random.key(trunk.seed), rung.step)
        shape = 4, min(64, self.setting.context)
        tokens_BL = np.asarray(self.validation_T[: math.prod(shape)]).reshape(shape).astype(np.int32)
        new, *found = grow(state, key, np.int32(rung.ramp), tokens_BL)
        difference, largest = map(float, found)
        ramp = rung.ramp if RECIPES[rung.recipe].ramps else 0
        figures = {"step": rung.step, "from": before.n, "to": rung.n, "recipe": rung.recipe, "tau_ramp_steps": ramp}
        figures |= {"loss_before": self.evaluate(before.n, state), "loss_after": self.evaluate(rung.n, new)}
        figures |= {"max_logit_difference": difference, "max_logit": largest}
        figures |= {"meant_lossless": RECIPES[rung.recipe].lossless}
        figures |= {"lossless": difference <= LOGIT_BOUND * max(largest, 1.0)}
        self.tree["growths"][trunk.name] = figures
        return new

    def run(self, run: Run) -> None:
        """Trains a run to its end and writes it."""
        began, rungs = time.monotonic(), run.trunk.rungs
        state, curve = self.reach(run.trunk, run.trunk_steps)
        state, curve = self.advance(state, run.trunk, run.trunk_steps, run.steps, curve, decay=True)
        loss, flops = self.evaluate(rungs[-1].n, state, len(self.windows_PEB)), curve[-1][0]
        tokens, params = run.steps * self.setting.batch * self.setting.context, count_params(state.params)
        row = {"lineage": run.lineage, "recipe": run.trunk.last.recipe, "seed": run.trunk.seed, "budget": run.budget}
        row |= {"sizes": [rung.n for rung in rungs], "rates": [rung.rate for rung in rungs]}
        row |= {"grown_at_steps": [rung.step for rung in rungs[1:]], "steps": run.steps, "decay_steps": run.decay_steps}
        row |= {"cumulative_flops": flops, "flops_before_last_rung": run.before, "parameters": params, "tokens": tokens}
        row |= {"tokens_per_parameter": tokens / params, "curve": [*curve, [flops, run.steps, None, round(loss, 5)]]}
        self.tree["runs"][run.name] = row | {"loss": round(loss, 5) if math.isfinite(loss) else None}  # None: diverged
        self.write()
        took = time.monotonic() - began
        say(f"{run.name}: {loss:.4f} with {flops:.3g} FLOPs, {tokens / 1e6:.1f}M tokens; {took:.1f} s")
