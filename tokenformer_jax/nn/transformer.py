"""The blocks: a pre-norm Transformer whose every projection is a Pattention (TokenFormer, section 3.3).

With `projection="linear"` the same block, with weight matrices in their place, is a plain Transformer.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.devices.sharding import Axes, constrain
from tokenformer_jax.nn.attention import Cache, cached_attention, causal_attention, full_attention
from tokenformer_jax.nn.backends import unrolls_layers
from tokenformer_jax.nn.layers import (
    MLP,
    Key,
    Linear,
    Params,
    dropout,
    layer_norm,
    rotary,
    subkey,
)
from tokenformer_jax.nn.pattention import Pattention

Tau = dict[str, Any]  # projection name -> its τ, a scalar; empty for a plain Transformer


class Block(nnx.Module):
    """One layer: x + Attention(LN(x)), then x + FFN(LN(x)); both norms without parameters.

    In training, where the authors' TPU code does it: dropout on the output of the attention's output projection (every
    entry for itself) and on the feed-forward's weights Θ or hidden layer (one draw for all positions of an example);
    not on attention probabilities. Stochastic depth zeroes either branch for a whole example, at the same rate in
    every layer or at one that rises to it from 0 in the first, and scales what stays by 1 / (1 - rate).
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.dropout, self.stochastic_depth = cfg.num_heads, cfg.dropout, cfg.stochastic_depth
        self.rises_over = cfg.num_layers - 1 if cfg.stochastic_depth_rises else 0
        self.rotary_dims = int(cfg.rotary_fraction * cfg.head_dim)
        dim, dtype = cfg.embed_dim, jnp.dtype(cfg.dtype)
        output_scale = 2 / cfg.num_layers / math.sqrt(dim)

        def projection(name: str) -> nnx.Module:
            if cfg.projection == "pattention":
                return Pattention(
                    cfg.tokens[name],
                    dim,
                    dim,
                    value_scale=output_scale,
                    normalizer=cfg.normalizer,
                    gelu=cfg.gelu,
                    dropout=cfg.dropout if name == "ffn" else 0.0,
                    recompute=cfg.remat in ("projections", "full"),
                    padding=cfg.tokens[name] - cfg.unpadded_tokens[name],
                    rngs=rngs,
                )
            if name == "ffn":
                return MLP(
                    dim,
                    cfg.ffn_tokens,
                    gelu=cfg.gelu,
                    dropout=cfg.dropout,
                    scale=output_scale,
                    dtype=dtype,
                    rngs=rngs,
                )
            axes = ("tokens", "embed") if name == "out" else ("embed", "tokens")
            return Linear(dim, dim, axes, scale=output_scale if name == "out" else 0.02, dtype=dtype, rngs=rngs)

        self.query, self.key, self.value = projection("query"), projection("key"), projection("value")
        self.out = projection("out")
        self.ffn = projection("ffn")

    def __call__(
        self,
        x_BLD: jax.Array,
        tau: Tau,
        attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Cache]],
        positions_L: jax.Array,
        key: Key = None,
        number: Any = None,
    ) -> tuple[jax.Array, Cache]:
        """`attend(q, k, v)`, all [B, L, H, K], decides what each position sees; its cache is handed on.

        `number` is the layer's, and needed where stochastic depth rises.
        """
        B, L, D = x_BLD.shape
        head_dim = D // self.num_heads
        h_BLD = layer_norm(x_BLD)
        q_BLD = checkpoint_name(self.query(h_BLD, tau.get("query")), "projection")
        k_BLD = checkpoint_name(self.key(h_BLD, tau.get("key")), "projection")
        v_BLD = checkpoint_name(self.value(h_BLD, tau.get("value")), "projection")
        with jax.named_scope("attention"):
            q_BLD, k_BLD = (rotary(x, positions_L, head_dim, self.rotary_dims) for x in (q_BLD, k_BLD))
            q_BLHK, k_BLHK, v_BLHK = (
                constrain(x.reshape(B, L, self.num_heads, head_dim), "batch", None, "heads", None)
                for x in (q_BLD, k_BLD, v_BLD)
            )
            mixed, cache = attend(q_BLHK, k_BLHK, v_BLHK)
            mixed_BLD = mixed.reshape(B, L, D)
        y_BLD = checkpoint_name(self.out(constrain(mixed_BLD, "batch", None, None), tau.get("out")), "projection")
        y_BLD = dropout(y_BLD, self.dropout, subkey(key, 0))
        skipped: Any = self.stochastic_depth
        if self.rises_over and key is not None and skipped:
            skipped *= number / self.rises_over
        x_BLD += dropout(y_BLD, skipped, subkey(key, 1), shared=(1, 2))
        y_BLD = self.ffn(layer_norm(x_BLD), tau.get("ffn"), subkey(key, 2))
        x_BLD += dropout(y_BLD, skipped, subkey(key, 3), shared=(1, 2))
        return constrain(x_BLD, "batch", None, None), cache


