"""Growing: more parameter tokens, the same function, verified before anything is kept.

`recipes` says what new tokens hold; Adam's moments are padded with zeros.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.growth.figures import token_counts
from tokenformer_jax.growth.recipes import RECIPES, Growth, check_growth
from tokenformer_jax.growth.resize import Resize, Source, pad, resize_run
from tokenformer_jax.growth.verify import CHECKED_BATCHES, CHECKED_LENGTH, CHECKED_ROWS, measure, verify
from tokenformer_jax.nn.language import init_params
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.training.state import TauRamp, TrainState
from tokenformer_jax.training.tasks import task_of


def grow(source: pathlib.Path, cfg: Config, workdir: pathlib.Path, step_number: int | None = None) -> dict[str, Any]:
    """Grows a checkpoint of `source` to the config's token counts, into a new workdir, as `resize_run` says."""
    return resize_run(Growing(cfg.grow.recipe), source, cfg, workdir, step_number)


class Growing:
    """The `resize.Change` that appends parameter tokens."""

    file = "grow.json"
    verb, appends = "append", True

    def __init__(self, recipe: str) -> None:
        self.recipe, self.ramps = recipe, RECIPES[recipe].ramps

    def check(self, old: ModelConfig, new: ModelConfig) -> None:
        check_growth(old, new, self.recipe)

    def model(self, resize: Resize, old: TrainState, data: Any) -> tuple[TrainState, None]:
        abstract = resize.step.abstract_state._replace(opt_state=())
        cfg, key = resize.cfg, jax.random.fold_in(jax.random.key(resize.cfg.seed), resize.number)
        draw = task_of(cfg).init_params
        append = jax.jit(
            lambda state, key: grow_state(state, abstract, cfg.model, key, self.recipe, resize.ramp_steps, draw),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )
        return append(old, key), None

    def compare(self, resize: Resize, old: TrainState, new: TrainState, validation: Any) -> dict[str, Any]:
        """Both models on batches of the validation split."""
        cfg, shards = resize.cfg, resize.cfg.mesh.batch_shards
        rows = shards * max(1, CHECKED_ROWS // shards)
        batches = task_of(cfg).eval_batches(validation, cfg, resize.step.mesh, rows, CHECKED_BATCHES, CHECKED_LENGTH)
        figures = measure(old, new, resize.old_cfg, cfg, resize.step, batches)
        verify(figures, self.recipe)
        return figures

    def moments(self, resize: Resize, source: Source, known: None) -> Any:
        padded = source.moments(resize.step)
        return forget_moments(padded) if RECIPES[self.recipe].resets_optimizer else padded


def grow_state(
    state: TrainState,
    abstract: TrainState,
    cfg: ModelConfig,
    key: jax.Array,
    recipe: str,
    ramp_steps: int,
    draw: Callable[[ModelConfig, jax.Array], Params] = init_params,
) -> TrainState:
    """Appends parameter tokens to a state; a pure function, to be jitted with the grown state's shardings.

    Args:
      state: of the smaller model. Without its optimizer state (an empty tuple) only the model grows.
      abstract: shapes of the grown state.
      cfg: the grown model's config.
      key: PRNG key of what the new tokens hold.
      recipe: a key of `RECIPES`.
      ramp_steps: steps over which τ goes from what the recipe says to `initial_tau(cfg)`; 0 keeps it for good.
      draw: the initializer of the grown model's parameters.

    Returns:
      The grown state. With a lossless recipe its model computes what the smaller one computes, up to rounding.
    """
    params, tau = append_tokens(state, state.params, abstract, cfg, key, recipe, ramp_steps, draw)
    average: Any = ()
    if state.average:
        average, _ = append_tokens(state, state.average, abstract, cfg, key, recipe, ramp_steps, draw)
    opt_state = jax.tree.map(pad, state.opt_state, abstract.opt_state) if state.opt_state else ()
    if RECIPES[recipe].resets_optimizer:
        opt_state = forget_moments(opt_state)
    return TrainState(state.step, params, opt_state, tau, average)


def append_tokens(
    state: TrainState,
    params: Any,
    abstract: TrainState,
    cfg: ModelConfig,
    key: jax.Array,
    recipe: str,
    ramp_steps: int,
    draw: Callable[[ModelConfig, jax.Array], Params],
) -> tuple[Params, dict[str, TauRamp]]:
    """Parameters with appended tokens, and each projection's τ; arguments as of `grow_state`."""
    params = jax.tree.map(pad, params, abstract.params)
    drawn = draw(cfg.padding_counted(), key)["blocks"]
    blocks, tau = dict(params["blocks"]), dict(state.tau)
    for number, (name, tokens) in enumerate(token_counts(state).items()):
        if cfg.tokens[name] == tokens:
            continue
        born = jnp.float32(initial_tau(cfg)[name])
        grown = RECIPES[recipe].apply(
            Growth(
                keys_YND=blocks[name]["keys"],
                values_YNE=blocks[name]["values"],
                drawn_keys_YND=drawn[name]["keys"],
                drawn_values_YNE=drawn[name]["values"],
                is_new_N1=jnp.arange(cfg.tokens[name])[:, None] >= tokens,
                tokens=tokens,
                tau=state.tau[name].at(state.step),
                target=born,
                key=jax.random.fold_in(key, number),
            )
        )
        blocks[name] = {"keys": grown.keys_YND, "values": grown.values_YNE}
        target = born if ramp_steps else grown.tau
        tau[name] = TauRamp(grown.tau, target, state.step, state.step + ramp_steps)
    return params | {"blocks": blocks}, tau


def forget_moments(opt_state: Any) -> Any:
    """An optimizer state whose Adam begins anew, at the same point of its schedule."""
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    return jax.tree.map(
        lambda part: jax.tree.map(jnp.zeros_like, part) if is_adam(part) else part, opt_state, is_leaf=is_adam
    )
