"""Token-Parameter attention (TokenFormer, arXiv 2410.23168, section 3.2): attention over learnable tokens.

Pattention(X; K, V) = Θ(X Kᵀ; τ) V                  equation 4
Θ(s; τ) = gelu(τ s / ‖s‖₂)                          equation 5, `l2_norm_gelu`
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.nn.layers import GELUS, Gelu, dropout_scale, inverse_norm, parameter
from tokenformer_jax.nn.pattention_vjp import How, attend

# Θ(s, τ) of float32 scores s [..., N]: the paper's, and two others that its code has.
NORMALIZERS: dict[str, Callable[[jax.Array, jax.Array | float, Gelu], jax.Array]] = {
    "l2_norm_gelu": lambda s, tau, gelu: gelu(tau * l2_normalized(s)),
    "gelu_l2_norm": lambda s, tau, gelu: tau * l2_normalized(gelu(s)),
    "softmax": lambda s, tau, gelu: tau**2 * jax.nn.softmax(s),  # τ² = N at birth
}


def l2_normalized(s_BLN: jax.Array) -> jax.Array:
    """s / ‖s‖₂ over the tokens; of zeros zeros."""
    return s_BLN * inverse_norm(jnp.sum(jnp.square(s_BLN), axis=-1, keepdims=True))


def plain_pattention(x_BLD, keys_ND, values_NE, tau, normalizer="l2_norm_gelu", gelu="erf", scale_B1N=1.0):
    """The equation as it stands. `pattention` computes the same, in less time and memory for its gradient."""
    scores_BLN = jnp.einsum("...d,nd->...n", x_BLD, keys_ND.astype(x_BLD.dtype)).astype(jnp.float32)
    weights_BLN = NORMALIZERS[normalizer](scores_BLN, tau, GELUS[gelu]) * scale_B1N
    return jnp.einsum("...n,ne->...e", weights_BLN.astype(x_BLD.dtype), values_NE.astype(x_BLD.dtype))


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
    new_MD: tuple[jax.Array, jax.Array] | None = None,
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
      new_MD: the last M keys and values once more: these alone get a gradient, and no other tokens' is computed.

    Returns:
      Outputs [..., E] in the inputs' dtype.
    """
    chex.assert_shape(keys_ND, (None, x_BLD.shape[-1]))
    chex.assert_shape(values_NE, (len(keys_ND), None))
    return attend(x_BLD, keys_ND, values_NE, jnp.float32(tau), scale_B1N, new_MD, How(normalizer, gelu, recompute))


class Pattention(nnx.Module):
    """A projection D -> E whose weights are N key and N value parameter tokens (float32)."""

    new_keys: nnx.Param | None = None  # [M, D], set by `learn_alone`
    new_values: nnx.Param | None = None

    def __init__(
        self,
        num_tokens: int,
        in_dim: int,
        out_dim: int,
        *,
        value_scale: float,
        normalizer: str = "l2_norm_gelu",
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
        scale_B1N, new_MD = None, None
        if self.new_keys is not None and self.new_values is not None:
            new_MD = self.new_keys[...], self.new_values[...]
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
            new_MD=new_MD,
        )

    def learn_alone(self, keys: jax.Array, values: jax.Array) -> None:
        """Has these get all of the gradient: the last M tokens, of value as they are. M may be 0."""
        self.new_keys, self.new_values = nnx.Param(keys), nnx.Param(values)
