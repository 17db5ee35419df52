"""Growth that pays, counted from the first step, on one GPU: ladders against every size from scratch, on fresh data.

python -m benchmarks.gpu_growth --workdir=runs/gpu_growth [--minutes=5] [--size=full|tiny] [--out=docs/gpu_growth.json]

Three sizes of one TokenFormer, n = 16, 64, 256 parameter tokens (4 n in the feed-forward), train on text that the
machine has installed (`gpu_growth_data`), each token read once in a run. The learning rate warms up, stays, and falls
to zero in the last 20 % of a budget. Every budget branches off one trunk at the constant rate, so a trunk gives the
loss at several budgets, and ladders grow on the trunk: they begin as the smaller model that another run trains anyway.
The model FLOPs of all rungs count (`language.train_flops_per_token`), but those of the search for learning rates, which
the sizes get alike.

The budget is chosen so that the first --fit of LINEAGES end in the given minutes, preparation included; what follows
them runs while there is time. Each finished run is written at once, and not run again: the same command goes on from
the trunks that it saved. Leaves the JSON and a plot beside it, and prints a table last.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import pathlib
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx

from benchmarks.growth_report import Frontier
from configs import base
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.data.batches import Batch
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import replace_file
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.recipes import RECIPES
from tokenformer_jax.growth.verify import LOGIT_BOUND
from tokenformer_jax.nn import attention, row_kernels
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.training.language import train_flops_per_token
from tokenformer_jax.training.schedule import make_optimizer
from tokenformer_jax.training.state import TauRamp, TrainState, new_state

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DECAY = 0.2  # of a budget
RAMP = 0.25  # of a rung, up to its first budget: where zero_keys' τ goes to its target
SMALLER = 0.2  # of what a ladder of three sizes spends before its last rung: spent on the smallest
AS_GOOD = 0.01  # nats a token
SEARCH_SHARE = 0.2  # of the time left, at most, for the search for learning rates


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of everything."""

    tokens: tuple[int, int, int]  # n of the small, the middle and the large model
    rates: tuple[float, float, float]  # their peak learning rates where none is searched
    tried_rates: tuple[float, ...]
    width: int
    layers: int
    heads: int
    context: int
    vocabulary: int
    dtype: str
    batch: int  # windows a step
    chunk: int  # steps a dispatch
    warmup: int  # steps
    search: int  # steps of a run that tries a rate
    evaluate_every: int  # chunks
    evaluated: int  # batches of an evaluation
    last_evaluations: int  # so many times as many batches at the end of a run, if there is as much text
    max_tokens: int
    held_out: int  # one file of so many is for validation
    data_seconds: float
    large_steps: int | None = None  # the whole budget in steps of the large model; None: what fits the time

    def config(self, n: int) -> Config:
        tree = base.get_config()
        tree.batch_size = self.batch
        tree.model.update(vocab_size=self.vocabulary, context_length=self.context, num_layers=self.layers)
        tree.model.update(num_heads=self.heads, embed_dim=self.width, dtype=self.dtype)
        tree.model.update(qkv_tokens=n, out_tokens=n, ffn_tokens=4 * n)
        return read_config(tree.to_dict())

    def flops(self, n: int) -> float:
        """Training FLOPs of a step."""
        return train_flops_per_token(self.config(n).model) * self.batch * self.context

    @property
    def window_tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.context


SETTINGS = {
    "full": Setting(
        tokens=(16, 64, 256),
        rates=(2e-3, 2e-3, 1e-3),
        tried_rates=(1e-3, 2e-3, 4e-3),
        width=256,
        layers=6,
        heads=4,
        context=256,
        vocabulary=8192,
        dtype="bfloat16",
        batch=64,
        chunk=25,
        warmup=200,
        search=500,
        evaluate_every=4,
        evaluated=16,
        last_evaluations=8,
        max_tokens=250_000_000,
        held_out=100,
        data_seconds=75,
    ),
    "tiny": Setting(
        tokens=(4, 8, 16),
        rates=(1e-2, 1e-2, 1e-2),
        tried_rates=(5e-3, 1e-2),
        width=16,
        layers=2,
        heads=2,
        context=16,
        vocabulary=300,
        dtype="float32",
        batch=8,
        chunk=5,
        warmup=5,
        search=10,
        evaluate_every=2,
        evaluated=8,
        last_evaluations=2,
        max_tokens=60_000,
        held_out=5,
        data_seconds=60,
        large_steps=100,
    ),
}


# What is run.


class Rung(NamedTuple):
    """A size, from a step of its lineage on."""

    step: int
    n: int
    rate: float
    recipe: str = ""  # how it grew; empty at birth
    ramp: int = 0  # steps in which τ goes to its target


class Trunk(NamedTuple):
    """Training at constant rates. Two lineages that have grown alike so far share it."""

    seed: int
    rungs: tuple[Rung, ...]

    @property
    def name(self) -> str:
        parts = [f"{r.recipe}{r.ramp}-n{r.n}-{r.rate:g}-at{r.step}" for r in self.rungs]
        return f"seed{self.seed}-" + "-".join(parts)

    def up_to(self, step: int) -> "Trunk":
        """The part that leads to the state at a step, before that step's growth."""
        return Trunk(self.seed, tuple(rung for rung in self.rungs if rung.step < step or rung.step == 0))


class Run(NamedTuple):
    """A trunk up to a step, then the decay."""

    lineage: str
    trunk: Trunk
    budget: float  # part of the whole one
    trunk_steps: int
    decay_steps: int
    flops: float
    before: float  # FLOPs before the last rung

    @property
    def name(self) -> str:
        return f"{self.lineage}, seed {self.trunk.seed}, {self.budget:g}"

    @property
    def steps(self) -> int:
        return self.trunk_steps + self.decay_steps


class Lineage(NamedTuple):
    """Runs of several budgets off one trunk; the first of `sizes` is born, the others grow."""

    name: str
    sizes: tuple[int, ...]  # 0 small, 1 middle, 2 large
    small: float  # part of the whole budget that is spent before the last rung
    budgets: tuple[float, ...]
    recipe: str = "zero_keys"
    seed: int = 0


