"""Pattention with its gradient written out; `pattention.plain_pattention` is the same without.

The gradient is written out for four reasons. Of all that has N columns only the scores are kept for it, or nothing, and
the weights are computed again; but not the sum over N, which devices would exchange again. Between the two stages it is
rounded to the inputs' dtype, since that is what a TPU stores there: half the memory of a step in bfloat16, and a sixth
of its time. And each device sums both parameters' gradients in float32 over all its positions, before they are added up
and scattered once.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tokenformer_jax.devices.sharding import constrain, sum_over_batch
from tokenformer_jax.nn import row_kernels
from tokenformer_jax.nn.backends import product_with_keys, product_with_values, sum_outer
from tokenformer_jax.nn.layers import GELUS, Gelu, inverse_norm


class Stages(NamedTuple):
    """A normalizer Θ as two stages around r, all in it that depends on more than one token: sums over N.

    Where N is spread over devices, they exchange r and, in the gradient, dr; nothing else.
    """

    total: Callable[[jax.Array, Gelu], jax.Array]  # float32 scores s [..., N] -> r [..., 1]; softmax [..., 2]
    total_gradient: Callable[[jax.Array, jax.Array, jax.Array, Gelu], jax.Array]  # dr, s, r -> its part of ds
    first: Callable[[jax.Array, jax.Array, Gelu], jax.Array]  # s, r -> n [..., N]
    second: Callable[[jax.Array, jax.Array, jax.Array, Gelu], jax.Array]  # n, r, τ -> the weights


def _sum_of_squares(x_BLN: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x_BLN), axis=-1, keepdims=True)


SCORES = 300_000_000  # of a device, at most, that are computed again at once

STAGES = {
    "l2_norm_gelu": Stages(  # equation 5
        total=lambda s, gelu: _sum_of_squares(s),
        total_gradient=lambda dr, s, r, gelu: dr * 2 * s,
        first=lambda s, r, gelu: s * inverse_norm(r),
        second=lambda n, r, tau, gelu: gelu(tau * n),
    ),
    "gelu_l2_norm": Stages(
        total=lambda s, gelu: _sum_of_squares(gelu(s)),
        total_gradient=lambda dr, s, r, gelu: dr * jax.grad(lambda s: jnp.sum(jnp.square(gelu(s))))(s),
        first=lambda s, r, gelu: gelu(s),
        second=lambda n, r, tau, gelu: tau * n * inverse_norm(r),
    ),
    "softmax": Stages(  # whose r [..., 2] is the largest score, to which it is indifferent, and the sum
        total=lambda s, gelu: jnp.stack([s.max(-1), jnp.sum(jnp.exp(s - s.max(-1, keepdims=True)), -1)], -1),
        total_gradient=lambda dr, s, r, gelu: dr[..., 1:] * jnp.exp(s - r[..., :1]),
        first=lambda s, r, gelu: jnp.exp(s - jax.lax.stop_gradient(r[..., :1])),
        second=lambda n, r, tau, gelu: tau**2 * n / r[..., 1:],  # τ² = N at birth
    ),
}


class How(NamedTuple):
    normalizer: str
    gelu: str
    recompute: bool

    def by_rows(self, scale_B1N: jax.Array | None) -> bool:
        """Whether `row_kernels` compute it."""
        return self.normalizer == "l2_norm_gelu" and scale_B1N is None and row_kernels.apply()


def _gathered(tokens_ND: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Stored tokens as they are computed with: cast first, so that what fsdp gathers is in the computation's dtype."""
    return constrain(tokens_ND.astype(dtype), "tokens", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attend(x_BLD, keys_ND, values_NE, tau, scale_B1N, new_MD, how: How) -> jax.Array:
    """`new_MD`: None, or the last M keys and values once more, which alone get a gradient then."""
    return _attend_forward(x_BLD, keys_ND, values_NE, tau, scale_B1N, new_MD, how)[0]


def _weights(normed_BLN, total_BL1, tau, scale_B1N, how: How) -> jax.Array:
    weights_BLN = STAGES[how.normalizer].second(normed_BLN, total_BL1, tau, GELUS[how.gelu])
    return weights_BLN if scale_B1N is None else weights_BLN * scale_B1N


def _attend_forward(x_BLD, keys_ND, values_NE, tau, scale_B1N, new_MD, how):
    norm, gelu = STAGES[how.normalizer], GELUS[how.gelu]
    scores_BLN = product_with_keys(x_BLD, _gathered(keys_ND, x_BLD.dtype))
    if how.by_rows(scale_B1N):
        local = functools.partial(_weights_by_rows, how=how)  # of one device
        (weights_BLN, total_BL1), _ = sum_over_batch(local, (scores_BLN,), (tau,))
        total_BL1 = checkpoint_name(total_BL1, "total")
    else:
        s_BLN = scores_BLN.astype(jnp.float32)
        total_BL1 = checkpoint_name(norm.total(s_BLN, gelu), "total")
        weights_BLN = _weights(norm.first(s_BLN, total_BL1, gelu), total_BL1, tau, scale_B1N, how).astype(x_BLD.dtype)
    y_BLE = product_with_values(weights_BLN, _gathered(values_NE, x_BLD.dtype))
    kept = None if how.recompute else scores_BLN
    return y_BLE, (x_BLD, keys_ND, values_NE, tau, scale_B1N, new_MD, total_BL1, kept)


def _weights_by_rows(scores_BLN, tau, *, how):
    weights_PN, squares_P = row_kernels.weights(scores_BLN.reshape(-1, scores_BLN.shape[-1]), tau, how.gelu)
    return (weights_PN.reshape(scores_BLN.shape), squares_P.reshape(*scores_BLN.shape[:-1], 1)), ()


def _gradient_by_rows(scores_BLN, dweights_BLN, total_BL1, tau, scale_B1N, how):
    """The weights, and the scores' gradient."""
    scores_PN, dweights_PN = (x.reshape(-1, x.shape[-1]) for x in (scores_BLN, dweights_BLN))
    both = row_kernels.weights_gradient(scores_PN, dweights_PN, total_BL1.reshape(-1), tau, how.gelu)
    return tuple(x_PN.reshape(scores_BLN.shape) for x_PN in both)


def _gradient_in_stages(scores_BLN, dweights_BLN, total_BL1, tau, scale_B1N, how):
    """The same by XLA, with any normalizer."""
    dtype, norm, gelu = scores_BLN.dtype, STAGES[how.normalizer], GELUS[how.gelu]
    s_BLN = scores_BLN.astype(jnp.float32)
    normed_BLN, first_backward = jax.vjp(lambda s, r: norm.first(s, r, gelu), s_BLN, total_BL1)
    second = functools.partial(_weights, tau=tau, scale_B1N=scale_B1N, how=how)
    weights_BLN, second_backward = jax.vjp(second, normed_BLN, total_BL1)
    dnormed_BLN, dtotal_BL1 = second_backward(dweights_BLN.astype(jnp.float32))
    ds_BLN, more_BL1 = first_backward(dnormed_BLN.astype(dtype).astype(jnp.float32))
    ds_BLN += norm.total_gradient(dtotal_BL1 + more_BL1, s_BLN, total_BL1, gelu)
    return weights_BLN.astype(dtype), ds_BLN.astype(dtype)


def _attend_backward(how, kept, dy_BLE):
    x_BLD, keys_ND, values_NE, tau, scale_B1N, new_MD, total_BL1, scores_BLN = kept
    dtype = x_BLD.dtype
    learned = (keys_ND, values_NE) if new_MD is None else new_MD
    frozen = len(keys_ND) - len(learned[0])

    def onto_tokens(a_BLD, b_BLN):  # of those that learn
        if frozen == b_BLN.shape[-1]:
            return jnp.zeros((a_BLD.shape[-1], 0), jnp.float32)
        return constrain(sum_outer(a_BLD, b_BLN[..., frozen:]), None, "tokens")

    def gradients(x_BLD, dy_BLE, total_BL1, scores_BLN, scale_B1N, keys_ND, values_NE, tau):
        keys_ND, values_NE = (constrain(tokens, "tokens", None) for tokens in (keys_ND, values_NE))
        if scores_BLN is None:
            scores_BLN = jnp.einsum("...d,nd->...n", x_BLD, keys_ND)
        dweights_BLN = jnp.einsum("...e,ne->...n", dy_BLE, values_NE)
        gradient = _gradient_by_rows if how.by_rows(scale_B1N) else _gradient_in_stages
        weights_BLN, dscores_BLN = gradient(scores_BLN, dweights_BLN, total_BL1, tau, scale_B1N, how)
        sums = onto_tokens(x_BLD, dscores_BLN), onto_tokens(dy_BLE, weights_BLN)
        return jnp.einsum("...n,nd->...d", dscores_BLN, keys_ND), sums

    def local(x_BLD, dy_BLE, total_BL1, scores_BLN, scale_B1N, *others):  # of the devices that share an example
        parts = 1 if scores_BLN is not None else _parts(x_BLD.shape, len(keys_ND))
        if parts == 1:
            return gradients(x_BLD, dy_BLE, total_BL1, scores_BLN, scale_B1N, *others)

        def add(sums, part):
            x_CLD, dy_CLE, total_CL1, scale_C1N = part
            dx_CLD, more = gradients(x_CLD, dy_CLE, total_CL1, None, scale_C1N, *others)
            return jax.tree.map(jnp.add, sums, more), dx_CLD

        zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in (learned[0].shape[::-1], learned[1].shape[::-1]))
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (x_BLD, dy_BLE, total_BL1, scale_B1N))
        sums, dx_PCLD = jax.lax.scan(add, zeros, split)
        return dx_PCLD.reshape(x_BLD.shape), sums

    rows = x_BLD, dy_BLE, total_BL1, scores_BLN, scale_B1N
    shared = _gathered(keys_ND, dtype), _gathered(values_NE, dtype), tau
    dx_BLD, (dkeys_DN, dvalues_EN) = sum_over_batch(local, rows, shared)
    dkeys_ND = constrain(dkeys_DN.T.astype(keys_ND.dtype), "tokens", "embed")
    dvalues_NE = constrain(dvalues_EN.T.astype(values_NE.dtype), "tokens", "embed")
    if new_MD is not None:
        return dx_BLD, None, None, None, None, (dkeys_ND, dvalues_NE)
    return dx_BLD, dkeys_ND, dvalues_NE, None, None, None


def _parts(shape: tuple[int, ...], num_tokens: int) -> int:
    """In how many equal parts the B examples [B, L, D] are worked through, so that each has SCORES scores at most.

    In two at least where there are many: a loop keeps the compiler from computing several projections' scores ahead.
    """
    scores = math.prod(shape[:-1]) * num_tokens
    if len(shape) != 3 or scores <= SCORES / 3:
        return 1
    fits = (n for n in range(2, shape[0]) if shape[0] % n == 0 and scores / n <= SCORES)
    return next(fits, shape[0])


attend.defvjp(_attend_forward, _attend_backward)
