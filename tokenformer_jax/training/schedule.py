"""Learning rate, optimizer, and what does not learn for a while."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import OptimizerConfig
from tokenformer_jax.nn.layers import Params


class Frozen(NamedTuple):
    """The former tokens of projections that grew, which do not learn for a while."""

    tokens: dict[str, int]  # projection -> how many of its first tokens
    until: int  # the last step without learning


def learning_rate(cfg: OptimizerConfig, steps: int, start: int = 0) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine that reaches the final rate at `steps`; counted from step `start`."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.peak_learning_rate, cfg.warmup_steps, max(steps - start, cfg.warmup_steps + 1), cfg.final_learning_rate
    )
    return lambda step: schedule(step - start)


def decayed(params: Params) -> Any:
    """True where weight decay applies: all but the final norm."""
    return {name: jax.tree.map(lambda _, n=name: not n.startswith("norm"), tree) for name, tree in params.items()}


def make_optimizer(cfg: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, cfg.beta1, cfg.beta2, cfg.epsilon, weight_decay=cfg.weight_decay, mask=decayed)


def freeze(updates: Params, step: jax.Array, frozen: Frozen) -> Params:
    """The updates with those of frozen tokens set to zero."""

    def masked(name: str, update_LND: jax.Array) -> jax.Array:
        is_new_N1 = jnp.arange(update_LND.shape[1])[:, None] >= frozen.tokens[name]
        return jnp.where(is_new_N1 | (step >= frozen.until), update_LND, 0.0)

    blocks = updates["blocks"]
    grown = {name: jax.tree.map(lambda u, n=name: masked(n, u), blocks[name]) for name in frozen.tokens}
    return updates | {"blocks": blocks | grown}
