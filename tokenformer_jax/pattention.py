"""Token-Parameter attention (TokenFormer, arXiv 2410.23168, section 3.2): attention over learnable tokens."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tokenformer_jax import row_kernels
from tokenformer_jax.sharding import constrain, platform, sum_over_batch

Gelu = Callable[[jax.Array], jax.Array]


def erf_gelu(x: jax.Array) -> jax.Array:
    """x Φ(x) as PyTorch computes it; jax.nn.gelu's erfc costs a TPU several times as many operations."""
    return x * 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


# The exact gelu of the authors' PyTorch code, and the tanh approximation (JAX's default) of their TPU code.
GELUS: dict[str, Gelu] = {"erf": erf_gelu, "tanh": functools.partial(jax.nn.gelu, approximate=True)}


class Normalizer(NamedTuple):
    """Θ as two stages around r, all in it that depends on more than one token: sums over N for each position.

    Where N is spread over devices, they exchange r and, in the gradient, dr; nothing else.
    """

    total: Callable[[jax.Array, Gelu], jax.Array]  # float32 scores s [..., N] -> r [..., 1]; softmax [..., 2]
    total_gradient: Callable[[jax.Array, jax.Array, jax.Array, Gelu], jax.Array]  # dr, s, r -> its part of ds
    first: Callable[[jax.Array, jax.Array, Gelu], jax.Array]  # s, r -> n [..., N]
    second: Callable[[jax.Array, jax.Array, jax.Array, Gelu], jax.Array]  # n, r, τ -> the weights


def _sum_of_squares(x_BLN: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x_BLN), axis=-1, keepdims=True)


def _inverse_norm(squares_BL1: jax.Array) -> jax.Array:
    """1 / ‖x‖₂; of rows shorter than 1e-12 zero, with a gradient of zero."""
    nonzero = squares_BL1 > 1e-24
    return jnp.where(nonzero, jax.lax.rsqrt(jnp.where(nonzero, squares_BL1, 1.0)), 0.0)


SCORES = 300_000_000  # of a device, at most, that are computed again at once
GROUPS = 4  # of tokens, at most, that a CPU's cores work on at once for a single position

NORMALIZERS = {
    "l2_norm_gelu": Normalizer(  # equation 5
        total=lambda s, gelu: _sum_of_squares(s),
        total_gradient=lambda dr, s, r, gelu: dr * 2 * s,
        first=lambda s, r, gelu: s * _inverse_norm(r),
        second=lambda n, r, tau, gelu: gelu(tau * n),
    ),
    "gelu_l2_norm": Normalizer(
        total=lambda s, gelu: _sum_of_squares(gelu(s)),
        total_gradient=lambda dr, s, r, gelu: dr * jax.grad(lambda s: jnp.sum(jnp.square(gelu(s))))(s),
        first=lambda s, r, gelu: gelu(s),
        second=lambda n, r, tau, gelu: tau * n * _inverse_norm(r),
    ),
    "softmax": Normalizer(  # whose r [..., 2] is the largest score, to which it is indifferent, and the sum
        total=lambda s, gelu: jnp.stack([s.max(-1), jnp.sum(jnp.exp(s - s.max(-1, keepdims=True)), -1)], -1),
        total_gradient=lambda dr, s, r, gelu: dr[..., 1:] * jnp.exp(s - r[..., :1]),
        first=lambda s, r, gelu: jnp.exp(s - jax.lax.stop_gradient(r[..., :1])),
        second=lambda n, r, tau, gelu: tau**2 * n / r[..., 1:],  # τ² = N at birth
    ),
}


def dropout(x: jax.Array, rate: float, key: jax.Array | None, shared: tuple[int, ...] = ()) -> jax.Array:
    """x with its entries zeroed at `rate` and the others scaled by 1 / (1 - rate); x itself without key or rate.

    Args:
      x: any shape; computed in float32, returned in its dtype.
      rate: the probability of a zero, in [0, 1).
      key: PRNG key. The mask is a function of it and of the shape alone, on every mesh.
      shared: axes along which one draw serves all entries.
    """
    if key is None or rate == 0:
        return x
    shape = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
    return (x.astype(jnp.float32) * dropout_scale(rate, key, shape)).astype(x.dtype)


