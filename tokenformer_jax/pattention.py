"""Token-Parameter attention (TokenFormer, arXiv 2410.23168, section 3.2): attention over learnable tokens."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.sharding import constrain

Gelu = Callable[[jax.Array], jax.Array]
Stage = Callable[[jax.Array, jax.Array, Gelu], jax.Array]


def erf_gelu(x: jax.Array) -> jax.Array:
    """x Φ(x) as PyTorch computes it; jax.nn.gelu's erfc costs a TPU several times as many operations."""
    return x * 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


# The exact gelu of the authors' PyTorch code, and the tanh approximation (JAX's default) of their TPU code.
GELUS: dict[str, Gelu] = {"erf": erf_gelu, "tanh": functools.partial(jax.nn.gelu, approximate=True)}


def l2_normalize(x_BLN: jax.Array) -> jax.Array:
    """x / ‖x‖₂ over the last axis; rows shorter than 1e-12 give zeros, with a gradient of zero."""
    squares = jnp.sum(jnp.square(x_BLN), axis=-1, keepdims=True)
    nonzero = squares > 1e-24
    return x_BLN * jnp.where(nonzero, jax.lax.rsqrt(jnp.where(nonzero, squares, 1.0)), 0.0)


class Normalizer(NamedTuple):
    """Θ as two stages, each a function of float32 [..., N], τ and a gelu; the first one's result enters the second."""

    first: Stage
    second: Stage


NORMALIZERS = {
    "l2_norm_gelu": Normalizer(lambda s, tau, gelu: l2_normalize(s), lambda s, tau, gelu: gelu(tau * s)),  # equation 5
    "gelu_l2_norm": Normalizer(lambda s, tau, gelu: gelu(s), lambda s, tau, gelu: tau * l2_normalize(s)),
    "softmax": Normalizer(lambda s, tau, gelu: jax.nn.softmax(s), lambda s, tau, gelu: tau**2 * s),  # τ² = N at birth
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
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x.astype(jnp.float32) / (1 - rate), 0.0).astype(x.dtype)


