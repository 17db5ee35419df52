"""Attention between positions: KV caches, and causal attention by the platform's kernel."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.devices.sharding import partition_spec, platform
from tokenformer_jax.nn.backends import SPLASH_BLOCKS, attention_kernel, sums_in_float32


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far, of all layers; S is the most that fit."""

    key: jax.Array  # [layers, B, H, S, K]
    value: jax.Array
    length: jax.Array  # int32 scalar, positions filled
    padding: jax.Array | None = None  # int32 [B], positions at the front of a row that later ones must not see

    @classmethod
    def empty(cls, cfg: ModelConfig, batch: int, size: int) -> "KVCache":
        shape = cfg.num_layers, batch, cfg.num_heads, size, cfg.head_dim
        return cls(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype), jnp.int32(0))

    def put(self, layer: Any, k_BLHK: jax.Array, v_BLHK: jax.Array) -> tuple["KVCache", jax.Array, jax.Array]:
        """The cache with a layer's new positions, whose count is added later, and that layer's [B, H, S, K]."""

        def put(seen: jax.Array, new_BLHK: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(seen, new_BLHK.swapaxes(1, 2)[None], (layer, 0, 0, self.length, 0))

        keys, values = put(self.key, k_BLHK), put(self.value, v_BLHK)
        return self._replace(key=keys, value=values), keys[layer], values[layer]


class UnstackedKVCache(NamedTuple):
    """The same with arrays of their own for each layer, whose number is then a Python integer."""

    key: list[jax.Array]  # of each layer [B H, S, K]
    value: list[jax.Array]
    length: jax.Array
    padding: jax.Array | None = None

    @classmethod
    def empty(cls, cfg: ModelConfig, batch: int, size: int) -> "UnstackedKVCache":
        shape = batch * cfg.num_heads, size, cfg.head_dim
        keys, values = ([jnp.zeros(shape, cfg.dtype) for _ in range(cfg.num_layers)] for _ in range(2))
        return cls(keys, values, jnp.int32(0))

    def put(self, layer: int, k_BLHK: jax.Array, v_BLHK: jax.Array) -> tuple["UnstackedKVCache", jax.Array, jax.Array]:
        B, L, H, K = k_BLHK.shape

        def put(seen_GSK: jax.Array, new_BLHK: jax.Array) -> jax.Array:
            new_GLK = new_BLHK.swapaxes(1, 2).reshape(B * H, L, K)
            return jax.lax.dynamic_update_slice(seen_GSK, new_GLK, (0, self.length, 0))

        key, value = put(self.key[layer], k_BLHK), put(self.value[layer], v_BLHK)
        keys, values = ([*all[:layer], one, *all[layer + 1 :]] for all, one in ((self.key, key), (self.value, value)))
        return self._replace(key=keys, value=values), key.reshape(B, H, -1, K), value.reshape(B, H, -1, K)


Cache = KVCache | UnstackedKVCache | None


def causal_attention(
    q_BLHK: jax.Array, k_BLHK: jax.Array, v_BLHK: jax.Array, segments_BL: jax.Array | None = None
) -> jax.Array:
    """softmax(q kᵀ / √K) v over the positions up to each one's own and, with segments, within its segment.

    By the kernel that `backends.attention_kernel` chooses; none keeps scores for the gradient.
    `jax.nn.dot_product_attention` computes the same.

    Args:
      q_BLHK: queries, sharded by batch and heads.
      k_BLHK: keys.
      v_BLHK: values.
      segments_BL: int32 segment of each position.

    Returns:
      [B, L, H K] in the dtype of v.
    """
    return _by_kernel(q_BLHK, k_BLHK, v_BLHK, segments_BL, causal=True)


def full_attention(q_BLHK: jax.Array, k_BLHK: jax.Array, v_BLHK: jax.Array) -> jax.Array:
    """`causal_attention` without the mask: every position sees all."""
    return _by_kernel(q_BLHK, k_BLHK, v_BLHK, None, causal=False)


def _by_kernel(q_BLHK, k_BLHK, v_BLHK, segments_BL, causal: bool) -> jax.Array:
    which = attention_kernel(platform(), q_BLHK.shape, q_BLHK.dtype, causal)
    if which == "splash":
        return splash_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, causal=causal)
    if which == "blockwise":
        return blockwise_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, causal)
    return fused_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, causal)


