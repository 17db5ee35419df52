"""What training changes, and a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.nn.language import init_params, initial_tau
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import Tau


class TauRamp(NamedTuple):
    """A layer's τ over time: `start` up to step `begin`, then linearly to `target` at step `end`."""

    start: jax.Array  # float32
    target: jax.Array  # float32
    begin: jax.Array  # int32
    end: jax.Array  # int32

    @classmethod
    def constant(cls, tau: float) -> "TauRamp":
        return cls(jnp.float32(tau), jnp.float32(tau), jnp.int32(0), jnp.int32(0))

    def at(self, step: jax.Array) -> jax.Array:
        done = (step - self.begin).astype(jnp.float32) / jnp.maximum(self.end - self.begin, 1)
        ramped = self.start + (self.target - self.start) * jnp.clip(done, 0.0, 1.0)
        return jnp.where(step >= self.end, self.target, jnp.where(step <= self.begin, self.start, ramped))


class TrainState(NamedTuple):
    """Everything that training changes; what a checkpoint holds."""

    step: jax.Array  # int32, optimizer steps taken since the model's birth
    params: Params
    opt_state: optax.OptState
    tau: dict[str, TauRamp]  # per projection; the same in every layer

    def without_moments(self) -> dict[str, Any]:
        """The parts that a model needs: all but opt_state."""
        return {name: part for name, part in self._asdict().items() if name != "opt_state"}

    def tau_now(self) -> Tau:
        return {name: ramp.at(self.step) for name, ramp in self.tau.items()}


def init_state(cfg: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = init_params(cfg, key)
    tau = {name: TauRamp.constant(value) for name, value in initial_tau(cfg).items()}
    return TrainState(jnp.int32(0), params, optimizer.init(params), tau)
