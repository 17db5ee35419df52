"""Causal attention between positions: one function, computed by the best kernel that JAX has for the platform."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from tokenformer_jax.sharding import partition_spec, platform

BLOCKS = (512, 256, 128)  # positions that splash attention takes at once


def causal_attention(
    q_BLHK: jax.Array, k_BLHK: jax.Array, v_BLHK: jax.Array, segments_BL: jax.Array | None = None
) -> jax.Array:
    """softmax(q kᵀ / √K) v over the positions up to each one's own and, with segments, within its segment.

    On a TPU splash attention, on a GPU cuDNN's; both where they apply (`kernel`). They hold no L × L scores.

    Args:
      q_BLHK: queries, sharded by batch and heads.
      k_BLHK: keys.
      v_BLHK: values.
      segments_BL: int32 segment of each position.

    Returns:
      [B, L, H, K] in the dtype of v.
    """
    which = kernel(platform(), q_BLHK.shape, q_BLHK.dtype)
    if which == "splash":
        return splash_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL)
    mask = None if segments_BL is None else (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q_BLHK, k_BLHK, v_BLHK, mask=mask, is_causal=True, implementation=which)


def kernel(platform: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Literal["splash", "cudnn", "xla"]:
    """ "splash", "cudnn" or "xla", the plain one, for queries of this [B, L, H, K]."""
    _, length, _, head_dim = shape
    if platform == "tpu" and length % BLOCKS[-1] == 0:
        return "splash"
    if platform in ("gpu", "cuda") and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "xla"


def splash_attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segments_BL: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`causal_attention` by JAX's Pallas kernel; L a multiple of 128. `interpret` runs it anywhere, slowly."""
    length, head_dim = q_BLHK.shape[1], q_BLHK.shape[3]
    block = next(size for size in BLOCKS if length % size == 0)
    as_projected = splash.QKVLayout.SEQ_MINOR  # else each is copied, and takes twice its size
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
        q_layout=as_projected,
        k_layout=as_projected,
        v_layout=as_projected,
    )

    def attend(q_BLHK, k_BLHK, v_BLHK, segments_BL=None):  # of one device
        mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * q_BLHK.shape[2])
        one = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
        ids = None if segments_BL is None else splash.SegmentIds(segments_BL, segments_BL)
        q_BHLK, k_BHLK, v_BHLK = (x.swapaxes(1, 2) for x in (q_BLHK * head_dim**-0.5, k_BLHK, v_BLHK))
        return jax.vmap(one)(q_BHLK, k_BHLK, v_BHLK, ids).swapaxes(1, 2)

    inputs = (q_BLHK, k_BLHK, v_BLHK) + (() if segments_BL is None else (segments_BL,))
    if jax.sharding.get_abstract_mesh().empty:
        return attend(*inputs)
    rows, heads = partition_spec(("batch",)), partition_spec(("batch", None, "heads", None))
    specs = (heads,) * 3 + (rows,) * (len(inputs) - 3)
    return jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)(*inputs)
