"""Steps whose loss or gradient is not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tokenformer_jax.devices.sharding import platform
from tokenformer_jax.nn.layers import Params


def if_finite(finite: jax.Array, learn: Callable, params: Params, opt_state: optax.OptState, grads: Params) -> Any:
    """learn(params, opt_state, grads) if the step was finite, else params and opt_state as they were.

    Integers, which count steps, go on. A CPU branches: to select between all old and new arrays takes it as long again
    as to learn.
    """

    def skip(params: Params, opt_state: optax.OptState, grads: Params) -> tuple[Params, optax.OptState]:
        return params, jax.tree.map(lambda x: x + jnp.issubdtype(x.dtype, jnp.integer), opt_state)

    if platform() == "cpu":
        return jax.lax.cond(finite, learn, skip, params, opt_state, grads)
    new, old = (function(params, opt_state, grads) for function in (learn, skip))
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