def cached_attention(
    q_BLHK: jax.Array,
    k_BHSK: jax.Array,
    v_BHSK: jax.Array,
    start: jax.Array | int,
    padding_B: jax.Array | None = None,
) -> jax.Array:
    """`causal_attention` of L new positions, the first of which is number `start` of those in a KV cache.

    With padding, a row's first positions are seen by each other alone.
    """
    scores_BHSL = sums_in_float32("bhsk,blhk->bhsl", k_BHSK, q_BLHK)
    scores_BHLS = scores_BHSL.swapaxes(2, 3) * q_BLHK.shape[-1] ** -0.5  # else a CPU transposes the keys
    keys_S, queries_L1 = jnp.arange(k_BHSK.shape[2]), start + jnp.arange(q_BLHK.shape[1])[:, None]
    seen = keys_S <= queries_L1
    if padding_B is not None:
        padding_B111 = padding_B[:, None, None, None]
        seen &= (keys_S >= padding_B111) | (queries_L1 < padding_B111)
    weights_BHLS = jax.nn.softmax(jnp.where(seen, scores_BHLS, -jnp.inf))
    return jnp.einsum("bhls,bhsk->blhk", weights_BHLS.astype(v_BHSK.dtype), v_BHSK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segments_BL: jax.Array | None = None,
    causal: bool = True,
) -> jax.Array:
    """`causal_attention`, or `full_attention`, a block of queries at a time with the keys up to its end; any L.

    It computes little of what the mask hides. A CPU works on several blocks at once, where it would take one core for
    a product of as many matrices.
    """
    return _blockwise_forward(q_BLHK, k_BLHK, v_BLHK, segments_BL, causal)[0]


