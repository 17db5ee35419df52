"""Another image size for a trained classifier: its learned positions are interpolated to the new grid of patches.

As is customary where a model trained at 224 pixels is fine-tuned at 384. All else stays; moments are interpolated, too.
"""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.perplexity import evaluate_split
from tokenformer_jax.growth.recipes import check_same_but_sizes
from tokenformer_jax.growth.resize import Resize, Source, resize_run
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import Step


def interpolate(
    source: pathlib.Path, cfg: Config, workdir: pathlib.Path, step_number: int | None = None
) -> dict[str, Any]:
    """Makes a new workdir of a checkpoint for the config's image size, as `resize_run` says."""
    return resize_run(Interpolating(), source, cfg, workdir, step_number)


class Interpolating:
    """The `resize.Change` to another image size."""

    file = "grow.json"
    verb = "interpolate"
    appends = False
    recipe = "interpolate"
    ramps = False

    def check(self, old: ModelConfig, new: ModelConfig) -> None:
        if not new.image_size or new.image_size == old.image_size:
            raise UserError(
                f"model.image_size = {new.image_size}: --interpolate makes a model for another size of images than the "
                f"source's {old.image_size}; use another, or leave --interpolate out"
            )
        check_same_but_sizes(dataclasses.replace(old, image_size=new.image_size), new, "--interpolate")
        if old.tokens != new.tokens or old.ffn_tokens != new.ffn_tokens:
            raise UserError("model.ffn_tokens: --interpolate changes no token counts; use the source's, and grow later")

    def model(self, resize: Resize, old: TrainState, data: Any) -> tuple[TrainState, None]:
        cfg, abstract = resize.cfg.model, resize.step.abstract_state._replace(opt_state=())
        fit = jax.jit(lambda state: fitted(state, cfg, "cubic"), out_shardings=_shardings(abstract))
        return fit(old), None

    def compare(self, resize: Resize, old: TrainState, new: TrainState, validation: Any) -> dict[str, float]:
        """Both models, each at its own size, on the batches of the validation split that `train` evaluates on."""

        def evaluate(step: Step, state: TrainState, cfg: Config) -> dict[str, float]:
            seen = dataclasses.replace(validation, size=cfg.model.image_size)
            return evaluate_split(step, state, seen, cfg, max_batches=cfg.eval_batches)

        before = evaluate(resize.old_step, old, resize.old_cfg)
        after = evaluate(resize.step, new, resize.cfg)
        return {"loss_before": before["loss"], "loss_after": after["loss"]}

    def moments(self, resize: Resize, source: Source, known: None) -> Any:
        cfg, wanted = resize.cfg.model, resize.step.abstract_state.opt_state
        # Linear: a second moment stays above 0.
        fit = jax.jit(lambda state: fitted(state, cfg, "linear"), out_shardings=_shardings(wanted))
        return fit(source.moments(resize.old_step))


def _shardings(abstract: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, abstract)


def fitted(tree: Any, cfg: ModelConfig, method: str) -> Any:
    """A state, or a part of it, with positions for the config's image size."""
    is_params = lambda part: isinstance(part, dict) and "positions" in part  # noqa: E731

    def of_params(part: Any) -> Any:
        return part | {"positions": resized(part["positions"], cfg, method)} if is_params(part) else part

    return jax.tree.map(of_params, tree, is_leaf=is_params)


def resized(positions_LD: jax.Array, cfg: ModelConfig, method: str) -> jax.Array:
    """Positions on another grid; the class token's, which comes first, stays."""
    before = cfg.positions - cfg.num_patches
    first, patches_PD = positions_LD[:before], positions_LD[before:]
    old, new = math.isqrt(len(patches_PD)), math.isqrt(cfg.num_patches)
    grid = jax.image.resize(patches_PD.reshape(old, old, -1), (new, new, patches_PD.shape[1]), method)
    return jnp.concatenate([first, grid.reshape(new * new, -1)])