def dropout_scale(rate: float, key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """float32 factors: 0 at `rate`, else 1 / (1 - rate)."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), 1 / (1 - rate), 0.0)


def pattention(
    x_BLD: jax.Array,
    keys_ND: jax.Array,
    values_NE: jax.Array,
    tau: jax.Array | float,
    normalizer: str = "l2_norm_gelu",
    gelu: str = "erf",
    *,
    scale_B1N: jax.Array | None = None,
    recompute: bool = False,
) -> jax.Array:
    """Attends from inputs to N parameter tokens: Θ(x Kᵀ; τ) V, equations 4 and 5.

    Args:
      x_BLD: inputs [..., D]; their dtype is that of the two contractions.
      keys_ND: float32 key parameter tokens [N, D], as they are stored: sharded over N and D.
      values_NE: float32 value parameter tokens [N, E], likewise.
      tau: the scale τ, a scalar: √N when the layer is born. It is given, never read from the
        shape, since appending tokens must not change what the layer computes. It gets no gradient.
      normalizer: a key of NORMALIZERS.
      gelu: a key of GELUS.
      scale_B1N: factors of the weights Θ, such as `dropout_scale`; they get no gradient.
      recompute: keeps no scores for the gradient, but computes them again, some examples at a time.

    Returns:
      Outputs [..., E] in the inputs' dtype.
    """
    fused = normalizer == "l2_norm_gelu" and scale_B1N is None and row_kernels.whole_rows()
    return _attend(x_BLD, keys_ND, values_NE, jnp.float32(tau), scale_B1N, _How(normalizer, gelu, recompute, fused))


class _How(NamedTuple):
    normalizer: str
    gelu: str
    recompute: bool
    fused: bool = False


def _gathered(tokens_ND: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Stored tokens as they are computed with: cast first, so that what fsdp gathers is in the computation's dtype."""
    return constrain(tokens_ND.astype(dtype), "tokens", None)


# The gradient is written out for four reasons. Of all that has N columns only the scores are kept for it, or nothing,
# and the weights are computed again; but not the sum over N, which devices would exchange again. Between the two stages
# it is rounded to the inputs' dtype, since that is what a TPU stores there: half the memory of a step in bfloat16, and
# a sixth of its time. And each device sums both parameters' gradients in float32 over all its positions, before they
# are added up and scattered once.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(x_BLD, keys_ND, values_NE, tau, scale_B1N, how: _How) -> jax.Array:
    return _attend_forward(x_BLD, keys_ND, values_NE, tau, scale_B1N, how)[0]


def _weights(normed_BLN, total_BL1, tau, scale_B1N, how: _How) -> jax.Array:
    weights_BLN = NORMALIZERS[how.normalizer].second(normed_BLN, total_BL1, tau, GELUS[how.gelu])
    return weights_BLN if scale_B1N is None else weights_BLN * scale_B1N


def _in_groups(x_BLD: jax.Array, tokens_ND: jax.Array) -> jax.Array | None:
    """Tokens [G, N/G, D] for a single position on a CPU, which gives a small matrix's product with a vector one core,
    and several such products several; else None."""
    if platform() != "cpu" or x_BLD.size != x_BLD.shape[-1]:
        return None
    return tokens_ND.reshape(math.gcd(len(tokens_ND), GROUPS), -1, tokens_ND.shape[-1])


def _scores(x_BLD: jax.Array, keys_ND: jax.Array) -> jax.Array:
    keys_GMD = _in_groups(x_BLD, keys_ND)
    if keys_GMD is None:
        return jnp.einsum("...d,nd->...n", x_BLD, keys_ND)
    x_GD = jnp.broadcast_to(x_BLD.reshape(1, -1), (len(keys_GMD), x_BLD.size))
    return jnp.einsum("gmd,gd->gm", keys_GMD, x_GD).reshape(*x_BLD.shape[:-1], -1)


def _mix(weights_BLN: jax.Array, values_NE: jax.Array) -> jax.Array:
    values_GME = _in_groups(weights_BLN, values_NE)
    if values_GME is None:
        return jnp.einsum("...n,ne->...e", weights_BLN, values_NE)
    y_GE = jnp.einsum("gm,gme->ge", weights_BLN.reshape(values_GME.shape[:2]), values_GME)
    return jnp.sum(y_GE, axis=0).reshape(*weights_BLN.shape[:-1], -1)


def _attend_forward(x_BLD, keys_ND, values_NE, tau, scale_B1N, how):
    norm, gelu = NORMALIZERS[how.normalizer], GELUS[how.gelu]
    scores_BLN = _scores(x_BLD, _gathered(keys_ND, x_BLD.dtype))
    if how.fused:
        weights_BLN, total_BL1 = _fused_weights(scores_BLN, tau, how)
    else:
        s_BLN = scores_BLN.astype(jnp.float32)
        total_BL1 = norm.total(s_BLN, gelu)
        weights_BLN = _weights(norm.first(s_BLN, total_BL1, gelu), total_BL1, tau, scale_B1N, how).astype(x_BLD.dtype)
    total_BL1 = checkpoint_name(total_BL1, "total")
    y_BLE = _mix(weights_BLN, _gathered(values_NE, x_BLD.dtype))
    kept = None if how.recompute else scores_BLN
    return y_BLE, (x_BLD, keys_ND, values_NE, tau, scale_B1N, total_BL1, kept)


def _fused_weights(scores_BLN, tau, how):
    def local(scores_BLN, tau):
        w, total = row_kernels.weights(scores_BLN.reshape(-1, scores_BLN.shape[-1]), tau, how.gelu)
        return (w.reshape(scores_BLN.shape), total.reshape(*scores_BLN.shape[:-1], 1)), ()

    return sum_over_batch(local, (scores_BLN,), (tau,))[0]


def _fused_gradient(scores_BLN, dweights_BLN, total_BL1, tau, how):
    N = scores_BLN.shape[-1]
    w, d = row_kernels.weights_gradient(
        scores_BLN.reshape(-1, N), dweights_BLN.reshape(-1, N), total_BL1.reshape(-1), tau, how.gelu
    )
    return w.reshape(scores_BLN.shape), d.reshape(scores_BLN.shape)


def _attend_backward(how, kept, dy_BLE):
    x_BLD, keys_ND, values_NE, tau, scale_B1N, total_BL1, scores_BLN = kept
    dtype, norm, gelu = x_BLD.dtype, NORMALIZERS[how.normalizer], GELUS[how.gelu]

    def gradients(x_BLD, dy_BLE, total_BL1, scores_BLN, scale_B1N, keys_ND, values_NE, tau):
        keys_ND, values_NE = (constrain(tokens, "tokens", None) for tokens in (keys_ND, values_NE))
        if scores_BLN is None:
            scores_BLN = jnp.einsum("...d,nd->...n", x_BLD, keys_ND)
        if how.fused:
            dweights_BLN = jnp.einsum("...e,ne->...n", dy_BLE, values_NE)
            weights_BLN, dscores_BLN = _fused_gradient(scores_BLN, dweights_BLN, total_BL1, tau, how)
            sums = sum_outer(x_BLD, dscores_BLN), sum_outer(dy_BLE, weights_BLN)
            return jnp.einsum("...n,nd->...d", dscores_BLN, keys_ND), sums
        s_BLN = scores_BLN.astype(jnp.float32)
        normed_BLN, first_backward = jax.vjp(lambda s, r: norm.first(s, r, gelu), s_BLN, total_BL1)
        second = functools.partial(_weights, tau=tau, scale_B1N=scale_B1N, how=how)
        weights_BLN, second_backward = jax.vjp(second, normed_BLN, total_BL1)
        dnormed_BLN, dtotal_BL1 = second_backward(jnp.einsum("...e,ne->...n", dy_BLE, values_NE).astype(jnp.float32))
        ds_BLN, more_BL1 = first_backward(dnormed_BLN.astype(dtype).astype(jnp.float32))
        ds_BLN += norm.total_gradient(dtotal_BL1 + more_BL1, s_BLN, total_BL1, gelu)
        dscores_BLN = ds_BLN.astype(dtype)
        sums = (
            constrain(sum_outer(x_BLD, dscores_BLN), None, "tokens"),
            constrain(sum_outer(dy_BLE, weights_BLN.astype(dtype)), None, "tokens"),
        )
        return jnp.einsum("...n,nd->...d", dscores_BLN, keys_ND), sums

    def local(x_BLD, dy_BLE, total_BL1, scores_BLN, scale_B1N, *others):  # of the devices that share an example
        parts = 1 if scores_BLN is not None else _parts(x_BLD.shape, len(keys_ND))
        if parts == 1:
            return gradients(x_BLD, dy_BLE, total_BL1, scores_BLN, scale_B1N, *others)

        def add(sums, part):
            x_CLD, dy_CLE, total_CL1, scale_C1N = part
            dx_CLD, more = gradients(x_CLD, dy_CLE, total_CL1, None, scale_C1N, *others)
            return jax.tree.map(jnp.add, sums, more), dx_CLD

        zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in (keys_ND.shape[::-1], values_NE.shape[::-1]))
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (x_BLD, dy_BLE, total_BL1, scale_B1N))
        sums, dx_PCLD = jax.lax.scan(add, zeros, split)
        return dx_PCLD.reshape(x_BLD.shape), sums

    rows = x_BLD, dy_BLE, total_BL1, scores_BLN, scale_B1N
    shared = _gathered(keys_ND, dtype), _gathered(values_NE, dtype), tau
    dx_BLD, (dkeys_DN, dvalues_EN) = sum_over_batch(local, rows, shared)
    dkeys_ND = constrain(dkeys_DN.T.astype(keys_ND.dtype), "tokens", "embed")
    dvalues_NE = constrain(dvalues_EN.T.astype(values_NE.dtype), "tokens", "embed")
    return dx_BLD, dkeys_ND, dvalues_NE, None, None


