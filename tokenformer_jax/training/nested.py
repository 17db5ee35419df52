"""One model of several sizes: its first parameter tokens are a model of their own, at each of `model.nested`.

A size has the first part of every projection's tokens, all else in common, and τ = √N of its own N tokens. Training
takes the sizes in turn, a step each, so that what serves all of them comes first.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tokenformer_jax.config import SIZES, ModelConfig
from tokenformer_jax.errors import UserError
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import initial_tau


def at(cfg: ModelConfig, part: float) -> ModelConfig:
    """The model of a size. Raises a UserError where the model has no such size."""
    # The message below prints six digits of a size, and those must do.
    if not any(math.isclose(part, size, rel_tol=1e-5) for size in cfg.nested):
        if not cfg.nested:
            raise UserError(
                f"--tokens={part:g}: the model has one size (model.nested = ()); grow --shrink makes a smaller one"
            )
        raise UserError(f"--tokens={part:g}: the model's sizes are {', '.join(f'{size:g}' for size in cfg.nested)}")
    if part == 1:
        return dataclasses.replace(cfg, nested=())
    counts: Any = {size: max(1, round(part * getattr(cfg, size))) for size in SIZES}
    return dataclasses.replace(cfg, nested=(), pad_tokens_to=0, **counts)


def sizes(cfg: ModelConfig) -> list[ModelConfig]:
    """The models of all sizes, the largest last; of a model that is not nested itself."""
    return [at(cfg, part) for part in cfg.nested] or [cfg]


def cut(params: Params, size: ModelConfig) -> Params:
    """The parameters of a size."""
    blocks = {
        name: {kind: x_YND[:, : size.tokens[name]] for kind, x_YND in part.items()}
        for name, part in params["blocks"].items()
    }
    return params | {"blocks": blocks}


def check_mesh(cfg: ModelConfig, tensor: int) -> None:
    """Raises a UserError where a size's tokens cannot be spread over so many devices."""
    for part in cfg.nested:
        for name, count in at(cfg, part).tokens.items():
            if count % tensor:
                raise UserError(
                    f"model.nested: {part:g} of the tokens of {name} are {count}, which mesh.tensor = {tensor} must "
                    "divide; use other counts, or mesh.tensor = 1"
                )


def check_tau(cfg: ModelConfig, tau: Mapping[str, Any]) -> None:
    """Raises a UserError where the largest size could not become a smaller one, whose τ is √N."""
    for name, final in initial_tau(cfg).items() if cfg.nested else ():
        if not math.isclose(tau[name], final, rel_tol=1e-5):
            raise UserError(
                f"model.nested: τ of {name} is {float(tau[name]):.6g} in the source, and a size has {final:.6g}; use a "
                "checkpoint after the end of its ramp (grow.tau_ramp)"
            )


def check_growth(old: ModelConfig, new: ModelConfig) -> None:
    """Raises a UserError where a model would lose a size that it had."""
    there = [size.tokens for size in sizes(new)]
    if not old.nested or all(size.tokens in there for size in sizes(old)):
        return
    raise UserError(
        f"model.nested = {new.nested}: the source's sizes must stay, the largest of them too; use "
        f"{grown_parts(old, new)}, and counts that grow alike"
    )


def grown_parts(old: ModelConfig, new: ModelConfig) -> tuple[float, ...]:
    """The sizes of a model that has grown from a nested one, whose sizes stay; none of a model that is not nested."""
    if not old.nested:
        return ()
    return tuple(sorted({1.0, *(round(size.ffn_tokens / max(new.ffn_tokens, 1), 9) for size in sizes(old))}))


def check_shrinking(new: ModelConfig) -> None:
    """Raises a UserError where a model that lost tokens would have sizes: those that stay are not the first ones."""
    if new.nested:
        raise UserError(
            f"model.nested = {new.nested}: --shrink drops tokens of every size, so none of them would be left; "
            "set it to ()"
        )
