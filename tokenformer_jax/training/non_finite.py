"""Steps whose loss or gradient is not finite, or whose loss is a spike."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokenformer_jax.errors import UserError
from tokenformer_jax.nn.backends import choose
from tokenformer_jax.nn.layers import Params


def if_finite(finite: jax.Array, learn: Callable, params: Params, opt_state: optax.OptState, grads: Params) -> Any:
    """learn(params, opt_state, grads) if the step was finite, else params and opt_state as they were.

    Integers, which count steps, go on.
    """

    def skip(params: Params, opt_state: optax.OptState, grads: Params) -> tuple[Params, optax.OptState]:
        return params, jax.tree.map(lambda x: x + jnp.issubdtype(x.dtype, jnp.integer), opt_state)

    return choose(finite, learn, skip, params, opt_state, grads)


SPIKE_WINDOW = 20  # steps whose mean loss tells a spike


class BadStep(UserError):
    """A step whose loss or gradient is not finite, or whose loss is a spike."""

    def __init__(self, step: int, examples: tuple[int, int], why: str):
        super().__init__(
            f"step {step}: {why}; a lower optimizer.peak_learning_rate may do, or non_finite = 'skip' or 'rollback'; "
            f"evaluate's --examples={examples[0]}:{examples[1]} shows the batch"
        )
        self.step, self.examples, self.why = step, examples, why


def what_is_bad(
    loss: float, grad_norm: float, norms: np.ndarray, names: Sequence[str], losses: Collection[float], spike: float
) -> str:
    """Why a step did not learn, or should not have; empty where all is well.

    Args:
      loss: of the step.
      grad_norm: of its whole gradient.
      norms: of the gradient of each array.
      names: of these arrays.
      losses: of the last SPIKE_WINDOW good steps, or fewer.
      spike: nats above their mean that count as a spike; 0: none do.
    """
    if not math.isfinite(loss + grad_norm):
        largest = np.argsort(-np.nan_to_num(norms, nan=np.inf), kind="stable")[:3]
        arrays = ", ".join(f"{names[i]} ({norms[i]:.3g})" for i in largest)
        return f"loss {loss:g}, grad_norm {grad_norm:g}, and the largest gradients are those of {arrays}"
    if spike and len(losses) >= SPIKE_WINDOW:
        mean = sum(losses) / len(losses)
        if loss > mean + spike:
            return f"loss {loss:.4g} is more than {spike:g} nats above {mean:.4g}, the mean before"
    return ""
