"""The compiled programs of benchmarks/gpu_growth: a chunk of training steps, an evaluation, birth and growth."""

import concurrent.futures
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.gpu_growth.plan import Setting, Size
from tokenformer_jax.data.batches import Batch
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.training.schedule import make_optimizer
from tokenformer_jax.training.state import TauRamp, TrainState, new_state

# What runs once has the usual kernels: on a GPU, to try which are fastest takes longer, and keeps all others waiting.
ONCE: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_experimental_enable_fusion_autotuner": False}


def keep_compiled(workdir: pathlib.Path) -> None:
    """Keeps compiled programs in the workdir, unless JAX was told another place."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compiled"))


class Programs:
    """Compiles in the background, while the data are prepared; a program's name is that of a method, and its sizes.

    Each works on several copies of a model at once, which differ in their seed: the first axis, A, of states.
    """

    def __init__(self, setting: Setting, copies: int = 1):
        self.setting, self.copies = setting, copies
        self.keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), copies))
        self.pool = concurrent.futures.ThreadPoolExecutor(4)
        self.futures: dict[tuple, concurrent.futures.Future] = {}
        self.seconds: dict[str, float] = {}
        self.draws: dict[str, Callable[[TrainState], Callable]] = {}  # of recipes: an initializer that sees the state

    def start(self, *key: Any) -> None:
        if key not in self.futures:
            self.futures[key] = self.pool.submit(self._compile, key)

    def __call__(self, *key: Any) -> Callable:
        self.start(*key)
        return self.futures[key].result()

    def _compile(self, key: tuple) -> Callable:
        began = time.monotonic()
        function, *arguments = getattr(self, key[0])(*key[1:])
        options = ONCE if key[0] in ("init", "grow") else None
        compiled = jax.jit(function).lower(*arguments).compile(options)
        self.seconds[" ".join(map(str, key))] = round(time.monotonic() - began, 2)
        return compiled

    def state(self, n: Size) -> TrainState:
        return jax.eval_shape(self.init(n)[0], self.keys)

    def num_params(self, n: Size) -> int:
        """Of one copy."""
        return count_params(self.state(n).params) // self.copies

    def tokens(self) -> jax.ShapeDtypeStruct:
        """Of either split: an array of one length, so that programs are compiled before the data are there."""
        return jax.ShapeDtypeStruct((self.setting.max_tokens,), jnp.uint16)

    def init(self, n: Size) -> tuple:
        cfg = self.setting.config(n)
        optimizer = make_optimizer(cfg.optimizer, lambda _: 0.0)

        def init(rng: jax.Array) -> TrainState:
            params = init_params(cfg.model, rng)
            return new_state(params, optimizer.init(params), initial_tau(cfg.model))

        return jax.vmap(init), self.keys

    def train(self, n: Size) -> tuple:
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
            scale = cfg.optimizer.clip_norm / jnp.maximum(optax.tree.norm(grads), cfg.optimizer.clip_norm)
            grads = jax.tree.map(lambda g: g * scale, grads)
            optimizer = make_optimizer(cfg.optimizer, lambda _: rate)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.tau), loss

        def train(state: TrainState, tokens_T: jax.Array, windows_SAB: jax.Array, rates_S: jax.Array) -> Any:
            steps = jax.vmap(functools.partial(step, tokens_T), (0, (0, None)))
            return jax.lax.scan(steps, state, (windows_SAB, rates_S))

        windows = jax.ShapeDtypeStruct((setting.chunk, self.copies, setting.batch), jnp.int32)
        return train, self.state(n), self.tokens(), windows, jax.ShapeDtypeStruct((setting.chunk,), jnp.float32)

    def evaluate(self, n: Size) -> tuple:
        """The mean loss over windows, nats a token."""
        cfg, setting = self.setting.config(n), self.setting
        graphdef, _, _ = abstract_model(cfg.model)

        def evaluate(state: TrainState, tokens_T: jax.Array, windows_EB: jax.Array) -> jax.Array:
            def add(total: jax.Array, windows_B: jax.Array) -> tuple[jax.Array, None]:
                batch = read_batch(tokens_T, windows_B, setting.context)
                nll, weights = nnx.merge(graphdef, state.params).loss_sums(batch, state.tau_now(), cfg)
                return total + nll / weights, None

            return jax.lax.scan(add, jnp.float32(0), windows_EB)[0] / len(windows_EB)

        windows = jax.ShapeDtypeStruct((setting.evaluated, setting.batch), jnp.int32)
        return jax.vmap(evaluate, (0, None, None)), self.state(n), self.tokens(), windows

    def grow(self, before: Size, n: Size, recipe: str) -> tuple:
        """The grown state; the largest difference of both models' logits, and the largest logit, in full float32."""
        model = self.setting.config(n).model
        abstract = jax.eval_shape(lambda keys: jax.tree.map(lambda x: x[0], self.init(n)[0](keys)), self.keys)

        def logits(n: Size, state: TrainState, tokens_BL: jax.Array) -> jax.Array:
            model = dataclasses.replace(self.setting.config(n).model, dtype="float32")
            return nnx.merge(abstract_model(model)[0], state.params)(tokens_BL, state.tau_now())[0]

        def grow(old: TrainState, key: jax.Array, ramp_steps: jax.Array, tokens_BL: jax.Array) -> tuple:
            draw = self.draws[recipe](old) if recipe in self.draws else init_params
            new = grow_state(old, abstract, model, key, recipe, ramp_steps=1, draw=draw)

            def ramp(tau: TauRamp) -> TauRamp:
                return tau._replace(end=tau.begin + ramp_steps, target=jnp.where(ramp_steps > 0, tau.target, tau.start))

            new = new._replace(tau={name: ramp(tau) for name, tau in new.tau.items()})
            with jax.default_matmul_precision("highest"):
                old_BLV, new_BLV = logits(before, old, tokens_BL), logits(n, new, tokens_BL)
            return new, jnp.max(jnp.abs(new_BLV - old_BLV)), jnp.max(jnp.abs(old_BLV))

        tokens = jax.ShapeDtypeStruct((4, min(64, self.setting.context)), jnp.int32)
        each = jax.vmap(grow, (0, 0, None, None))
        return each, self.state(before), self.keys, jax.ShapeDtypeStruct((), jnp.int32), tokens


def read_batch(tokens_T: jax.Array, windows_B: jax.Array, length: int) -> Batch:
    """Windows by their number, as `data` has them: L + 1 ids from number · L on."""
    ids = tokens_T[windows_B[:, None] * length + jnp.arange(length + 1)].astype(jnp.int32)
    ones = jnp.ones((len(windows_B), length))
    arrays: Any = ids[:, :-1], ids[:, 1:], ones, ones.astype(jnp.int32)
    return Batch(*arrays)
