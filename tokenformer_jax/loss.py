"""Next-token losses from the last hidden states, a chunk of positions at a time: all logits never exist at once."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from tokenformer_jax.sharding import batch_axes, constrain

CHUNK = 128  # positions whose logits are held at once

# The gradient is made along with the loss, chunk by chunk, so that no logits are computed twice. Each device sums the
# table's over its own examples, and only the whole sum is exchanged: left to the compiler, it would be in every chunk.


@jax.custom_vjp
def cross_entropy(h_BLD: jax.Array, table_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """The weighted sum over positions of -log softmax(h tableᵀ)[target], in nats, a float32 scalar.

    Args:
      h_BLD: what enters the output projection, in the computation's dtype.
      table_VD: float32 output projection.
      targets_BL: int32.
      weights_BL: float32; they are data, and get no gradient.
    """
    return _forward(h_BLD, table_VD, targets_BL, weights_BL, gradients=False)[0]


def _forward(h_BLD, table_VD, targets_BL, weights_BL, gradients=True):
    axes = batch_axes()

    def local(h_BLD, table_VD, targets_BL, weights_BL):  # of the devices that share an example
        table_VD = constrain(table_VD, "vocab", None)

        def chunk(sums, inputs):
            h_BCD, targets_BC, weights_BC = inputs
            logits_BCV = jnp.einsum("bcd,vd->bcv", h_BCD, table_VD, preferred_element_type=jnp.float32)
            nll_BC = optax.softmax_cross_entropy_with_integer_labels(logits_BCV, targets_BC)
            loss = sums[0] + jnp.sum(nll_BC * weights_BC)
            if not gradients:
                return (loss,), ()
            is_target_BCV = targets_BC[..., None] == jnp.arange(table_VD.shape[0])
            dlogits_BCV = (jax.nn.softmax(logits_BCV) - is_target_BCV) * weights_BC[..., None]
            dlogits_BCV = dlogits_BCV.astype(h_BCD.dtype)
            dtable_VD = jnp.einsum("bcv,bcd->vd", dlogits_BCV, h_BCD, preferred_element_type=jnp.float32)
            return (loss, sums[1] + dtable_VD), jnp.einsum("bcv,vd->bcd", dlogits_BCV, table_VD)

        sums = (jnp.float32(0), jnp.zeros(table_VD.shape, jnp.float32))[: 1 + gradients]
        inputs = tuple(split(x) for x in (h_BLD, targets_BL, weights_BL))
        sums, dh = jax.lax.scan(chunk, sums, inputs)
        if axes:
            sums = jax.lax.psum(sums, axes)
        return sums, (dh.swapaxes(0, 1).reshape(h_BLD.shape) if gradients else ())

    arguments = h_BLD, constrain(table_VD.astype(h_BLD.dtype), "vocab", None), targets_BL, weights_BL
    if axes:
        rows = P(axes)
        local = jax.shard_map(
            local, in_specs=(rows, P(), rows, rows), out_specs=(P(), rows), axis_names=set(axes), check_vma=False
        )
    (loss, *dtable_VD), dh_BLD = local(*arguments)
    return loss, (dh_BLD, dtable_VD)


def _backward(kept, dloss):
    dh_BLD, (dtable_VD,) = kept
    return (dh_BLD * dloss).astype(dh_BLD.dtype), dtable_VD * dloss, None, None


cross_entropy.defvjp(_forward, _backward)


def split(x_BLX: jax.Array) -> jax.Array:
    """[B, L, ...] -> [chunks, B, L / chunks, ...]; a single chunk where L is no multiple of CHUNK."""
    length = x_BLX.shape[1]
    chunks = length // CHUNK if length % CHUNK == 0 else 1
    return x_BLX.reshape(x_BLX.shape[0], chunks, length // chunks, *x_BLX.shape[2:]).swapaxes(0, 1)
