"""Grows a trained model: more parameter tokens, the same function, verified before anything is written.

`recipes.py` says what new tokens hold; Adam's moments are padded with zeros. On a mesh each device pads its own part of
every array, and moments are read straight into the larger arrays.
"""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.data.batches import eval_batches
from tokenformer_jax.data.tokens import TokenSplit
from tokenformer_jax.devices.sharding import constrain, this_process
from tokenformer_jax.growth.ladder import check_growth
from tokenformer_jax.growth.recipes import RECIPES, Growth
from tokenformer_jax.growth.resize import Succession, size_figures, size_table, spent, timed, token_counts
from tokenformer_jax.growth.verify import CHECKED_BATCHES, CHECKED_LENGTH, CHECKED_ROWS, measure, verify
from tokenformer_jax.nn.language import init_params, initial_tau
from tokenformer_jax.storage.trained import newest_good
from tokenformer_jax.training.state import TauRamp, TrainState
from tokenformer_jax.training.step import Step


def pad(old: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
    """The array with zeros appended, up to the new shape.

    Tokens are sharded, and an appended one moves all borders between devices. So each device first gets all tokens of
    fewer columns, in one exchange, and appends to those; padding in place would gather whole columns on all of them.
    """
    if old.shape == new.shape:
        return old
    widths = [(0, after - before) for before, after in zip(old.shape, new.shape, strict=True)]
    return by_columns(jnp.pad(by_columns(old), widths))


def by_columns(x_LND: jax.Array) -> jax.Array:
    return constrain(x_LND, None, None, "columns")


def grow_state(
    state: TrainState, abstract: TrainState, cfg: ModelConfig, key: jax.Array, recipe: str, ramp_steps: int
) -> TrainState:
    """Appends parameter tokens to a state; a pure function, to be jitted with the grown state's shardings.

    Args:
      state: of the smaller model. Without its optimizer state (an empty tuple) only the model grows.
      abstract: shapes of the grown state.
      cfg: the grown model's config.
      key: PRNG key of what the new tokens hold.
      recipe: a key of `RECIPES`.
      ramp_steps: steps over which τ goes from what the recipe says to `initial_tau(cfg)`; 0 keeps it for good.

    Returns:
      The grown state. With a lossless recipe its model computes what the smaller one computes, up to rounding.
    """
    params = jax.tree.map(pad, state.params, abstract.params)
    drawn = init_params(cfg.padding_counted(), key)["blocks"]
    blocks, tau = dict(params["blocks"]), dict(state.tau)
    for number, (name, tokens) in enumerate(token_counts(state).items()):
        if cfg.tokens[name] == tokens:
            continue
        born = jnp.float32(initial_tau(cfg)[name])
        grown = RECIPES[recipe].apply(
            Growth(
                keys_LND=blocks[name]["keys"],
                values_LNE=blocks[name]["values"],
                drawn_keys_LND=drawn[name]["keys"],
                drawn_values_LNE=drawn[name]["values"],
                is_new_N1=jnp.arange(cfg.tokens[name])[:, None] >= tokens,
                tokens=tokens,
                tau=state.tau[name].at(state.step),
                target=born,
                key=jax.random.fold_in(key, number),
            )
        )
        blocks[name] = {"keys": grown.keys_LND, "values": grown.values_LNE}
        target = born if ramp_steps else grown.tau
        tau[name] = TauRamp(grown.tau, target, state.step, state.step + ramp_steps)
    opt_state = jax.tree.map(pad, state.opt_state, abstract.opt_state) if state.opt_state else ()
    if RECIPES[recipe].resets_optimizer:
        opt_state = forget_moments(opt_state)
    return TrainState(state.step, params | {"blocks": blocks}, opt_state, tau)


def forget_moments(opt_state: Any) -> Any:
    """An optimizer state whose Adam begins anew, at the same point of its schedule."""
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    return jax.tree.map(
        lambda part: jax.tree.map(jnp.zeros_like, part) if is_adam(part) else part, opt_state, is_leaf=is_adam
    )


def grow_model(
    old: TrainState, old_cfg: Config, cfg: Config, step: Step, validation: TokenSplit
) -> tuple[TrainState, dict[str, Any]]:
    """Grows a model on its mesh and verifies it on batches of the validation split.

    Args:
      old: the smaller model's state; its optimizer state is not looked at.
      old_cfg: its config, with the mesh of the larger one.
      cfg: the larger one's config.
      step: of the larger model.
      validation: the tokens to verify on.

    Returns:
      The grown state without optimizer state, and the figures of `grow.json`.

    Raises:
      UserError: the function moved, or new tokens could not learn.
    """
    step_number = int(old.step)
    old = old._replace(opt_state=())
    ramp_steps = 0 if cfg.model.tau_tokens else math.ceil(cfg.grow.tau_ramp * (cfg.steps - step_number))
    abstract = step.abstract_state._replace(opt_state=())
    key = jax.random.fold_in(jax.random.key(cfg.seed), step_number)
    seconds: dict[str, float] = {}
    with timed(seconds, "append"), jax.set_mesh(step.mesh):
        append = jax.jit(
            lambda state, key: grow_state(state, abstract, cfg.model, key, cfg.grow.recipe, ramp_steps),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )
        new = jax.block_until_ready(append(old, key))
    shards = cfg.mesh.batch_shards
    rows, length = shards * max(1, CHECKED_ROWS // shards), min(CHECKED_LENGTH, cfg.model.context_length)
    batches = eval_batches(validation, rows, length, max_batches=CHECKED_BATCHES, **this_process(step.mesh))
    with timed(seconds, "verify"):
        measured = measure(old, new, old_cfg, cfg, step, list(batches))
    figures = {
        "step": step_number,
        "recipe": cfg.grow.recipe,
        "tau_ramp_steps": ramp_steps if RECIPES[cfg.grow.recipe].ramps else 0,
        "tokens_before": old_cfg.model.tokens,
        "tokens_after": cfg.model.tokens,
        **size_figures(old, new),
        **measured,
        "seconds": seconds,
    }
    verify(figures, cfg.grow.recipe)
    return new, figures


def grow_moments(opt_state: Any, step: Step, recipe: str) -> Any:
    """Pads the optimizer state array by array, and frees each former one."""

    def grow_one(old: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
        if old.shape == new.shape:
            return jax.device_put(old, new.sharding)
        larger = jax.jit(lambda x: pad(x, new), out_shardings=new.sharding)(old)
        larger.block_until_ready()
        old.delete()
        return larger

    with jax.set_mesh(step.mesh):
        padded = jax.tree.map(grow_one, opt_state, step.abstract_state.opt_state)
    return forget_moments(padded) if RECIPES[recipe].resets_optimizer else padded


def history(figures: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's record keeps of a growth."""
    checks = "recipe", "max_logit_difference", "max_logit", "loss_before", "loss_after"
    return {
        "step": figures["step"],
        "from": figures["tokens_before"],
        "to": figures["tokens_after"],
        **{name: figures[name] for name in checks},
    }


def grow(source: pathlib.Path, cfg: Config, workdir: pathlib.Path, step_number: int | None = None) -> dict[str, Any]:
    """Grows the newest (or given) checkpoint of `source` to the config's token counts, into a new workdir.

    Where the config has rungs of its own, `train` climbs them later. The target appears whole or not at all; the source
    is only read. Returns what `grow.json` holds.

    Raises:
      UserError: where the two models do not fit, the target is taken, a check fails, or the checkpoint is damaged;
        nothing is written then. Without `step_number` a damaged one is passed over, which is told.
    """
    return newest_good(source, step_number, lambda number: grow_checkpoint(source, cfg, workdir, number))


def grow_checkpoint(source: pathlib.Path, cfg: Config, workdir: pathlib.Path, step_number: int) -> dict[str, Any]:
    """Grows that checkpoint, as `grow` does."""
    plan = Succession.open(source, cfg, workdir, step_number, lambda old, new: check_growth(old, new, cfg.grow.recipe))
    step = plan.step
    seconds: dict[str, float] = {}
    with timed(seconds, "restore"):
        wanted = plan.old_step.abstract_state.without_moments()
        old = TrainState(**plan.checkpoints.restore(plan.step_number, wanted), opt_state=())
    new, figures = grow_model(old, plan.old_cfg, plan.cfg, step, plan.corpus.validation)
    del old  # the moments need its memory
    with timed(seconds, "restore"):
        wanted = {"opt_state": step.abstract_state.opt_state}
        opt_state = plan.checkpoints.restore(plan.step_number, wanted, padded=True)["opt_state"]
    if RECIPES[plan.cfg.grow.recipe].resets_optimizer:
        opt_state = forget_moments(opt_state)
    figures = {"source": str(source), **figures, "seconds": seconds | figures["seconds"]}
    plan.write(workdir, new._replace(opt_state=opt_state), history(figures), "grow.json", figures)
    return figures


def describe(figures: dict[str, Any]) -> str:
    """The growth as a table for people."""
    return (
        f"{size_table(figures)}\n"
        f"at step {figures['step']}: loss {figures['loss_before']:.5f} -> {figures['loss_after']:.5f}, largest change "
        f"of a logit {figures['max_logit_difference']:.2g} (largest logit {figures['max_logit']:.3g}), gradient norm "
        f"at new keys {figures['new_key_gradient_norm']:.3g}, at new values {figures['new_value_gradient_norm']:.3g}"
        f"{spent(figures)}"
    )


def warnings(figures: dict[str, Any]) -> list[str]:
    """Lines on what one may not have meant."""
    recipe = RECIPES[figures["recipe"]]
    if figures["tokens_before"] == figures["tokens_after"]:
        return ["no token count changed: the new workdir continues the same model"]
    if not recipe.learns:
        return ["warning: with zero keys and zero values the new tokens have no gradient and can never learn"]
    if not recipe.lossless:
        return [f"warning: {figures['recipe']} is not lossless: the model has changed"]
    return []
