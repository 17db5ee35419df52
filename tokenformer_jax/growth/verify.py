"""Whether a grown model computes what it computed before, and can learn."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.recipes import RECIPES
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.pattention import pattention
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import Step, put_batch
from tokenformer_jax.training.tasks import task_of

LOGIT_BOUND = 5e-6  # of the largest logit; float32 rounding in other reduction orders stays below it
CHECKED_BATCHES, CHECKED_ROWS, CHECKED_LENGTH = 1, 4, 32  # the function of every position, so a hundred will do
PROBES = 4  # random inputs on which each projection is compared


def measure(
    old: TrainState, new: TrainState, old_cfg: Config, cfg: Config, step: Step, batches: Sequence[Any]
) -> dict[str, Any]:
    """Runs both models on the same batches, in float32 at the highest matmul precision.

    Returns:
      The figures of `grow.json`: the largest difference of logits and the largest logit, the losses in nats a token,
      the gradient norms at the new key and value tokens of each projection that grew, and how far each array outside
      of these, and the outputs of these in each layer, moved relative to their largest entry.
    """
    with jax.set_mesh(step.mesh), jax.default_matmul_precision("highest"):
        compiled = jax.jit(comparison(old_cfg, cfg, step))
        each = jax.device_get([compiled(old, new, put_batch(step, batch)) for batch in batches])
    figures = jax.tree.map(lambda *values: np.mean(values, axis=0).tolist(), *each)
    for name in ("max_logit_difference", "max_logit"):
        figures[name] = float(np.max([row[name] for row in each]))  # NaN where one is
    for kind in ("key", "value"):
        norms = [norms[f"{kind}s"] for norms in figures["gradient_norms"].values()]
        figures[f"new_{kind}_gradient_norm"] = math.hypot(*norms)
    return figures


def comparison(old_cfg: Config, cfg: Config, step: Step) -> Callable[[TrainState, TrainState, Any], dict[str, Any]]:
    """What `measure` compiles: both models on one batch. A device holds no more of a stack than a layer at a time."""
    task = task_of(cfg)

    def outputs(cfg: Config, params: Params, state: TrainState, batch: Any) -> jax.Array:
        graphdef, _, _ = task.abstract_model(dataclasses.replace(cfg.model, dtype="float32", remat="full"))
        return nnx.merge(graphdef, params).outputs(batch, state.tau_now(), cfg)

    def compare(old: TrainState, new: TrainState, batch: Any) -> dict[str, Any]:
        def loss_after(params: Params) -> tuple[jax.Array, jax.Array]:
            after = outputs(cfg, params, new, batch)
            return task.output_loss(after, batch), after

        before = outputs(old_cfg, old.params, old, batch)
        (loss, after), gradients = jax.value_and_grad(loss_after, has_aux=True)(new.params)
        shardings = jax.tree.map(lambda a: a.sharding, step.abstract_state.params)
        gradients = jax.lax.with_sharding_constraint(gradients, shardings)
        grown = {name: count for name, count in old_cfg.model.tokens.items() if cfg.model.tokens[name] > count}
        return {
            "moved": moved(old, new, list(grown), cfg.model),
            "max_logit_difference": jnp.max(jnp.abs(after - before)),
            "max_logit": jnp.max(jnp.abs(before)),
            "loss_before": task.output_loss(before, batch),
            "loss_after": loss,
            "gradient_norms": {name: norms_of_new(gradients["blocks"][name], n) for name, n in grown.items()},
        }

    return compare


def norms_of_new(gradients: Params, tokens: int) -> Params:
    """The norms of a projection's gradients at all but its first `tokens` keys and values."""

    def norm(gradient_YND: jax.Array) -> jax.Array:
        is_new_N1 = jnp.arange(gradient_YND.shape[1])[:, None] >= tokens
        return jnp.linalg.norm(jnp.where(is_new_N1, gradient_YND, 0.0))  # a slice would move what is sharded

    return jax.tree.map(norm, gradients)


def moved(old: TrainState, new: TrainState, grown: list[str], cfg: ModelConfig) -> dict[str, jax.Array]:
    """How far arrays moved, and in each layer [Y] the outputs of projections that grew; of their largest entry."""

    def change(before: jax.Array, after: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(after - before)) / jnp.maximum(jnp.max(jnp.abs(before)), 1e-30)

    def outputs_move(name: str) -> jax.Array:
        probes_BD = jax.random.normal(jax.random.key(0), (PROBES, cfg.embed_dim))

        def attend(state: TrainState, arrays: Params) -> jax.Array:
            tau = state.tau_now()[name]
            return pattention(probes_BD, arrays["keys"], arrays["values"], tau, cfg.normalizer, cfg.gelu)

        both = old.params["blocks"][name], new.params["blocks"][name]
        return jax.lax.map(lambda layer: change(attend(old, layer[0]), attend(new, layer[1])), both)

    changes = {name: outputs_move(name) for name in grown}
    for (path, before), after in zip(jax.tree.leaves_with_path(old.params), jax.tree.leaves(new.params), strict=True):
        if before.shape == after.shape:
            changes[jax.tree_util.keystr(path, simple=True, separator=".")] = change(before, after)
    return changes


def verify(figures: dict[str, Any], recipe: str) -> None:
    """Raises a UserError that names what failed: the function moved, or new tokens without a gradient."""
    difference, largest = figures["max_logit_difference"], figures["max_logit"]
    if not math.isfinite(largest):
        raise UserError(
            "the source is broken: its logits are not finite; an earlier checkpoint, by --step, may be good; "
            "nothing was written"
        )
    if RECIPES[recipe].lossless and not difference <= LOGIT_BOUND * max(largest, 1.0):
        name, changes = max(figures["moved"].items(), key=lambda item: np.max(item[1]))
        layer = f" in layer {np.argmax(changes)}" if np.ndim(changes) else ""
        raise UserError(
            f"the grown model's logits differ by {difference:.3g} from the source's, whose largest is {largest:.3g}; "
            f"the bound is {LOGIT_BOUND:g} of that; most of all {name}{layer} changed, by {np.max(changes):.3g} of its "
            "largest entry; nothing was written"
        )
    for name, norms in figures["gradient_norms"].items():
        if RECIPES[recipe].learns and not max(norms.values()) > 0:
            raise UserError(f"no gradient reaches the new tokens of {name}: they could not learn; nothing was written")