def _parts(shape: tuple[int, ...], num_tokens: int) -> int:
    """In how many equal parts the B examples [B, L, D] are worked through, so that each has SCORES scores at most.

    In two at least where there are many: a loop keeps the compiler from computing several projections' scores ahead.
    """
    scores = math.prod(shape[:-1]) * num_tokens
    if len(shape) != 3 or scores <= SCORES / 3:
        return 1
    fits = (n for n in range(2, shape[0]) if shape[0] % n == 0 and scores / n <= SCORES)
    return next(fits, shape[0])


def sum_outer(a_BLD: jax.Array, b_BLN: jax.Array) -> jax.Array:
    """The sum over positions of outer products, float32 [D, N]: fsdp scatters D, and a GPU wants that in front."""
    if platform() == "cpu":  # which transposes nothing where it contracts over one axis, and has the wide one in front
        a_PD, b_PN = (x.reshape(-1, x.shape[-1]) for x in (a_BLD, b_BLN))
        sums_ND = jnp.einsum("pn,pd->nd", b_PN, a_PD, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(sums_ND).T
    return jnp.einsum("...d,...n->dn", a_BLD, b_BLN, preferred_element_type=jnp.float32)


_attend.defvjp(_attend_forward, _attend_backward)


class Pattention(nnx.Module):
    """A projection D -> E whose weights are N key and N value parameter tokens (float32)."""

    def __init__(
        self,
        num_tokens: int,
        in_dim: int,
        out_dim: int,
        *,
        value_scale: float,
        normalizer: str,
        gelu: str = "erf",
        dropout: float = 0.0,
        recompute: bool = False,
        padding: int = 0,
        rngs: nnx.Rngs,
    ):
        """Draws keys from N(0, 0.02²) and values from N(0, value_scale²), as the authors do.

        The keys of the last `padding` tokens are zero: they add nothing until they learn, which they can. The others
        are drawn as without them.
        """
        self.normalizer, self.gelu, self.dropout, self.recompute = normalizer, gelu, dropout, recompute
        self.keys = parameter(rngs, (num_tokens, in_dim), 0.02, ("tokens", "embed"), zero_rows=padding)
        self.values = parameter(rngs, (num_tokens, out_dim), value_scale, ("tokens", "embed"))

    @jax.named_scope("pattention")
    def __call__(self, x_BLD: jax.Array, tau: jax.Array | float, key: jax.Array | None = None) -> jax.Array:
        scale_B1N = None
        if key is not None and self.dropout:  # one draw for a token and an example, shared by all positions
            scale_B1N = dropout_scale(self.dropout, key, (len(x_BLD), 1, len(self.keys[...])))
        return pattention(
            x_BLD,
            self.keys[...],
            self.values[...],
            tau,
            self.normalizer,
            self.gelu,
            scale_B1N=scale_B1N,
            recompute=self.recompute,
        )


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, axes: tuple[str, ...], zero_rows: int = 0
) -> nnx.Param:
    """A float32 parameter from N(0, scale²), its last `zero_rows` rows zero, that knows its logical axes."""
    value = scale * jax.random.normal(rngs.params(), shape, jnp.float32)
    if zero_rows:
        value = jnp.where(jnp.arange(shape[0])[:, None] < shape[0] - zero_rows, value, 0.0)
    return nnx.Param(value, axes=axes)