def pattention(
    x_BLD: jax.Array,
    keys_ND: jax.Array,
    values_NE: jax.Array,
    tau: jax.Array | float,
    normalizer: str = "l2_norm_gelu",
    gelu: str = "erf",
    *,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Attends from inputs to N parameter tokens: Θ(x Kᵀ; τ) V, equations 4 and 5.

    Args:
      x_BLD: inputs [..., D]; their dtype is that of the two contractions.
      keys_ND: key parameter tokens [N, D].
      values_NE: value parameter tokens [N, E].
      tau: the scale τ, a scalar: √N when the layer is born. It is given, never read from the
        shape, since appending tokens must not change what the layer computes.
      normalizer: a key of NORMALIZERS.
      gelu: a key of GELUS.
      dropout_rate: of the weights Θ; one draw for a token and an example [B, 1, N], shared by all positions.
      key: PRNG key of that dropout; none is applied without.

    Returns:
      Outputs [..., E] in the inputs' dtype.
    """
    keys_ND, values_NE = keys_ND.astype(x_BLD.dtype), values_NE.astype(x_BLD.dtype)
    how = _How(normalizer, gelu, dropout_rate)
    return _attend(x_BLD, keys_ND, values_NE, jnp.float32(tau), key, how)


class _How(NamedTuple):
    normalizer: str
    gelu: str
    dropout_rate: float


def _first(scores_BLN: jax.Array, tau: jax.Array, how: _How) -> jax.Array:
    return NORMALIZERS[how.normalizer].first(scores_BLN.astype(jnp.float32), tau, GELUS[how.gelu])


def _second(normed_BLN: jax.Array, tau: jax.Array, key: jax.Array | None, how: _How) -> jax.Array:
    weights_BLN = NORMALIZERS[how.normalizer].second(normed_BLN, tau, GELUS[how.gelu])
    return dropout(weights_BLN, how.dropout_rate, key, shared=(weights_BLN.ndim - 2,))


# The gradient is written out for three reasons. Of all that has N columns only the scores are kept for it, and the
# weights, with their dropout, are computed again. Between the two stages it is rounded to the inputs' dtype, since that
# is what a TPU stores there: half the memory of a step in bfloat16, and a sixth of its time. And both parameters'
# gradients contract over positions with the narrow array on the left, where a CPU needs it transposed: half the time of
# a step otherwise.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(x_BLD, keys_ND, values_NE, tau, key, how: _How) -> jax.Array:
    return _attend_forward(x_BLD, keys_ND, values_NE, tau, key, how)[0]


def _attend_forward(x_BLD, keys_ND, values_NE, tau, key, how):
    scores_BLN = jnp.einsum("...d,nd->...n", x_BLD, keys_ND)
    weights_BLN = _second(_first(scores_BLN, tau, how), tau, key, how).astype(x_BLD.dtype)
    return jnp.einsum("...n,ne->...e", weights_BLN, values_NE), (x_BLD, keys_ND, values_NE, tau, key, scores_BLN)


def _attend_backward(how, kept, dy_BLE):
    x_BLD, keys_ND, values_NE, tau, key, scores_BLN = kept
    dtype = x_BLD.dtype
    normed_BLN, first_backward = jax.vjp(lambda s, t: _first(s, t, how), scores_BLN, tau)
    weights_BLN, second_backward = jax.vjp(lambda s, t: _second(s, t, key, how), normed_BLN, tau)
    dnormed_BLN, dtau = second_backward(jnp.einsum("...e,ne->...n", dy_BLE, values_NE).astype(jnp.float32))
    dscores_BLN, dtau_first = first_backward(dnormed_BLN.astype(dtype).astype(jnp.float32))
    dkeys_DN = _sum_outer(x_BLD, dscores_BLN)
    dvalues_EN = _sum_outer(dy_BLE, weights_BLN.astype(dtype))
    return jnp.einsum("...n,nd->...d", dscores_BLN, keys_ND), dkeys_DN.T, dvalues_EN.T, dtau + dtau_first, None


def _sum_outer(a_BLI: jax.Array, b_BLJ: jax.Array) -> jax.Array:
    """The sum over positions of outer products, [I, J]."""
    return a_BLI.reshape(-1, a_BLI.shape[-1]).T @ b_BLJ.reshape(-1, b_BLJ.shape[-1])


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
        dtype: jnp.dtype,
        padding: int = 0,
        rngs: nnx.Rngs,
    ):
        """Draws keys from N(0, 0.02²) and values from N(0, value_scale²), as the authors do.

        The keys of the last `padding` tokens are zero: they add nothing until they learn, which they can. The others
        are drawn as without them.
        """
        self.normalizer, self.gelu, self.dropout, self.dtype = normalizer, gelu, dropout, dtype
        self.keys = parameter(rngs, (num_tokens, in_dim), 0.02, ("tokens", "embed"), zero_rows=padding)
        self.values = parameter(rngs, (num_tokens, out_dim), value_scale, ("tokens", "embed"))

    @jax.named_scope("pattention")
    def __call__(self, x_BLD: jax.Array, tau: jax.Array | float, key: jax.Array | None = None) -> jax.Array:
        # Cast first, so that what fsdp gathers just before use is in the computation's dtype.
        keys_ND = constrain(self.keys[...].astype(self.dtype), "tokens", None)
        values_NE = constrain(self.values[...].astype(self.dtype), "tokens", None)
        return pattention(
            x_BLD, keys_ND, values_NE, tau, self.normalizer, self.gelu, dropout_rate=self.dropout, key=key
        )


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, axes: tuple[str, ...], zero_rows: int = 0
) -> nnx.Param:
    """A float32 parameter from N(0, scale²), its last `zero_rows` rows zero, that knows its logical axes."""
    value = scale * jax.random.normal(rngs.params(), shape, jnp.float32)
    if zero_rows:
        value = jnp.where(jnp.arange(shape[0])[:, None] < shape[0] - zero_rows, value, 0.0)
    return nnx.Param(value, axes=axes)
