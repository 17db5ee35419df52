"""Next-token losses from the last hidden states, a chunk of positions at a time: all logits never exist at once."""

import jax
import jax.numpy as jnp

from tokenformer_jax.devices.sharding import constrain, sum_over_batch
from tokenformer_jax.nn import row_kernels
from tokenformer_jax.nn.backends import positions_in_a_row, sum_outer, sums_in_float32

LOGITS = 2**28  # of a device, at most, that are held at once

# The gradient is made along with the loss, chunk by chunk, so that no logits are computed twice. The softmax is written
# out, since optax's loss and jax.nn.softmax would each add up the exponentials. On GPUs that have whole rows of logits
# `row_kernels` compute both.


@jax.custom_vjp
def cross_entropy(h_BLD: jax.Array, table_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
    """The weighted sum over positions of -log softmax(h tableᵀ)[target], in nats, a float32 scalar.

    Args:
      h_BLD: what enters the output projection, in the computation's dtype.
      table_VD: float32 output projection.
      targets_BL: int32.
      weights_BL: float32; they are data, and get no gradient.
    """
    return _losses(h_BLD, table_VD, targets_BL, weights_BL, gradients=False, learns=False)[0]


def _forward(*primals):
    """For the gradient; where the table is not differentiated, its gradient is not computed."""
    h_BLD, table_VD, targets_BL, weights_BL = (primal.value for primal in primals)
    return _losses(h_BLD, table_VD, targets_BL, weights_BL, gradients=True, learns=primals[1].perturbed)


def _losses(h_BLD, table_VD, targets_BL, weights_BL, gradients, learns):
    def local(h_BLD, targets_BL, weights_BL, table_VD):  # of the devices that share an example
        table_VD = constrain(table_VD, "vocab", None)

        def add(sums, part):
            shape = part[0].shape
            h_BCD, targets_BC, weights_BC = positions_in_a_row(*part)
            logits_BCV = sums_in_float32("...d,vd->...v", h_BCD, table_VD)
            if gradients and row_kernels.apply():
                nll_BC, dlogits_BCV = _by_rows(logits_BCV, targets_BC, weights_BC, h_BCD.dtype)
            else:
                nll_BC, dlogits_BCV = _nll_and_gradient(logits_BCV, targets_BC, weights_BC, h_BCD.dtype)
            loss = sums[0] + jnp.sum(nll_BC * weights_BC)
            if not gradients:
                return (loss,), ()
            dh_BCD = jnp.einsum("...v,vd->...d", dlogits_BCV, table_VD)
            if not learns:
                return (loss,), dh_BCD.reshape(shape)
            dtable_DV = constrain(sum_outer(h_BCD, dlogits_BCV), None, "vocab")
            return (loss, sums[1] + dtable_DV), dh_BCD.reshape(shape)

        parts = _parts(targets_BL.shape, len(table_VD))
        split = [x.reshape(x.shape[0], parts, -1, *x.shape[2:]).swapaxes(0, 1) for x in (h_BLD, targets_BL, weights_BL)]
        sums = (jnp.float32(0), jnp.zeros(table_VD.shape[::-1], jnp.float32))[: 1 + learns]
        sums, dh_PBCD = jax.lax.scan(add, sums, split)
        return dh_PBCD.swapaxes(0, 1).reshape(h_BLD.shape) if gradients else (), sums

    table_VD = constrain(table_VD.astype(h_BLD.dtype), "vocab", None)
    dh_BLD, (loss, *dtable_DV) = sum_over_batch(local, (h_BLD, targets_BL, weights_BL), (table_VD,))
    return loss, (dh_BLD, [constrain(d.T, "vocab", "embed") for d in dtable_DV])


def _nll_and_gradient(logits_BCV, targets_BC, weights_BC, dtype):
    """-log softmax(logits)[target], and the gradient of its weighted sum to the logits."""
    nll_BC, _, exp_BCV, sum_BC1 = _softmax(logits_BCV, targets_BC)
    is_target_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
    return nll_BC, ((exp_BCV / sum_BC1 - is_target_BCV) * weights_BC[..., None]).astype(dtype)


def _softmax(logits_BCV, targets_BC):
    """-log softmax(logits)[target], whether no logit is larger than the target's, the exponentials and their sum."""
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    max_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
    exp_BCV = jnp.exp(logits_BCV - max_BC1)
    sum_BC1 = jnp.sum(exp_BCV, axis=-1, keepdims=True)
    return (max_BC1 + jnp.log(sum_BC1))[..., 0] - target_BC, target_BC == max_BC1[..., 0], exp_BCV, sum_BC1


def _by_rows(logits_BCV, targets_BC, weights_BC, dtype):
    logits_PV = logits_BCV.reshape(-1, logits_BCV.shape[-1])
    nll_P, dlogits_PV = row_kernels.softmax_loss(logits_PV, targets_BC.reshape(-1), weights_BC.reshape(-1), dtype)
    return nll_P.reshape(targets_BC.shape), dlogits_PV.reshape(logits_BCV.shape)


def log_likelihoods(h_BLD: jax.Array, table_VD: jax.Array, targets_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log softmax(h tableᵀ)[target] of each position, float32 [B, L], and whether no token is likelier than the target.

    Without a gradient; arguments as of `cross_entropy`.
    """
    table_VD = constrain(table_VD.astype(h_BLD.dtype), "vocab", None)

    def of_part(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_BCD, targets_BC = positions_in_a_row(*part)
        logits_BCV = sums_in_float32("...d,vd->...v", h_BCD, table_VD)
        nll_BC, is_likeliest_BC, *_ = _softmax(logits_BCV, targets_BC)
        return -nll_BC.reshape(part[1].shape), is_likeliest_BC.reshape(part[1].shape)

    parts = _parts(targets_BL.shape, len(table_VD))
    split = [x.reshape(x.shape[0], parts, -1, *x.shape[2:]).swapaxes(0, 1) for x in (h_BLD, targets_BL)]
    scores_PBC, are_likeliest_PBC = jax.lax.map(of_part, tuple(split))
    return tuple(x.swapaxes(0, 1).reshape(targets_BL.shape) for x in (scores_PBC, are_likeliest_PBC))


def _parts(shape: tuple[int, ...], vocab_size: int) -> int:
    """In how many equal parts the positions [B, L] are worked through, so that each has LOGITS logits at most."""
    batch, length = shape
    fits = (n for n in range(1, length) if length % n == 0 and batch * length // n * vocab_size <= LOGITS)
    return next(fits, length)


def _backward(kept, dloss):
    dh_BLD, dtable_VD = kept
    dtable_VD = dtable_VD[0] * dloss if dtable_VD else None
    return (dh_BLD * dloss).astype(dh_BLD.dtype), dtable_VD, None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