FROM_SCRATCH = (0.25, 0.5, 0.75, 1.0)
GROWN = (0.5, 0.75, 1.0)
LINEAGES = (  # the most valuable first
    Lineage("large", (2,), 0, FROM_SCRATCH),
    Lineage("middle", (1,), 0, FROM_SCRATCH),
    Lineage("ladder, 25 % small", (0, 1, 2), 0.25, GROWN),
    Lineage("middle to large, 25 % small", (1, 2), 0.25, GROWN),
    Lineage("small", (0,), 0, (0.25, 0.5)),
    Lineage("ladder, 12.5 % small", (0, 1, 2), 0.125, FROM_SCRATCH),
    Lineage("ladder, 25 % small, random keys", (0, 1, 2), 0.25, GROWN, "random_keys"),
    Lineage("large", (2,), 0, FROM_SCRATCH, seed=1),
    Lineage("ladder, 25 % small", (0, 1, 2), 0.25, GROWN, seed=1),
    Lineage("middle", (1,), 0, FROM_SCRATCH, seed=1),
    Lineage("ladder, 50 % small", (0, 1, 2), 0.5, (0.75, 1.0)),
    Lineage("ladder, 25 % small, isometric", (0, 1, 2), 0.25, GROWN, "isometric"),
)


def runs_of(lineage: Lineage, setting: Setting, whole: float, rates: dict[int, float]) -> list[Run]:
    """The runs of a lineage where the whole budget has so many FLOPs, in whole chunks of steps."""
    sizes = [setting.tokens[size] for size in lineage.sizes]

    def steps(flops: float, n: int) -> int:
        return max(1, round(flops / setting.flops(n) / setting.chunk)) * setting.chunk

    shares = {1: [], 2: [1.0], 3: [SMALLER, 1.0]}[len(sizes)]
    rungs, spent = [Rung(0, sizes[0], rates[sizes[0]])], 0.0
    for number, share in enumerate(shares):
        before, n = sizes[number : number + 2]
        count = steps(share * lineage.small * whole - spent, before)
        spent += count * setting.flops(before)
        end = shares[number + 1] * lineage.small if number + 1 < len(shares) else lineage.budgets[0]
        ramp = max(1, round(RAMP * steps(end * whole - spent, n)))
        rungs.append(Rung(rungs[-1].step + count, n, rates[n], lineage.recipe, ramp))
    runs, n = [], sizes[-1]
    for budget in lineage.budgets:
        total, decay = steps(budget * whole - spent, n), steps(DECAY * budget * whole, n)
        trunk_steps = rungs[-1].step + max(total - decay, setting.chunk)
        flops = spent + (trunk_steps + decay - rungs[-1].step) * setting.flops(n)
        runs.append(Run(lineage.name, Trunk(lineage.seed, tuple(rungs)), budget, trunk_steps, decay, flops, spent))
    return runs


def pieces(trunk: Trunk, start: int, end: int) -> Iterator[tuple[Rung, int, int]]:
    """The rungs between two steps, with the steps that each takes of them."""
    ends = [rung.step for rung in trunk.rungs[1:]] + [end]
    for rung, last in zip(trunk.rungs, ends, strict=True):
        if max(rung.step, start) < min(last, end):
            yield rung, max(rung.step, start), min(last, end)


def work(runs: list[Run]) -> dict[int, int]:
    """Steps of each size that these runs take together, with what they share taken once."""
    steps: dict[int, int] = {}
    covered: dict[Trunk, int] = {}  # up to which step a trunk is trained
    for run in runs:
        for rung, start, end in pieces(run.trunk, 0, run.trunk_steps):
            trunk = run.trunk.up_to(end)
            start = max(start, covered.get(trunk, 0))
            steps[rung.n] = steps.get(rung.n, 0) + max(0, end - start)
            covered[trunk] = max(end, start)
        last = run.trunk.rungs[-1].n
        steps[last] = steps.get(last, 0) + run.decay_steps
    return steps


def seconds(runs: list[Run], step_seconds: dict[int, float]) -> float:
    return sum(count * step_seconds[n] for n, count in work(runs).items())


# What is compiled.


