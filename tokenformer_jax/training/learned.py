"""What of a model learns: all of it or, for good, the tokens of a growth alone.

Then parameters stay as they are in shape and place, and all but the step works as ever. Gradients and moments exist for
the new tokens only, which are the last ones of each projection that grew; the step puts them back where they were.
"""

import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from tokenformer_jax.errors import UserError
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.training.schedule import NewTokens


def alone(new: NewTokens | None) -> TypeGuard[NewTokens]:
    """Whether only new tokens learn."""
    return new is not None and new.alone


def check_mesh(new: NewTokens | None, tokens: dict[str, int], parts: int) -> None:
    """Raises a UserError where what learns cannot be spread over so many devices as the tokens are."""
    for name, first in new.tokens.items() if alone(new) else ():
        if (count := tokens[name] - first) % parts:
            raise UserError(
                f"mesh.tensor = {parts}: must divide the {count} new tokens of {name}, which learn alone; use "
                f"{math.gcd(count, parts)}"
            )


def part_of(tree: Params, new: NewTokens | None) -> Params:
    """What of a tree like the parameters belongs to what learns; of projections that grew old tokens, too."""
    return {"blocks": {name: tree["blocks"][name] for name in new.tokens}} if alone(new) else tree


def learned(params: Params, new: NewTokens | None) -> Params:
    """The parameters that learn."""
    if not alone(new):
        return params
    parts = {
        name: jax.tree.map(lambda x_YND, n=n: x_YND[:, n:], params["blocks"][name]) for name, n in new.tokens.items()
    }
    return {"blocks": parts}


def put_back(params: Params, learnt: Params, new: NewTokens | None) -> Params:
    """The parameters with what has learnt in its place; all else is as it was, to the bit."""
    if not alone(new):
        return learnt
    old, parts = params["blocks"], learnt["blocks"]
    return params | {"blocks": old | {name: jax.tree.map(_with_last, old[name], part) for name, part in parts.items()}}


def _with_last(x_YND: jax.Array, last_YMD: jax.Array) -> jax.Array:
    first = x_YND.shape[1] - last_YMD.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] == 1:
        return x_YND.at[:, first:].set(last_YMD)
    # Where tokens are spread over devices, an update of some would gather all.
    is_new_N1 = jnp.arange(x_YND.shape[1])[:, None] >= first
    return jnp.where(is_new_N1, jnp.pad(last_YMD, ((0, 0), (first, 0), (0, 0))), x_YND)


def learn_alone(model: Any, learnt: Params, new: NewTokens | None, projections: list[str]) -> None:
    """Has what learns, of value as in the model, get all of its gradient."""
    if not alone(new):
        return
    for name in projections:
        projection = getattr(model.blocks, name)
        none = {kind: getattr(projection, kind)[...][:, :0] for kind in ("keys", "values")}
        projection.learn_alone(**learnt["blocks"].get(name, none))