def initial_tau(cfg: ModelConfig) -> dict[str, float]:
    """Each projection's τ at birth and after a ramp: √N for its N parameter tokens by default.

    With n = `cfg.tau_tokens` > 0 it depends on n alone, and growth leaves it as it is: √n in the attention and √(4n) in
    the feed-forward, whose scale the authors' TPU code sets for four times as many tokens (its `zoom_dim` is n).
    """
    n = cfg.tau_tokens
    return {name: math.sqrt((4 * n if name == "ffn" else n) or count) for name, count in cfg.unpadded_tokens.items()}


def stack_layers(make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> Any:
    """A module whose parameters are those of `num_layers` independent layers, stacked on a leading axis."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), num_layers)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make_layer(nnx.Rngs(key))))(keys))


def abstract_of(make_model: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Params, Params]:
    """A network's graphdef, the tree of ShapeDtypeStructs and the tree of their logical axes, without its memory."""
    graphdef, state = nnx.split(nnx.eval_shape(make_model))

    def stacked_axes(param: nnx.Param) -> Axes:  # layers are stacked in front
        return (None,) * (len(param.shape) - len(param.axes)) + param.axes

    axes = jax.tree.map(stacked_axes, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


@jax.jit
def unstack(blocks: Params) -> list[Params]:
    """The stacked parameters of blocks -> those of each layer."""
    leaves, tree = jax.tree.flatten(blocks)
    return [jax.tree.unflatten(tree, [stack[layer] for stack in leaves]) for layer in range(len(leaves[0]))]


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "projections": jax.checkpoint_policies.save_only_these_names("projection", "total"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def run_blocks(
    blocks: Block,
    x_BLD: jax.Array,
    tau: Tau,
    *,
    remat: str,
    segments_BL: jax.Array | None = None,
    cache: Cache = None,
    key: Key = None,
    layers: Sequence[Params] | None = None,
    causal: bool = True,
) -> tuple[jax.Array, Cache]:
    """Runs stacked blocks one after another in a scan or, with parameters of their own from `unstack`, in a row.

    Where they are not causal every position sees all. What a scanned block's modules set as `nnx.Intermediate`, such as
    `watch.Watched` does, stands in `blocks` then, stacked.

    Returns:
      The last block's output, and the cache with these positions.
    """
    graphdef, stacked = nnx.split(blocks)
    start, length = jnp.int32(0) if cache is None else cache.length, x_BLD.shape[1]
    positions_L = start + jnp.arange(length)

    def run(carry: tuple[jax.Array, Cache], layer: tuple[Any, Any]) -> tuple[tuple[jax.Array, Cache], nnx.State]:
        x_BLD, cache = carry
        params, number = layer

        def attend(q_BLHK: jax.Array, k_BLHK: jax.Array, v_BLHK: jax.Array) -> tuple[jax.Array, Cache]:
            if not causal:
                return full_attention(q_BLHK, k_BLHK, v_BLHK), None
            if cache is None:
                return causal_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL), None
            more, k_BHSK, v_BHSK = cache.put(number, k_BLHK, v_BLHK)
            return cached_attention(q_BLHK, k_BHSK, v_BHSK, start, cache.padding), more

        block = nnx.merge(graphdef, params)
        carry = block(x_BLD, tau, attend, positions_L, subkey(key, number), number)
        return carry, nnx.pop(block, nnx.Intermediate)

    if remat != "none":
        run = jax.checkpoint(run, policy=REMAT_POLICIES[remat])
    carry = x_BLD, cache
    if layers is None:
        num_layers = len(jax.tree.leaves(stacked)[0])
        numbers = None if key is None and cache is None else jnp.arange(num_layers)
        unroll = num_layers if cache is None and unrolls_layers(remat) else 1
        carry, seen = jax.lax.scan(run, carry, (stacked, numbers), unroll=unroll)
        nnx.update(blocks, seen)
    else:
        for number, params in enumerate(layers):
            carry, _ = run(carry, (params, number))
    x_BLD, cache = carry
    return x_BLD, None if cache is None else cache._replace(length=start + length)
