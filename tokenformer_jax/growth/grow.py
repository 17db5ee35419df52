"""Grows a trained model: more parameter tokens, the same function, verified before anything is written.

python -m tokenformer_jax.grow --source=W --config=configs/quickstart.py:grown --workdir=W2 [--step=N] [--recipe=split]
python -m tokenformer_jax.grow --source=W2 --config=configs/quickstart.py:small --workdir=W3 --shrink [--step=N]

`recipes.py` says what new tokens hold; Adam's moments are padded with zeros. On a mesh each device pads its own part of
every array, and moments are read straight into the larger arrays.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from tokenformer_jax.config import Config, ModelConfig, UserError, config_flag, run_command, validate, workdir_flag
from tokenformer_jax.corpus import TokenSplit
from tokenformer_jax.data import Batch, eval_batches
from tokenformer_jax.evaluate import newest_good
from tokenformer_jax.ladder import check_growth
from tokenformer_jax.pattention import pattention
from tokenformer_jax.recipes import RECIPES, Growth
from tokenformer_jax.sharding import constrain, this_process
from tokenformer_jax.shrink import describe as describe_shrinking
from tokenformer_jax.shrink import shrink
from tokenformer_jax.step import Step, TauRamp, TrainState, put_batch, sum_losses
from tokenformer_jax.successor import Succession, size_figures, size_table, spent, timed, token_counts
from tokenformer_jax.transformer import Params, abstract_model, init_params, initial_tau

LOGIT_BOUND = 5e-6  # of the largest logit; float32 rounding in other reduction orders stays below it
CHECKED_BATCHES, CHECKED_ROWS, CHECKED_LENGTH = 1, 4, 32  # the function of every position, so a hundred will do
PROBES = 4  # random inputs on which each projection is compared


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


def measure(
    old: TrainState, new: TrainState, old_cfg: Config, cfg: Config, step: Step, batches: list[Batch]
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
        figures[name] = max(float(row[name]) for row in each)
    for kind in ("key", "value"):
        norms = [norms[f"{kind}s"] for norms in figures["gradient_norms"].values()]
        figures[f"new_{kind}_gradient_norm"] = math.hypot(*norms)
    return figures


def comparison(old_cfg: Config, cfg: Config, step: Step) -> Callable[[TrainState, TrainState, Batch], dict[str, Any]]:
    """What `measure` compiles: both models on one batch. A device holds no more of a stack than a layer at a time."""

    def model(cfg: Config) -> Any:
        graphdef, _, _ = abstract_model(dataclasses.replace(cfg.model, dtype="float32", remat="full"))
        return lambda params: nnx.merge(graphdef, params)

    old_model, new_model = model(old_cfg), model(cfg)
    grown = {name: count for name, count in old_cfg.model.tokens.items() if cfg.model.tokens[name] > count}
    shardings = jax.tree.map(lambda a: a.sharding, step.abstract_state.params)

    def norm_of_new(gradient_LND: jax.Array, tokens: int) -> jax.Array:
        is_new_N1 = jnp.arange(gradient_LND.shape[1])[:, None] >= tokens
        return jnp.linalg.norm(jnp.where(is_new_N1, gradient_LND, 0.0))  # a slice would move what is sharded

    def compare(old: TrainState, new: TrainState, batch: Batch) -> dict[str, Any]:
        segments = batch.segments_BL if cfg.data.mask_documents else None
        before, _ = old_model(old.params)(batch.tokens_BL, old.tau_now(), segments_BL=segments)

        def mean_loss(logits: jax.Array) -> jax.Array:
            nll, weights = sum_losses(logits, batch)
            return nll / weights

        def loss_after(params: Params) -> tuple[jax.Array, jax.Array]:
            after, _ = new_model(params)(batch.tokens_BL, new.tau_now(), segments_BL=segments)
            return mean_loss(after), after

        (loss, after), gradients = jax.value_and_grad(loss_after, has_aux=True)(new.params)
        gradients = jax.lax.with_sharding_constraint(gradients, shardings)
        norms = {
            name: jax.tree.map(lambda g, count=count: norm_of_new(g, count), gradients["blocks"][name])
            for name, count in grown.items()
        }
        return {
            "moved": moved(old, new, list(grown), cfg.model),
            "max_logit_difference": jnp.max(jnp.abs(after - before)),
            "max_logit": jnp.max(jnp.abs(before)),
            "loss_before": mean_loss(before),
            "loss_after": loss,
            "gradient_norms": norms,
        }

    return compare


def moved(old: TrainState, new: TrainState, grown: list[str], cfg: ModelConfig) -> dict[str, jax.Array]:
    """How far arrays moved, and in each layer [L] the outputs of projections that grew; of their largest entry."""

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


def main() -> None:
    cfg = _CONFIG()
    if _SHRINK.value:
        if _RECIPE.value:
            raise UserError(f"--recipe={_RECIPE.value}: says what new tokens hold, and --shrink makes none")
        figures = shrink(_SOURCE(), cfg, _WORKDIR(), _STEP.value)
        if jax.process_index() == 0:
            print(describe_shrinking(figures))
        return
    if _RECIPE.value:
        cfg = dataclasses.replace(cfg, grow=dataclasses.replace(cfg.grow, recipe=_RECIPE.value))
        validate(cfg)
    figures = grow(_SOURCE(), cfg, _WORKDIR(), _STEP.value)
    if jax.process_index() == 0:
        print(describe(figures))
        recipe = RECIPES[cfg.grow.recipe]
        if figures["tokens_before"] == figures["tokens_after"]:
            print("no token count changed: the new workdir continues the same model")
        elif not recipe.learns:
            print("warning: with zero keys and zero values the new tokens have no gradient and can never learn")
        elif not recipe.lossless:
            print(f"warning: {cfg.grow.recipe} is not lossless: the model has changed")


if __name__ == "__main__":
    _CONFIG = config_flag()
    _SOURCE = workdir_flag("source", "the directory of the run to grow")
    _WORKDIR = workdir_flag(help_text="the new directory, which train then resumes")
    _STEP = flags.DEFINE_integer("step", None, "which checkpoint of the source; by default the newest")
    _RECIPE = flags.DEFINE_string("recipe", None, f"{', '.join(RECIPES)}; overrides config.grow.recipe")
    _SHRINK = flags.DEFINE_boolean("shrink", False, "drop parameter tokens instead, the least useful first")
    run_command(main)