def _blocks(length: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """The queries of each block, and the keys that they may see: at most eight blocks, of 64 queries at least."""
    size = max(64, -(-length // 8))
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start, end), slice(0, end if causal else length)


def _scores(q_BHLK, k_BHLK, segments_BL, queries: slice, keys: slice, causal: bool) -> jax.Array:
    """float32 [B, H, C, S] of C queries and the S keys that they may see; -inf where masked."""
    q_BHCK = q_BHLK[:, :, queries]
    scores_BHCS = sums_in_float32("bhck,bhsk->bhcs", q_BHCK, k_BHLK[:, :, keys])
    if not causal:
        return scores_BHCS * q_BHLK.shape[-1] ** -0.5
    seen = jnp.arange(keys.stop) <= jnp.arange(queries.start, queries.stop)[:, None]
    if segments_BL is not None:
        seen &= (segments_BL[:, queries, None] == segments_BL[:, None, keys])[:, None]
    return jnp.where(seen, scores_BHCS * q_BHLK.shape[-1] ** -0.5, -jnp.inf)


def _blockwise_forward(q_BLHK, k_BLHK, v_BLHK, segments_BL, causal):
    q_BHLK, k_BHLK, v_BHLK = (x.swapaxes(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    outs, log_sums = [], []
    for queries, keys in _blocks(q_BHLK.shape[2], causal):
        scores_BHCS = _scores(q_BHLK, k_BHLK, segments_BL, queries, keys, causal)
        largest_BHC1 = jnp.max(scores_BHCS, axis=-1, keepdims=True)
        weights_BHCS = jnp.exp(scores_BHCS - largest_BHC1)
        sums_BHC1 = jnp.sum(weights_BHCS, axis=-1, keepdims=True)
        sums_BHCK = sums_in_float32("bhcs,bhsk->bhck", weights_BHCS.astype(v_BHLK.dtype), v_BHLK[:, :, keys])
        outs.append((sums_BHCK / sums_BHC1).astype(v_BHLK.dtype))
        log_sums.append(largest_BHC1 + jnp.log(sums_BHC1))
    out_BLD = jnp.concatenate(outs, axis=2).swapaxes(1, 2).reshape(*q_BLHK.shape[:2], -1)
    return out_BLD, (q_BLHK, k_BLHK, v_BLHK, segments_BL, out_BLD, jnp.concatenate(log_sums, axis=2))


def _blockwise_backward(causal, kept, dout_BLD):
    q_BLHK, k_BLHK, v_BLHK, segments_BL, out_BLD, log_sums_BHL1 = kept
    q_BHLK, k_BHLK, v_BHLK = (x.swapaxes(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    dout_BHLK, out_BHLK = (x.reshape(q_BLHK.shape).swapaxes(1, 2) for x in (dout_BLD, out_BLD))
    dtype, scale = q_BHLK.dtype, q_BHLK.shape[-1] ** -0.5
    along_BHL1 = jnp.sum(dout_BHLK.astype(jnp.float32) * out_BHLK.astype(jnp.float32), axis=-1, keepdims=True)
    dqs, dk_BHLK, dv_BHLK = [], jnp.zeros(k_BHLK.shape, jnp.float32), jnp.zeros(v_BHLK.shape, jnp.float32)
    for queries, keys in _blocks(q_BHLK.shape[2], causal):
        dout_BHCK = dout_BHLK[:, :, queries]
        probs_BHCS = jnp.exp(_scores(q_BHLK, k_BHLK, segments_BL, queries, keys, causal) - log_sums_BHL1[:, :, queries])
        dprobs_BHCS = sums_in_float32("bhck,bhsk->bhcs", dout_BHCK, v_BHLK[:, :, keys])
        dscores_BHCS = (scale * probs_BHCS * (dprobs_BHCS - along_BHL1[:, :, queries])).astype(dtype)
        dqs.append(jnp.einsum("bhcs,bhsk->bhck", dscores_BHCS, k_BHLK[:, :, keys]))
        onto_keys = functools.partial(sums_in_float32, "bhcs,bhck->bhsk")
        dk_BHLK = dk_BHLK.at[:, :, keys].add(onto_keys(dscores_BHCS, q_BHLK[:, :, queries]))
        dv_BHLK = dv_BHLK.at[:, :, keys].add(onto_keys(probs_BHCS.astype(dtype), dout_BHCK))
    grads = jnp.concatenate(dqs, axis=2), dk_BHLK.astype(dtype), dv_BHLK.astype(dtype)
    return *(grad.swapaxes(1, 2) for grad in grads), None


blockwise_attention.defvjp(_blockwise_forward, _blockwise_backward)


def with_padding(more: int, *arrays_BLHK: jax.Array) -> list[jax.Array]:
    """The arrays with so many more positions, zeros, behind their own."""
    return [jnp.pad(x_BLHK, [(0, 0), (0, more), (0, 0), (0, 0)]) for x_BLHK in arrays_BLHK]


def fused_attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segments_BL: jax.Array | None = None,
    causal: bool = True,
    implementation: Any = "cudnn",
) -> jax.Array:
    """`causal_attention`, or `full_attention`, by cuDNN, whose gradient takes even L alone: an odd one gets padding."""
    batch, length = q_BLHK.shape[:2]
    lengths_B = None
    if length % 2:
        q_BLHK, k_BLHK, v_BLHK = with_padding(1, q_BLHK, k_BLHK, v_BLHK)
        segments_BL = None if segments_BL is None else jnp.pad(segments_BL, [(0, 0), (0, 1)])
        lengths_B = jnp.full(batch, length, jnp.int32)
    mask = None if segments_BL is None else (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    out_BLHK = jax.nn.dot_product_attention(
        q_BLHK,
        k_BLHK,
        v_BLHK,
        mask=mask,
        is_causal=causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation=implementation,
    )
    return out_BLHK[:, :length].reshape(batch, length, -1)


def splash_attention(
    q_BLHK: jax.Array,
    k_BLHK: jax.Array,
    v_BLHK: jax.Array,
    segments_BL: jax.Array | None = None,
    interpret: bool = False,
    causal: bool = True,
) -> jax.Array:
    """`causal_attention` of L a multiple of 128, or `full_attention`, by JAX's Pallas kernel.

    `interpret` runs it anywhere, slowly.
    """
    batch, length, _, head_dim = q_BLHK.shape
    if more := -length % SPLASH_BLOCKS[-1]:  # padding is a segment of its own
        segments_BL = jnp.tile(jnp.arange(length + more, dtype=jnp.int32) < length, (batch, 1)).astype(jnp.int32)
        q_BLHK, k_BLHK, v_BLHK = with_padding(more, q_BLHK, k_BLHK, v_BLHK)
        return splash_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, interpret, causal)[:, :length]
    block = next(size for size in SPLASH_BLOCKS if length % size == 0)
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
        kind = masks.CausalMask if causal else masks.FullMask
        mask = masks.MultiHeadMask([kind((length, length))] * q_BLHK.shape[2])
        one = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
        ids = None if segments_BL is None else splash.SegmentIds(segments_BL, segments_BL)
        q_BHLK, k_BHLK, v_BHLK = (x.swapaxes(1, 2) for x in (q_BLHK * head_dim**-0.5, k_BLHK, v_BLHK))
        return jax.vmap(one)(q_BHLK, k_BHLK, v_BHLK, ids).swapaxes(1, 2).reshape(*q_BLHK.shape[:2], -1)

    inputs = (q_BLHK, k_BLHK, v_BLHK) + (() if segments_BL is None else (segments_BL,))
    if jax.sharding.get_abstract_mesh().empty:
        return attend(*inputs)
    rows, heads = partition_spec(("batch",)), partition_spec(("batch", None, "heads"))
    specs = (heads,) * 3 + (rows,) * (len(inputs) - 3)
    return jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)(*inputs)