class Programs:
    """Compiles what is needed in the background, while the data are prepared."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.pool = concurrent.futures.ThreadPoolExecutor(4)
        self.futures: dict[tuple, concurrent.futures.Future] = {}
        self.seconds: dict[str, float] = {}

    def start(self, *key: Any) -> None:
        if key not in self.futures:
            self.futures[key] = self.pool.submit(self._compile, key)

    def __call__(self, *key: Any) -> Callable:
        self.start(*key)
        return self.futures[key].result()

    def _compile(self, key: tuple) -> Callable:
        began = time.monotonic()
        function, arguments = getattr(self, key[0])(*key[1:])
        compiled = jax.jit(function).lower(*arguments).compile()
        self.seconds[" ".join(map(str, key))] = round(time.monotonic() - began, 2)
        return compiled

    def state(self, n: int) -> TrainState:
        return jax.eval_shape(self.init(n)[0], jax.eval_shape(lambda: jax.random.key(0)))

    def init(self, n: int) -> tuple[Callable, list]:
        cfg = self.setting.config(n)
        optimizer = make_optimizer(cfg.optimizer, lambda _: 0.0)

        def init(rng: jax.Array) -> TrainState:
            params = init_params(cfg.model, rng)
            return new_state(params, optimizer.init(params), initial_tau(cfg.model))

        return init, [jax.eval_shape(lambda: jax.random.key(0))]

    def train(self, n: int) -> tuple[Callable, list]:
        """A chunk of steps, each as `step.make_step` has it, but at a rate that is given."""
        cfg, setting = self.setting.config(n), self.setting
        graphdef, _, _ = abstract_model(cfg.model)

        def step(tokens_T: jax.Array, state: TrainState, inputs: tuple[jax.Array, jax.Array]) -> tuple[TrainState, Any]:
            windows_B, rate = inputs
            batch = read_batch(tokens_T, windows_B, setting.context)

            def mean_loss(params: Any) -> jax.Array:
                nll, weights = nnx.merge(graphdef, params).loss_sums(batch, state.tau_now(), cfg)
                return nll / weights

            loss, grads = jax.value_and_grad(mean_loss)(state.params)
            norm = optax.global_norm(grads)
            scale = cfg.optimizer.clip_norm / jnp.maximum(norm, cfg.optimizer.clip_norm)
            optimizer = make_optimizer(cfg.optimizer, lambda _: rate)
            updates, opt_state = optimizer.update(
                jax.tree.map(lambda g: g * scale, grads), state.opt_state, state.params
            )
            params = optax.apply_updates(state.params, updates)
            return TrainState(state.step + 1, params, opt_state, state.tau), loss

        def train(state: TrainState, tokens_T: jax.Array, windows_SB: jax.Array, rates_S: jax.Array) -> Any:
            return jax.lax.scan(functools.partial(step, tokens_T), state, (windows_SB, rates_S))

        windows = jax.ShapeDtypeStruct((setting.chunk, setting.batch), jnp.int32)
        rates = jax.ShapeDtypeStruct((setting.chunk,), jnp.float32)
        return train, [self.state(n), self.tokens(), windows, rates]

    def evaluate(self, n: int) -> tuple[Callable, list]:
        """The mean loss over windows, nats a token."""
        cfg, setting = self.setting.config(n), self.setting
        graphdef, _, _ = abstract_model(cfg.model)

        def evaluate(params: Any, tau: Any, tokens_T: jax.Array, windows_EB: jax.Array) -> jax.Array:
            def add(total: jax.Array, windows_B: jax.Array) -> tuple[jax.Array, None]:
                batch = read_batch(tokens_T, windows_B, setting.context)
                nll, weights = nnx.merge(graphdef, params).loss_sums(batch, tau, cfg)
                return total + nll / weights, None

            return jax.lax.scan(add, jnp.float32(0), windows_EB)[0] / len(windows_EB)

        state = self.state(n)
        windows = jax.ShapeDtypeStruct((setting.evaluated, setting.batch), jnp.int32)
        return evaluate, [state.params, jax.eval_shape(TrainState.tau_now, state), self.tokens(), windows]

    def grow(self, before: int, n: int, recipe: str) -> tuple[Callable, list]:
        """τ's ramp ends a step after growth; `ramped` moves that."""
        model, abstract = self.setting.config(n).model, self.state(n)

        def grow(state: TrainState, rng: jax.Array) -> TrainState:
            return grow_state(state, abstract, model, rng, recipe, ramp_steps=1)

        return grow, [self.state(before), jax.eval_shape(lambda: jax.random.key(0))]

    def compare(self, before: int, n: int) -> tuple[Callable, list]:
        """The largest difference of two models' logits, and the largest logit; float32 at the highest precision."""

        def logits(n: int, state: TrainState, tokens_BL: jax.Array) -> jax.Array:
            model = dataclasses.replace(self.setting.config(n).model, dtype="float32")
            return nnx.merge(abstract_model(model)[0], state.params)(tokens_BL, state.tau_now())[0]

        def compare(old: TrainState, new: TrainState, tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.default_matmul_precision("highest"):
                old_BLV, new_BLV = logits(before, old, tokens_BL), logits(n, new, tokens_BL)
            return jnp.max(jnp.abs(new_BLV - old_BLV)), jnp.max(jnp.abs(old_BLV))

        shape = jax.ShapeDtypeStruct((4, min(64, self.setting.context)), jnp.int32)
        return compare, [self.state(before), self.state(n), shape]

    def tokens(self) -> jax.ShapeDtypeStruct:
        """Of either split: an array of one length, so that programs are compiled before the data are there."""
        return jax.ShapeDtypeStruct((self.setting.max_tokens,), jnp.uint16)


def read_batch(tokens_T: jax.Array, windows_B: jax.Array, length: int) -> Batch:
    """Windows by their number, as `data` has them: L + 1 ids from number · L on."""
    ids = tokens_T[windows_B[:, None] * length + jnp.arange(length + 1)].astype(jnp.int32)
    ones = jnp.ones((len(windows_B), length))
    arrays: Any = ids[:, :-1], ids[:, 1:], ones, ones.astype(jnp.int32)
    return Batch(*arrays)


def ramped(state: TrainState, before: TrainState, steps: int) -> TrainState:
    """The grown state with τ's ramps as long as said, where they are new."""

    def longer(name: str, ramp: TauRamp) -> TauRamp:
        grew = state.params["blocks"][name]["keys"].shape != before.params["blocks"][name]["keys"].shape
        return ramp._replace(end=ramp.begin + jnp.int32(steps)) if grew else ramp

    return state._replace(tau={name: longer(name, ramp) for name, ramp in state.tau.items()})


def choose_kernels(setting: Setting, plain: bool) -> str:
    """Which kernels the device computes with: the package's choice, or what is left of it where that does not work.

    Args:
      setting: sizes.
      plain: whether to do without the package's own kernels from the start.
    """

    def failure() -> str:
        """What goes wrong in a chunk of steps of any size, with one layer."""
        programs = Programs(dataclasses.replace(setting, layers=1))
        windows = np.zeros((setting.chunk, setting.batch), np.int32)
        rates = np.zeros(setting.chunk, np.float32)
        tokens_T = jnp.zeros(setting.max_tokens, jnp.uint16)
        try:
            for part, n in itertools.product(("train", "init"), setting.tokens):
                programs.start(part, n)
            for n in setting.tokens:
                state = programs("init", n)(jax.random.key(0))
                _, losses_S = programs("train", n)(state, tokens_T, windows, rates)
                if not np.all(np.isfinite(jax.device_get(losses_S))):
                    return f"the loss of n = {n} is not finite"
            return ""
        except Exception as error:  # whatever a library raises: the study can do without it
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        finally:
            programs.pool.shutdown(cancel_futures=True)

    def without_kernels() -> None:
        row_kernels.apply = lambda: False

    def without_cudnn() -> None:
        attention.attention_kernel = lambda *_: "blockwise"  # type: ignore

    if plain:
        without_kernels()
    if jax.default_backend() == "cpu":
        return "none: a CPU"
    error = failure()
    if not error:
        return "plain" if plain else "the package's"
    say(f"without the package's kernels, since {error}")
    without_kernels()
    second = failure()
    if second:
        say(f"without cuDNN's attention, since {second}")
        without_cudnn()
    return f"{'without cuDNN' if second else 'plain'}, since {error}"


# Running it.


class OutOfTime(Exception):
    pass


class Results:
    """The JSON, written at every change; both in the workdir, to go on from, and at --out."""

    def __init__(self, workdir: pathlib.Path, out: pathlib.Path, identity: dict[str, Any]):
        self.paths = [workdir / "gpu_growth.json", out]
        empty = {"identity": identity, "trunks": {}, "decays": {}, "growths": {}, "searches": {}, "runs": {}}
        self.tree: dict[str, Any] = empty
        if self.paths[0].exists():
            self.tree = json.loads(self.paths[0].read_text())
            if self.tree["identity"] != json.loads(json.dumps(identity)):
                raise UserError(f"--workdir={workdir}: holds runs with other data or sizes; use a new directory")

    def write(self, **new: Any) -> None:
        self.tree |= new
        for path in self.paths:
            replace_file(path, json.dumps(self.tree, indent=1) + "\n")


class Trainer:
    """Trains trunks and decays, remembers the states that others begin from, and writes what it finds."""

    def __init__(
        self,
        setting: Setting,
        programs: Programs,
        results: Results,
        workdir: pathlib.Path,
        train: np.ndarray,
        validation: np.ndarray,
        deadline: float,
    ):
        self.setting, self.programs, self.results, self.deadline = setting, programs, results, deadline
        self.states = workdir / "states"
        self.states.mkdir(parents=True, exist_ok=True)
        self.memory: dict[str, TrainState] = {}
        self.train_T, self.validation_T = (self._on_device(ids) for ids in (train, validation))
        self.num_windows = (len(train) - 1) // setting.context
        self.windows_EB = self._validation_windows(len(validation))
        self.timed: dict[int, list[float]] = {}  # n -> seconds a step, in each chunk

    def _on_device(self, ids: np.ndarray) -> jax.Array:
        padded = np.zeros(self.setting.max_tokens, np.uint16)
        padded[: len(ids)] = ids
        return jax.device_put(padded)

    def _validation_windows(self, num_tokens: int) -> list[np.ndarray]:
        """Windows spread over the split, for as many evaluations as a run's end has, or as there is text for."""
        setting, count = self.setting, (num_tokens - 1) // self.setting.context
        one = setting.evaluated * setting.batch
        if count < one:
            raise UserError(f"only {num_tokens:,} tokens of validation: it takes {one * setting.context + 1:,}")
        parts = min(setting.last_evaluations, count // one)
        chosen = (np.arange(parts * one) * count // (parts * one)).astype(np.int32)
        return [chosen[i::parts].reshape(setting.evaluated, setting.batch) for i in range(parts)]

    @functools.lru_cache(maxsize=4)  # noqa: B019  # one trainer lives as long as its process
    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(self.num_windows).astype(np.int32)

    def windows(self, seed: int, start: int) -> np.ndarray:
        """The windows of a chunk of steps [S, B]: each once an epoch, in an order that the seed decides."""
        numbers = start * self.setting.batch + np.arange(self.setting.chunk * self.setting.batch)
        epochs, places = np.divmod(numbers, self.num_windows)
        found = np.empty_like(numbers, np.int32)
        for epoch in np.unique(epochs):
            found[epochs == epoch] = self.order(seed, int(epoch))[places[epochs == epoch]]
        return found.reshape(self.setting.chunk, self.setting.batch)

    def evaluate(self, n: int, state: TrainState, parts: int = 1) -> float:
        evaluate = self.programs("evaluate", n)
        chosen = self.windows_EB[:parts]
        losses = [evaluate(state.params, state.tau_now(), self.validation_T, windows) for windows in chosen]
        return float(np.mean(jax.device_get(losses)))

    def measure(self, n: int) -> float:
        """Seconds of a step."""
        train, state = self.programs("train", n), self.programs("init", n)(jax.random.key(0))
        rates = np.zeros(self.setting.chunk, np.float32)
        for _ in range(2):  # the first warms up
            began = time.monotonic()
            jax.block_until_ready(train(state, self.train_T, self.windows(0, 0), rates))
        return (time.monotonic() - began) / self.setting.chunk

    def advance(
        self, state: TrainState, n: int, seed: int, start: int, end: int, rate: Callable[[np.ndarray], np.ndarray]
    ) -> tuple[TrainState, list]:
        """Trains from step to step; the state, and rows (step, training loss, validation loss) of its curve."""
        train, chunk, curve, losses = self.programs("train", n), self.setting.chunk, [], []
        for number, step in enumerate(range(start, end, chunk), 1):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            began = time.monotonic()
            rates = rate(np.arange(step, step + chunk)).astype(np.float32)
            state, losses_S = train(state, self.train_T, self.windows(seed, step), rates)
            losses.append(np.mean(jax.device_get(losses_S)))
            self.timed.setdefault(n, []).append((time.monotonic() - began) / chunk)
            if number % self.setting.evaluate_every == 0 or step + chunk == end:
                row = step + chunk, float(np.mean(losses)), self.evaluate(n, state)
                curve.append([row[0], *(round(loss, 5) for loss in row[1:])])
                losses = []
        return state, curve

    def warm(self, rate: float, steps: np.ndarray) -> np.ndarray:
        return rate * np.minimum(1, (steps + 1) / self.setting.warmup)

    def decay(self, rate: float, start: int, count: int, steps: np.ndarray) -> np.ndarray:
        return self.warm(rate, steps) * (1 - np.maximum(0, steps - start) / count)

    def birth(self, n: int, seed: int) -> TrainState:
        return self.programs("init", n)(jax.random.key(seed))

    def search(self, n: int) -> float:
        """The best peak rate for short runs; the lowest of several that are as good, since longer runs want lower ones.

        Where the best lies at the end of what was tried, one more is.
        """
        found, setting = self.results.tree["searches"].setdefault(str(n), {}), self.setting
        decay = max(1, round(DECAY * setting.search / setting.chunk)) * setting.chunk

        def attempt(rate: float) -> float:
            if f"{rate:g}" not in found:
                schedule = functools.partial(self.decay, rate, setting.search - decay, decay)
                _, curve = self.advance(self.birth(n, 0), n, 0, 0, setting.search, schedule)
                found[f"{rate:g}"] = curve[-1][-1]
                self.results.write()
                say(f"n = {n}: peak rate {rate:g} gives {curve[-1][-1]:.4f} after {setting.search} steps")
            return found[f"{rate:g}"] if math.isfinite(found[f"{rate:g}"]) else math.inf

        losses = {rate: attempt(rate) for rate in setting.tried_rates}
        best = min(losses, key=lambda rate: losses[rate])
        for end, further in ((min(losses), best / 2), (max(losses), best * 2)):
            if best == end:
                losses[further] = attempt(further)
                break
        return min(rate for rate, loss in losses.items() if loss <= min(losses.values()) + AS_GOOD)

    def key(self, trunk: Trunk, step: int) -> str:
        return f"{trunk.up_to(step).name}-to{step}"

    def load(self, trunk: Trunk, step: int) -> TrainState | None:
        """A trunk's state at a step, before that step's growth, if it was saved; of step 0 none is."""
        name = self.key(trunk, step)
        path = self.path(name)
        if name not in self.memory and path.exists() and name in self.results.tree["trunks"]:
            abstract = self.programs.state(trunk.up_to(step).rungs[-1].n)
            with np.load(path) as saved:
                leaves = [jax.device_put(saved[f"leaf{i}"]) for i in range(len(saved.files))]
            self.memory[name] = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return self.memory.get(name)

    def path(self, name: str) -> pathlib.Path:
        return self.states / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"

    def save(self, trunk: Trunk, step: int, state: TrainState, curve: list) -> None:
        name = self.key(trunk, step)
        self.memory[name] = state
        leaves = jax.device_get(jax.tree.leaves(state))
        partial = self.path(name).with_suffix(".partial.npz")
        np.savez(partial, **{f"leaf{i}": leaf for i, leaf in enumerate(leaves)})
        partial.replace(self.path(name))
        self.results.tree["trunks"][name] = curve
        self.results.write()

    def trunk(self, trunk: Trunk, end: int, marks: dict[Trunk, set[int]]) -> tuple[TrainState, list[list]]:
        """The state at a step, from the last one saved on the way, and the curve to it; saves states at the marks."""
        stops = self.stops(trunk, end, marks)
        start = self.reached(trunk, end, marks)
        state = self.load(trunk, start)
        curves = [self.results.tree["trunks"].get(self.key(trunk, step), []) for step in stops if step <= start]
        for step in (stop for stop in stops if stop > start):
            rungs = trunk.up_to(step).rungs
            if state is None:
                state = self.birth(rungs[0].n, trunk.seed)
            if start == rungs[-1].step and len(rungs) > 1:
                state = self.grow(trunk.up_to(step), state)
            rate = functools.partial(self.warm, rungs[-1].rate)
            state, curve = self.advance(state, rungs[-1].n, trunk.seed, start, step, rate)
            self.save(trunk, step, state, curve)
            curves.append(curve)
            start = step
        assert state is not None
        return state, [row for curve in curves for row in curve]

    def stops(self, trunk: Trunk, end: int, marks: dict[Trunk, set[int]]) -> list[int]:
        """The marks on the way to a step."""
        return [
            step
            for rung, _, last in pieces(trunk, 0, end)
            for step in sorted(marks[trunk.up_to(rung.step + 1)])
            if step <= last
        ]

    def reached(self, trunk: Trunk, end: int, marks: dict[Trunk, set[int]]) -> int:
        """The last step up to `end` whose state is saved; 0 where none is."""
        return max((step for step in self.stops(trunk, end, marks) if self.load(trunk, step) is not None), default=0)

    def expected(self, run: Run, marks: dict[Trunk, set[int]], step_seconds: dict[int, float]) -> float:
        """Seconds that a run takes from what is saved."""
        start = self.reached(run.trunk, run.trunk_steps, marks)
        return sum((end - begin) * step_seconds[rung.n] for rung, begin, end in pieces(run.trunk, start, run.steps))

    def grow(self, trunk: Trunk, state: TrainState) -> TrainState:
        """Grows to the trunk's last rung, and writes what that changed."""
        (_, before, *_), rung = trunk.rungs[-2:]
        rng = jax.random.fold_in(jax.random.key(trunk.seed), rung.step)
        new = self.programs("grow", before, rung.n, rung.recipe)(state, rng)
        new = ramped(new, state, rung.ramp)
        compare = self.programs("compare", before, rung.n)
        shape = 4, min(64, self.setting.context)
        tokens_BL = np.asarray(self.validation_T[: math.prod(shape)]).reshape(shape).astype(np.int32)
        difference, largest = map(float, compare(state, new, tokens_BL))
        figures = {
            "step": rung.step,
            "from": before,
            "to": rung.n,
            "recipe": rung.recipe,
            "tau_ramp_steps": rung.ramp if RECIPES[rung.recipe].ramps else 0,
            "loss_before": self.evaluate(before, state),
            "loss_after": self.evaluate(rung.n, new),
            "max_logit_difference": difference,
            "max_logit": largest,
            "meant_lossless": RECIPES[rung.recipe].lossless,
            "lossless": difference <= LOGIT_BOUND * max(largest, 1.0),
        }
        self.results.tree["growths"][trunk.name] = figures
        say(
            f"grew {before} -> {rung.n} ({rung.recipe}): loss {figures['loss_before']:.4f} -> "
            f"{figures['loss_after']:.4f}, logits of {largest:.3g} moved by {difference:.2g}"
        )
        return new

    def run(self, run: Run, marks: dict[Trunk, set[int]]) -> None:
        """Trains a run to its end and writes it."""
        began, rung = time.monotonic(), run.trunk.rungs[-1]
        state, curve = self.trunk(run.trunk, run.trunk_steps, marks)
        rate = functools.partial(self.decay, rung.rate, run.trunk_steps, run.decay_steps)
        state, decayed = self.advance(state, rung.n, run.trunk.seed, run.trunk_steps, run.steps, rate)
        loss = self.evaluate(rung.n, state, len(self.windows_EB))
        if not math.isfinite(loss):
            say(f"{run.name}: diverged")
        tokens, params = run.steps * self.setting.window_tokens, count_params(state.params)
        self.results.tree["runs"][run.name] = {
            "lineage": run.lineage,
            "sizes": [rung.n for rung in run.trunk.rungs],
            "grown_at_steps": [rung.step for rung in run.trunk.rungs[1:]],
            "rates": [rung.rate for rung in run.trunk.rungs],
            "recipe": rung.recipe,
            "seed": run.trunk.seed,
            "budget": run.budget,
            "steps": run.steps,
            "decay_steps": run.decay_steps,
            "cumulative_flops": run.flops,
            "flops_before_last_rung": run.before,
            "parameters": params,
            "tokens": tokens,
            "tokens_per_parameter": tokens / params,
            "epochs": run.steps * self.setting.batch / self.num_windows,
            "loss": round(loss, 5) if math.isfinite(loss) else None,
            "growths": [
                self.results.tree["growths"].get(run.trunk.up_to(rung.step + 1).name) for rung in run.trunk.rungs[1:]
            ],
            "curve": [  # cumulative FLOPs, step, training loss since the last row, validation loss
                [flops_at(run.trunk, row[0], self.setting), *row]
                for row in [*curve, *decayed, [run.steps, None, round(loss, 5)]]
            ],
        }
        self.results.write()
        say(
            f"{run.name}: {loss:.4f} with {run.flops:.3g} FLOPs, {tokens / 1e6:.1f}M tokens; "
            f"{time.monotonic() - began:.1f} s"
        )


def versions() -> dict[str, Any]:
    try:
        return environment()
    except importlib.metadata.PackageNotFoundError as error:  # no reason to measure nothing
        return {"device_kind": jax.devices()[0].device_kind, "jax": jax.__version__, "missing": str(error)}


def flops_at(trunk: Trunk, step: int, setting: Setting) -> float:
    return sum((end - start) * setting.flops(rung.n) for rung, start, end in pieces(trunk, 0, step))


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


# The plan.


def plan(
    setting: Setting,
    lineages: tuple[Lineage, ...],
    fit: int,
    rates: dict[int, float],
    step_seconds: dict[int, float],
    left: float,
    limit: float,
) -> tuple[float, str]:
    """FLOPs of the whole budget, and what decided them.

    Args:
      setting: sizes.
      lineages: what shall run.
      fit: how many of them must end in time.
      rates: learning rates.
      step_seconds: of each size, with its share of the evaluations.
      left: seconds.
      limit: steps that no run may exceed, since the data end.
    """

    def made(whole: float) -> list[list[Run]]:
        return [runs_of(lineage, setting, whole, rates) for lineage in lineages]

    def steps(whole: float) -> float:
        return max(run.steps for runs in made(whole) for run in runs)

    if setting.large_steps:
        return setting.large_steps * setting.flops(setting.tokens[-1]), "setting"
    guess = 1e5 * setting.flops(setting.tokens[-1])  # so long that whole chunks don't matter
    whole = guess * left / seconds([run for runs in made(guess)[:fit] for run in runs], step_seconds)
    if steps(whole) > limit:
        return whole * limit / steps(whole), "data"
    return whole, "time"


# The report.


def frontiers(runs: list[dict[str, Any]], seed: int) -> dict[int, Frontier]:
    """What each size reaches from scratch, where at least two budgets are known."""
    found: dict[int, list] = {}
    for run in runs:
        if len(run["sizes"]) == 1 and run["seed"] == seed and run["loss"] is not None:
            found.setdefault(run["sizes"][0], []).append(run)
    return {n: Frontier(each) for n, each in found.items() if len(each) > 1}


def ratio(run: dict[str, Any], lines: list[Frontier]) -> dict[str, Any] | None:
    """A run's cost over what the cheapest of these sizes pays from scratch for its loss.

    `bound` is ">" where that size's first budget already reached a lower loss, so that the ratio is higher than said.
    It is "<" where no size reached so low a loss on any budget: then the largest budget stands for its cost.
    """
    if not lines or run["loss"] is None:
        return None
    costs = {line.cost_of(run["loss"]): line.bound(run["loss"]) for line in lines}
    cost = min((cost for cost, bound in costs.items() if bound != "<"), default=max(costs))
    return {"ratio": run["cumulative_flops"] / cost, "bound": costs[cost], "reached": costs[cost] != "<"}


def summarise(runs: list[dict[str, Any]], sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        lines = frontiers(runs, run["seed"])
        kept = "lineage sizes seed budget cumulative_flops parameters tokens tokens_per_parameter epochs loss".split()
        row = {key: run[key] for key in kept}
        row["part_before_last_rung"] = run["flops_before_last_rung"] / run["cumulative_flops"]
        scratch = len(run["sizes"]) == 1
        if not (scratch and run["sizes"][0] == sizes[-1]):
            row["cost_over_large"] = ratio(run, [lines[sizes[-1]]] if sizes[-1] in lines else [])
        if not scratch:
            row["cost_over_best_size"] = ratio(run, list(lines.values()))
        row["same_flops"] = {
            str(n): round(line.loss_at(run["cumulative_flops"]), 5)
            for n, line in lines.items()
            if line.log_costs[0] - 0.02 <= math.log(run["cumulative_flops"]) <= line.log_costs[-1] + 0.02
        }
        rows.append(row)
    return rows


def table(tree: dict[str, Any], sizes: tuple[int, ...]) -> str:
    """The summary as Markdown, the speed of each size, and what growth changed."""
    lines = [
        "| run | seed | part before the last rung | FLOPs | tokens | tokens / parameter | validation loss "
        "| cost / large from scratch, same loss | cost / best size from scratch, same loss "
        f"| from scratch at the same FLOPs, n = {', '.join(map(str, sizes))} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def shown(found: dict[str, Any] | None) -> str:
        if not found:
            return ""
        note = {"": "", "<": " (not reached)", ">": " (at its first budget)"}[found["bound"]]
        return f"{found['bound']}{found['ratio']:.0%}{note}"

    for row in tree["summary"]:
        name = f"{row['lineage']} ({'→'.join(map(str, row['sizes']))}), {row['budget']:g}"
        part = f"{row['part_before_last_rung']:.1%}" if len(row["sizes"]) > 1 else ""
        loss = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
        same = ", ".join(f"{row['same_flops'][str(n)]:.4f}" if str(n) in row["same_flops"] else "–" for n in sizes)
        cells = [name, row["seed"], part, f"{row['cumulative_flops']:.3g}", f"{row['tokens'] / 1e6:.1f}M"]
        cells += [f"{row['tokens_per_parameter']:.1f}", loss]
        cells += [shown(row.get("cost_over_large")), shown(row.get("cost_over_best_size")), same]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| n | parameters | FLOPs a token | tokens/s | TFLOP/s |", "|---|---|---|---|---|"]
    for n, size in tree.get("sizes", {}).items():
        rate = f"{size['tokens_per_second']:,.0f} | {size['flops_per_second'] / 1e12:.1f}"
        lines.append(f"| {n} | {size['parameters']:,} | {size['flops_per_token']:.3g} | {rate} |")
    for growth in tree["growths"].values():
        lines.append(
            f"growth {growth['from']} -> {growth['to']} ({growth['recipe']}) at step {growth['step']}: loss "
            f"{growth['loss_before']:.4f} -> {growth['loss_after']:.4f}, logits of {growth['max_logit']:.3g} moved by "
            f"{growth['max_logit_difference']:.2g}{'' if growth['lossless'] else ', not lossless'}"
        )
    return "\n".join(lines)


def plot(tree: dict[str, Any], path: pathlib.Path) -> None:
    """Loss against all training FLOPs: trunks thin, the decayed ends of a lineage joined."""
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in tree["runs"].values():
        if run["loss"] is not None:
            groups.setdefault((run["lineage"], run["seed"]), []).append(run)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(name for name, _ in groups))}
    for (name, seed), runs in groups.items():
        runs = sorted(runs, key=lambda run: run["budget"])
        style: dict[str, Any] = {"color": colours[name], "alpha": 1.0 if seed == 0 else 0.5}
        trunk = [row for row in runs[-1]["curve"] if row[1] <= runs[-1]["steps"] - runs[-1]["decay_steps"]]
        axis.plot([row[0] for row in trunk], [row[3] for row in trunk], linewidth=0.7, **style)
        label = f"{name} ({'→'.join(map(str, runs[0]['sizes']))}){f', seed {seed}' if seed else ''}"
        mark = "o--" if len(runs[0]["sizes"]) == 1 else "s-"
        axis.plot([run["cumulative_flops"] for run in runs], [run["loss"] for run in runs], mark, label=label, **style)
    ends = [run["loss"] for runs in groups.values() for run in runs]
    if ends:
        axis.set_ylim(min(ends) - 0.05, max(ends) + 0.8)
        axis.legend(fontsize="small")
    axis.set(xscale="log", xlabel="all training FLOPs, every rung counted", ylabel="validation loss (nats a token)")
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    plt.close(figure)


# The command.


@contextlib.contextmanager
def prepared(setting: Setting, folder: pathlib.Path, folders: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """Prepares the data in a process beside this one; gives what waits for it and returns the contents of data.json."""
    done = folder / "data.json"
    process = None
    if not done.exists():
        command = [sys.executable, "-m", "benchmarks.gpu_growth_data", f"--out={folder}", f"--folders={folders}"]
        command += [f"--tokens={setting.max_tokens}", f"--vocab={setting.vocabulary}"]
        command += [f"--seconds={setting.data_seconds}", f"--held_out={setting.held_out}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def wait() -> dict[str, Any]:
        if process is not None and process.wait():
            raise UserError("preparing the data failed, see above")
        return json.loads(done.read_text())

    try:
        yield wait
    finally:
        if process is not None and process.poll() is None:
            process.kill()


def study(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * args.minutes
    setting, workdir, out = SETTINGS[args.size], args.workdir, args.out
    changes = {"max_tokens": args.tokens, "width": args.width, "context": args.context, "batch": args.batch}
    setting = dataclasses.replace(setting, **{key: value for key, value in changes.items() if value})
    lineages = LINEAGES[: args.lineages]
    folders = sysconfig.get_path("stdlib") if args.size == "tiny" else ""
    workdir.mkdir(parents=True, exist_ok=True)
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))
    small, middle, large = setting.tokens
    with prepared(setting, workdir / "data", folders) as data:
        kind = choose_kernels(setting, args.plain)
        programs = Programs(setting)
        for part in ("train", "init", "evaluate"):
            for n in (large, middle, small):
                programs.start(part, n)
        for before, n in ((small, middle), (middle, large)):
            programs.start("compare", before, n)
            for recipe in dict.fromkeys(lineage.recipe for lineage in lineages):
                programs.start("grow", before, n, recipe)
        figures = data()
    say(
        f"data: {figures['train']['documents']:,} documents, {figures['train']['bytes'] / 1e6:.0f} MB, "
        f"{figures['train']['tokens'] / 1e6:.1f}M tokens in {sum(figures['seconds'].values()):.0f} s"
    )
    if figures["train"]["tokens"] < setting.max_tokens:
        say(f"that is less than the {setting.max_tokens / 1e6:.0f}M tokens wanted: all there was, or was time for")
    identity = {
        "setting": dataclasses.asdict(setting),
        "data": [figures[s]["fingerprint"] for s in ("train", "validation")],
    }
    results = Results(workdir, out, identity)
    reserve = min(10.0, 3 * args.minutes)  # for the report
    train, validation = (np.load(workdir / "data" / f"{split}.npy") for split in ("train", "validation"))
    validation = validation[: setting.max_tokens]
    trainer = Trainer(setting, programs, results, workdir, train, validation, deadline - reserve)
    results.write(
        command=f"python -m benchmarks.gpu_growth --size={args.size} --minutes={args.minutes:g}",
        environment=versions(),
        kernels=kind,
        data=figures,
        tokens_per_step=setting.window_tokens,
    )

    dropped: list[str] = []
    if "plan" not in results.tree:
        measured = {n: trainer.measure(n) for n in (large, middle, small)}
        say(f"compiled: {json.dumps(programs.seconds)}")
        say("measured: " + ", ".join(f"n = {n}: {1e3 * s:.2f} ms a step" for n, s in measured.items()))
        rates = dict(zip(setting.tokens, setting.rates, strict=True))
        for n in (large, middle):
            takes = (1 + len(setting.tried_rates)) * setting.search * measured[n]
            if takes <= SEARCH_SHARE / 2 * (trainer.deadline - time.monotonic()) or setting.large_steps:
                with contextlib.suppress(OutOfTime):
                    rates[n] = trainer.search(n)
        rates[small] = rates[middle]
        # An evaluation's batches go forward alone, a third of a step each; 5 % is for saving, growing and the host.
        overhead = 1.05 + setting.evaluated / 3 / (setting.evaluate_every * setting.chunk)
        step_seconds = {n: s * overhead for n, s in measured.items()}
        left = max(1.0, trainer.deadline - time.monotonic())
        limit = args.epochs * trainer.num_windows / setting.batch
        whole, decided = plan(setting, lineages, args.fit, rates, step_seconds, left, limit)
        results.write(
            plan={
                "flops": whole,
                "limited_by": decided,
                "rates": {str(n): rate for n, rate in rates.items()},
                "step_seconds": {str(n): s for n, s in step_seconds.items()},
                "seconds_left": left,
            }
        )
    chosen = results.tree["plan"]
    rates, step_seconds = ({int(n): x for n, x in chosen[key].items()} for key in ("rates", "step_seconds"))
    planned = [runs_of(lineage, setting, chosen["flops"], rates) for lineage in lineages]
    for number, runs in enumerate(planned, 1):
        so_far = [run for each in planned[:number] for run in each]
        expected = seconds(so_far, step_seconds)
        say(
            f"plan: {runs[-1].lineage}, seed {runs[-1].trunk.seed}: up to {runs[-1].steps} steps, "
            f"{runs[-1].flops:.3g} FLOPs, {runs[-1].steps * setting.window_tokens / 1e6:.0f}M tokens; "
            f"by {expected:.0f} s"
        )
    say(f"the budget is limited by: {chosen['limited_by']}")
    marks: dict[Trunk, set[int]] = {}  # steps whose states others begin from
    for run in (run for runs in planned for run in runs):
        for step in (run.trunk_steps, *(rung.step for rung in run.trunk.rungs[1:])):
            marks.setdefault(run.trunk.up_to(step), set()).add(step)
    for run in (run for runs in planned for run in runs):
        if run.name in results.tree["runs"]:
            continue
        if trainer.expected(run, marks, step_seconds) > trainer.deadline - time.monotonic():
            dropped.append(run.name)
            continue
        try:
            trainer.run(run, marks)
        except OutOfTime:
            dropped.append(f"{run.name} (in flight)")
    if dropped:
        say(f"not run, since there was no time: {'; '.join(dropped)}")

    sizes = dict(results.tree.get("sizes", {}))
    for n, times in trainer.timed.items():
        step_time = float(np.median(times))
        if len(times) < sizes.get(str(n), {}).get("chunks_timed", 0):
            continue
        sizes[str(n)] = {
            "parameters": count_params(programs.state(n).params),
            "flops_per_token": train_flops_per_token(setting.config(n).model),
            "chunks_timed": len(times),
            "step_seconds": step_time,
            "tokens_per_second": setting.window_tokens / step_time,
            "flops_per_second": setting.flops(n) / step_time,
        }
    results.write(dropped=dropped, sizes=sizes, compile_seconds=programs.seconds)
    programs.pool.shutdown(wait=False, cancel_futures=True)
    report(out)


def report(out: pathlib.Path) -> None:
    """Sums up what the JSON holds: into itself, a plot and a table."""
    tree = json.loads(out.read_text())
    sizes = tuple(tree["identity"]["setting"]["tokens"])
    tree["summary"] = summarise(list(tree["runs"].values()), sizes)
    replace_file(out, json.dumps(tree, indent=1) + "\n")
    plot(tree, out.with_suffix(".png"))
    print(table(tree, sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/gpu_growth"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/gpu_growth.json"))
    parser.add_argument("--minutes", type=float, default=5, help="for everything")
    parser.add_argument("--size", choices=sorted(SETTINGS), default="full")
    parser.add_argument("--fit", type=int, default=4, help="how many lineages must end in time")
    parser.add_argument("--lineages", type=int, default=len(LINEAGES), help="how many there are at most")
    parser.add_argument("--epochs", type=float, default=1.0, help="how often a run may read the data")
    parser.add_argument("--plain", action="store_true", help="without the package's own kernels for the device")
    parser.add_argument("--report_only", action="store_true", help="sum up what --out holds, and run nothing")
    for name in ("tokens", "width", "context", "batch"):
        parser.add_argument(f"--{name}", type=int, default=0, help="instead of the size's own")
    args = parser.parse_args()
    try:
        report(args.out) if args.report_only else study(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
