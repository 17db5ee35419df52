"""What Pattention gives each of its parameter tokens, summed over positions while a model runs as always."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.devices.sharding import constrain
from tokenformer_jax.nn.layers import GELUS, Key
from tokenformer_jax.nn.pattention import NORMALIZERS, Pattention


class Watched(nnx.Module):
    """A Pattention that leaves `sums_N`, each token's Σ |Θ| over the positions that count, beside its output."""

    def __init__(self, pattention: Pattention, counts_BL: jax.Array):
        self.pattention, self.counts_BL = pattention, nnx.Variable(counts_BL)

    def __call__(self, x_BLD: jax.Array, tau: jax.Array | float, key: Key = None) -> jax.Array:
        of = self.pattention
        keys_ND = constrain(of.keys[...].astype(x_BLD.dtype), "tokens", None)
        scores_BLN = jnp.einsum("bld,nd->bln", x_BLD, keys_ND).astype(jnp.float32)
        weights_BLN = NORMALIZERS[of.normalizer](scores_BLN, tau, GELUS[of.gelu])
        sums_N = jnp.sum(jnp.abs(weights_BLN) * self.counts_BL[...][:, :, None], axis=(0, 1))
        self.sums_N = nnx.Intermediate(constrain(sums_N, "tokens"))
        return of(x_BLD, tau, key)


def watch(blocks: Any, counts_BL: jax.Array) -> list[str]:
    """Has the projections of stacked blocks watched; gives their names.

    Once `run_blocks` has run, `sums_N` of each is float32 [Y, N]. `counts_BL` [B, L], or [B, 1], is 0 where a position
    does not count; within a block it is the same in every layer.
    """
    names = [name for name, part in vars(blocks).items() if isinstance(part, Pattention)]
    for name in names:
        pattention = getattr(blocks, name)
        layers = len(pattention.keys[...])
        setattr(blocks, name, Watched(pattention, jnp.broadcast_to(counts_BL, (layers, *counts_BL.shape))))
    return names
