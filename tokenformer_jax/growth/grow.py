"""Growing: more parameter tokens, the same function, verified before anything is kept.

`recipes` says what new tokens hold; Adam's moments are padded with zeros.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.data.batches import eval_batches
from tokenformer_jax.data.tokens import TokenSplit
from tokenformer_jax.devices.sharding import this_process
from tokenformer_jax.growth.figures import token_counts
from tokenformer_jax.growth.recipes import RECIPES, Growth, check_growth
from tokenformer_jax.growth.resize import Resize, Source, pad, resize_run
from tokenformer_jax.growth.verify import CHECKED_BATCHES, CHECKED_LENGTH, CHECKED_ROWS, measure, verify
from tokenformer_jax.nn.language import init_params, initial_tau
from tokenformer_jax.training.state import TauRamp, TrainState


def grow(source: pathlib.Path, cfg: Config, workdir: pathlib.Path, step_number: int | None = None) -> dict[str, Any]:
    """Grows a checkpoint of `source` to the config's token counts, into a new workdir, as `resize_run` says."""
    return resize_run(Growing(cfg.grow.recipe), source, cfg, workdir, step_number)


class Growing:
    """The `resize.Change` that appends parameter tokens."""

    file = "grow.json"
    verb = "append"

    def __init__(self, recipe: str) -> None:
        self.recipe, self.ramps = recipe, RECIPES[recipe].ramps

    def check(self, old: ModelConfig, new: ModelConfig) -> None:
        check_growth(old, new, self.recipe)

    def model(self, resize: Resize, old: TrainState) -> tuple[TrainState, None]:
        abstract = resize.step.abstract_state._replace(opt_state=())
        cfg, key = resize.cfg, jax.random.fold_in(jax.random.key(resize.cfg.seed), resize.number)
        append = jax.jit(
            lambda state, key: grow_state(state, abstract, cfg.model, key, self.recipe, resize.ramp_steps),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )
        return append(old, key), None

    def compare(self, resize: Resize, old: TrainState, new: TrainState, validation: TokenSplit) -> dict[str, Any]:
        """Both models on batches of the validation split."""
        cfg, shards = resize.cfg, resize.cfg.mesh.batch_shards
        rows, length = shards * max(1, CHECKED_ROWS // shards), min(CHECKED_LENGTH, cfg.model.context_length)
        part = this_process(resize.step.mesh)
        batches = eval_batches(validation, rows, length, max_batches=CHECKED_BATCHES, **part)
        figures = measure(old, new, resize.old_cfg, cfg, resize.step, list(batches))
        verify(figures, self.recipe)
        return figures

    def moments(self, resize: Resize, source: Source, known: None) -> Any:
        padded = source.moments(resize.step)
        return forget_moments(padded) if RECIPES[self.recipe].resets_optimizer else padded


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
