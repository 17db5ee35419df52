"""What Pattention gives each of its parameter tokens, summed over positions while a model runs as always."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.devices.sharding import constrain
from tokenformer_jax.nn.layers import GELUS, Gelu, Key
from tokenformer_jax.nn.pattention import NORMALIZERS, Pattention, l2_normalized

# Each token's part [..., N] of what scores s [..., N] are normalized by: a sum over tokens, of which it is a term.
PARTS: dict[str, Callable[[jax.Array, Gelu], jax.Array]] = {
    "l2_norm_gelu": lambda s, gelu: jnp.square(l2_normalized(s)),
    "gelu_l2_norm": lambda s, gelu: jnp.square(l2_normalized(gelu(s))),
    "softmax": lambda s, gelu: jax.nn.softmax(s),
}


class Seen(NamedTuple):
    """Of each token of a projection, float32 [Y, N], over the positions that count."""

    weights: Any  # Σ |Θ|
    parts: Any  # Σ of its PARTS


class Watched(nnx.Module):
    """A Pattention that leaves beside its output what is `Seen` of it."""

    def __init__(self, pattention: Pattention, counts_BL: jax.Array):
        self.pattention, self.counts_BL = pattention, nnx.Variable(counts_BL)

    def __call__(self, x_BLD: jax.Array, tau: jax.Array | float, key: Key = None) -> jax.Array:
        of, gelu = self.pattention, GELUS[self.pattention.gelu]
        keys_ND = constrain(of.keys[...].astype(x_BLD.dtype), "tokens", None)
        scores_BLN = jnp.einsum("bld,nd->bln", x_BLD, keys_ND).astype(jnp.float32)
        counts_BL1 = self.counts_BL[...][:, :, None]

        def total(values_BLN: jax.Array) -> nnx.Intermediate:
            sums_N = jnp.sum(values_BLN * counts_BL1, axis=(0, 1)) * (counts_BL1.shape[1] / x_BLD.shape[1])
            return nnx.Intermediate(constrain(sums_N, "tokens"))

        self.weights_N = total(jnp.abs(NORMALIZERS[of.normalizer](scores_BLN, tau, gelu)))
        self.parts_N = total(PARTS[of.normalizer](scores_BLN, gelu))
        return of(x_BLD, tau, key)


def watch(blocks: Any, counts_BL: jax.Array) -> None:
    """Has each Pattention of stacked blocks watched; once `run_blocks` has run, `seen` gives what was seen.

    `counts_BL` is 0 where a position does not count; of counts [B, 1] each is that of an example, over whose positions
    the mean is taken.
    """
    for name, pattention in list(vars(blocks).items()):
        if isinstance(pattention, Pattention):
            counts_YBL = jnp.broadcast_to(counts_BL, (len(pattention.keys[...]), *counts_BL.shape))
            setattr(blocks, name, Watched(pattention, counts_YBL))


def seen(blocks: Any) -> dict[str, Seen]:
    """By projection."""
    watched = {name: part for name, part in vars(blocks).items() if isinstance(part, Watched)}
    return {name: Seen(part.weights_N[...], part.parts_N[...]) for name, part in watched.items()}
