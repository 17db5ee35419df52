"""What training changes, and a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
    average: Params | tuple[()] = ()  # exponential mean of the parameters; empty where the config has none

    @property
    def evaluated(self) -> Params:
        """The parameters that an evaluation uses: their mean where there is one."""
        return self.average or self.params  # type: ignore[return-value]

    def without_moments(self) -> dict[str, Any]:
        """The parts that a model needs to go on: all but opt_state."""
        return {name: part for name, part in self._asdict().items() if name != "opt_state" and part != ()}

    def to_use(self) -> dict[str, Any]:
        """The parts that a model needs to be used; its mean stands in the place of its parameters."""
        parts = self.without_moments()
        return {name: part for name, part in parts.items() if name != "params" or "average" not in parts}

    def tau_now(self) -> Tau:
        return {name: ramp.at(self.step) for name, ramp in self.tau.items()}

    def tau_values(self) -> dict[str, float]:
        """`tau_now` on the host."""
        return {name: float(value) for name, value in self.tau_now().items()}


def new_state(
    params: Params, opt_state: optax.OptState, tau: dict[str, float], with_average: bool = False
) -> TrainState:
    """The state before the first step, in which τ stays as it is."""
    ramps = {name: TauRamp.constant(value) for name, value in tau.items()}
    return TrainState(jnp.int32(0), params, opt_state, ramps, params if with_average else ())
