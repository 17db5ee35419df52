"""Learning rate, optimizer, and what does not learn for a while."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import Config, ModelConfig, OptimizerConfig
from tokenformer_jax.nn.layers import Params


class NewTokens(NamedTuple):
    """How the tokens of projections that grew at a step learn, beside all else."""

    tokens: dict[str, int]  # projection -> how many of its first tokens are older
    step: int
    freeze_steps: int = 0  # in which the older ones do not learn
    rate: float = 1.0  # factor of the new ones' learning rate
    warmup: int = 0  # steps in which that factor rises from 0
    alone: bool = False  # nothing else ever learns


def new_tokens(cfg: Config, growth: Mapping[str, Any]) -> NewTokens | None:
    """How the tokens of a growth, as a record has it, learn; None if as all else does."""
    grow, alone = cfg.grow, growth.get("train") == "new"
    own = (grow.freeze_steps, grow.new_tokens_rate, grow.new_tokens_warmup)
    if own == (0, 1.0, 0) and not alone:
        return None
    older = {name: n for name, n in growth["from"].items() if growth["to"][name] > n}
    return NewTokens(older, growth["step"], *own, alone)


def grown_tokens(cfg: Config, old: ModelConfig, step: int) -> NewTokens | None:
    """The same of the growth by which the old model becomes the config's at a step."""
    return new_tokens(cfg, {"step": step, "from": old.tokens, "to": cfg.model.tokens, "train": cfg.grow.train})


def learning_rate(cfg: OptimizerConfig, steps: int, start: int = 0) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then `cfg.schedule`, counted from step `start`.

    "cosine" falls to the final rate at `steps`; "wsd" (warm-up, stable, decay) stays at the peak and falls to the final
    rate in the last `decay_fraction`; "constant" stays. Before warm-up ends no rate decays.
    """
    peak, final, warmup = cfg.peak_learning_rate, cfg.final_learning_rate, cfg.warmup_steps
    length = max(steps - start, warmup + 1)
    if cfg.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, length, final)
    else:
        decay_steps = min(decay_length(cfg, length), length - warmup) if cfg.schedule == "wsd" else 0
        parts = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)]
        if decay_steps:
            parts.append(lambda t: final + (peak - final) * (1 - _fallen(cfg.decay, t / decay_steps)))
        schedule = optax.join_schedules(parts, [warmup, length - decay_steps][: len(parts) - 1])
    return lambda step: schedule(step - start)


def decay_length(cfg: OptimizerConfig, length: int) -> int:
    """Steps of the decay at the end of a "wsd" schedule of so many steps."""
    return round(cfg.decay_fraction * length)


def _fallen(decay: str, part: jax.typing.ArrayLike) -> jax.Array:
    """How much of the way from the peak to the final rate is done after this part of the decay."""
    part = jnp.clip(part, 0.0, 1.0)
    return jnp.sqrt(part) if decay == "sqrt" else part


def decayed(params: Params) -> Any:
    """True where weight decay applies: all but the final norm, biases, class token and positions."""
    kept = [n for n in params if n.startswith("norm") or n.endswith("bias") or n in ("class_token", "positions")]
    return {name: jax.tree.map(lambda _, n=name: n not in kept, tree) for name, tree in params.items()}


def make_optimizer(cfg: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, cfg.beta1, cfg.beta2, cfg.epsilon, weight_decay=cfg.weight_decay, mask=decayed)


def scale_updates(updates: Params, step: jax.Array, new: NewTokens) -> Params:
    """The updates of a step, with those of projections that grew scaled: new tokens and older ones in their own way."""
    of_old = jnp.where(step >= new.step + new.freeze_steps, 1.0, 0.0)
    of_new = new.rate * jnp.clip((step + 1 - new.step) / max(new.warmup, 1), 0.0, 1.0)

    def scaled(name: str, update_YND: jax.Array) -> jax.Array:
        is_new_N1 = jnp.arange(update_YND.shape[1])[:, None] >= new.tokens[name]
        return update_YND * jnp.where(is_new_N1, of_new, of_old)

    if new.alone:
        return jax.tree.map(lambda u: u * of_new, updates)
    blocks = updates["blocks"]
    grown = {name: jax.tree.map(lambda u, n=name: scaled(n, u), blocks[name]) for name in new.tokens}
    return updates | {"blocks": blocks | grown}
