"""The language model: a pre-norm Transformer whose every projection is a Pattention (TokenFormer, section 3.3).

With `projection="linear"` the same block, with weight matrices in their place, is a plain Transformer.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tokenformer_jax.attention import cached_attention, causal_attention
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.pattention import GELUS, Pattention, dropout, parameter
from tokenformer_jax.sharding import Axes, constrain, platform

NORM_EPSILON = 1e-5
ROTARY_BASE = 10000.0

Tau = dict[str, Any]  # projection name -> its τ, a scalar; empty for a plain Transformer
Params = dict[str, Any]  # nested; arrays of a block are stacked over layers
Key = jax.Array | None  # a PRNG key in training with dropout or stochastic depth; None computes without them


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far; S is the most that fit.

    Of all layers, [layers, B, H, S, K], or with layers of their own a list of each one's [B H, S, K].
    """

    key: jax.Array | list[jax.Array]
    value: jax.Array | list[jax.Array]
    length: jax.Array  # int32 scalar, positions filled

    @classmethod
    def empty(cls, cfg: ModelConfig, batch: int, size: int, stacked: bool = True) -> "KVCache":
        def zeros() -> jax.Array | list[jax.Array]:
            if stacked:
                return jnp.zeros((cfg.num_layers, batch, cfg.num_heads, size, cfg.head_dim), cfg.dtype)
            return [jnp.zeros((batch * cfg.num_heads, size, cfg.head_dim), cfg.dtype) for _ in range(cfg.num_layers)]

        return cls(zeros(), zeros(), jnp.int32(0))


def _put(seen: Any, new_BLHK: jax.Array, layer: Any, start: Any) -> tuple[Any, jax.Array]:
    """One of a cache's two parts with a layer's new positions from `start` on, and that layer's [B, H, S, K]."""
    new_BHLK = new_BLHK.swapaxes(1, 2)
    B, H, L, K = new_BHLK.shape
    if isinstance(seen, list):
        one_GSK = jax.lax.dynamic_update_slice(seen[layer], new_BHLK.reshape(B * H, L, K), (0, start, 0))
        return [*seen[:layer], one_GSK, *seen[layer + 1 :]], one_GSK.reshape(B, H, -1, K)
    seen = jax.lax.dynamic_update_slice(seen, new_BHLK[None], (layer, 0, 0, start, 0))
    return seen, seen[layer]


@jax.custom_vjp
def layer_norm(x_BLD: jax.Array) -> jax.Array:
    """Layer norm without parameters, computed in float32."""
    return _layer_norm_forward(x_BLD)[0]


def _layer_norm_forward(x_BLD):
    x = x_BLD.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    if x_BLD.dtype == jnp.float32:
        centered -= jnp.mean(centered, axis=-1, keepdims=True)  # takes out the first mean's rounding
    scale_BL1 = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + NORM_EPSILON)
    y_BLD = (centered * scale_BL1).astype(x_BLD.dtype)
    return y_BLD, (y_BLD, scale_BL1)


def _layer_norm_backward(kept, dy_BLD):
    """Two reductions over a row, where the forward's own derivative takes five."""
    y_BLD, scale_BL1 = kept
    y, dy = y_BLD.astype(jnp.float32), dy_BLD.astype(jnp.float32)
    dx = dy - jnp.mean(dy, axis=-1, keepdims=True) - y * jnp.mean(dy * y, axis=-1, keepdims=True)
    return ((scale_BL1 * dx).astype(dy_BLD.dtype),)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rotary(x_BLD: jax.Array, positions_L: jax.Array, head_dim: int, dims: int) -> jax.Array:
    """Turns the first `dims` dims of each head by their position, pairing dim i with i + dims/2 (GPT-NeoX)."""
    if dims == 0:
        return x_BLD
    half = dims // 2
    # A product with ±1 gives each dim its partner exactly. A TPU turns all heads in one: to split them costs it more.
    width = x_BLD.shape[-1] if platform() == "tpu" else head_dim
    partner_KK = np.zeros((head_dim, head_dim), np.float32)
    partner_KK[range(half, dims), range(half)] = -1
    partner_KK[range(half), range(half, dims)] = 1
    partner_WW = np.kron(np.eye(width // head_dim, dtype=np.float32), partner_KK)
    frequencies = ROTARY_BASE ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    frequencies_W = jnp.tile(jnp.pad(jnp.tile(frequencies, 2), (0, head_dim - dims)), width // head_dim)
    angles_LW = (positions_L[:, None].astype(jnp.float32) * frequencies_W)[:, None]
    x_BLGW = x_BLD.reshape(*x_BLD.shape[:2], -1, width)
    partner_BLGW = jnp.einsum("blgw,wv->blgv", x_BLGW, partner_WW.astype(x_BLD.dtype), precision="highest")
    turned_BLGW = x_BLGW * jnp.cos(angles_LW) + partner_BLGW * jnp.sin(angles_LW)
    return turned_BLGW.astype(x_BLD.dtype).reshape(x_BLD.shape)


def _rotary_forward(x_BLD, positions_L, head_dim, dims):
    return rotary(x_BLD, positions_L, head_dim, dims), positions_L


def _rotary_backward(head_dim, dims, positions_L, dy_BLD):
    return rotary(dy_BLD, -positions_L, head_dim, dims), None


rotary.defvjp(_rotary_forward, _rotary_backward)


def subkey(key: Key, index: jax.Array | int) -> Key:
    """Key number `index` of those that a key gives; None gives None."""
    return None if key is None else jax.random.fold_in(key, index)


class Linear(nnx.Module):
    """x W, the plain Transformer's projection."""

    def __init__(self, in_dim: int, out_dim: int, axes: tuple[str, str], *, scale: float, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.weight = parameter(rngs, (in_dim, out_dim), scale, axes)

    def __call__(self, x_BLD: jax.Array, tau: None = None, key: Key = None) -> jax.Array:
        axes = (axis if axis == "tokens" else None for axis in self.weight.axes)
        return jnp.einsum("...d,de->...e", x_BLD, constrain(self.weight[...].astype(self.dtype), *axes))


class MLP(nnx.Module):
    """gelu(x W₁) W₂, the plain Transformer's feed-forward."""

    def __init__(self, dim: int, hidden: int, *, gelu: str, dropout: float, scale: float, dtype, rngs: nnx.Rngs):
        self.gelu, self.dropout = gelu, dropout
        self.up = Linear(dim, hidden, ("embed", "tokens"), scale=0.02, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, dim, ("tokens", "embed"), scale=scale, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, tau: None = None, key: Key = None) -> jax.Array:
        hidden_BLN = GELUS[self.gelu](self.up(x_BLD))
        return self.down(dropout(hidden_BLN, self.dropout, key, shared=(1,)))


class Block(nnx.Module):
    """One layer: x + Attention(LN(x)), then x + FFN(LN(x)); both norms without parameters.

    In training, where the authors' TPU code does it: dropout on the output of the attention's output projection (every
    entry for itself) and on the feed-forward's weights Θ or hidden layer (one draw for all positions of an example);
    not on attention probabilities. Stochastic depth zeroes either branch for a whole example, at the same rate in
    every layer, and scales what stays by 1 / (1 - rate).
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.num_heads, self.dropout, self.stochastic_depth = cfg.num_heads, cfg.dropout, cfg.stochastic_depth
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
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        positions_L: jax.Array,
        key: Key = None,
    ) -> jax.Array:
        """`attend(q, k, v)`, all [B, L, H, K], decides what each position sees."""
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
            mixed_BLD = attend(q_BLHK, k_BLHK, v_BLHK).reshape(B, L, D)
        y_BLD = checkpoint_name(self.out(constrain(mixed_BLD, "batch", None, None), tau.get("out")), "projection")
        y_BLD = dropout(y_BLD, self.dropout, subkey(key, 0))
        x_BLD += dropout(y_BLD, self.stochastic_depth, subkey(key, 1), shared=(1, 2))
        y_BLD = self.ffn(layer_norm(x_BLD), tau.get("ffn"), subkey(key, 2))
        x_BLD += dropout(y_BLD, self.stochastic_depth, subkey(key, 3), shared=(1, 2))
        return constrain(x_BLD, "batch", None, None)


def stack_layers(make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> Any:
    """A module whose parameters are those of `num_layers` independent layers, stacked on a leading axis."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), num_layers)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make_layer(nnx.Rngs(key))))(keys))


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


class LanguageModel(nnx.Module):
    """Decoder-only language model with tied embeddings; no position table, no biases but the final norm's.

    Dropout, in training, is that of `Block`, and on the embedded tokens and the final norm's output, where all
    positions of an example share a draw. A layer's masks are a function of the key and the layer's number.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = parameter(rngs, (cfg.vocab_size, cfg.embed_dim), 0.02, ("vocab", "embed"))
        self.blocks = stack_layers(lambda r: Block(cfg, rngs=r), cfg.num_layers, rngs)
        self.norm_scale = nnx.Param(jnp.ones(cfg.embed_dim), axes=("embed",))
        self.norm_bias = nnx.Param(jnp.zeros(cfg.embed_dim), axes=("embed",))

    def __call__(
        self,
        tokens_BL: jax.Array,
        tau: Tau,
        *,
        segments_BL: jax.Array | None = None,
        cache: KVCache | None = None,
        key: Key = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Next-token logits.

        Args:
          tokens_BL: int32 token ids.
          tau: each projection's τ; `initial_tau(cfg)` at birth.
          segments_BL: int32; when given, a position attends only within its own segment.
          cache: positions before these; when given, the result holds them and these.
          key: PRNG key of dropout and stochastic depth; without it the model is deterministic.

        Returns:
          float32 logits [B, L, V] and the cache that a next call continues from.
        """
        x_BLD, cache = self.features(tokens_BL, tau, segments_BL=segments_BL, cache=cache, key=key)
        return self.logits(x_BLD, key), cache

    def features(
        self,
        tokens_BL: jax.Array,
        tau: Tau,
        *,
        segments_BL: jax.Array | None = None,
        cache: KVCache | None = None,
        key: Key = None,
        layers: Sequence[Params] | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The last layer's output [B, L, D], before the final norm; arguments as for a call.

        With `layers`, from `unstack`, each layer's parameters are taken from there, and the cache may be a list too:
        to take them out of a stack again for every token costs a CPU more than to compute with them.
        """
        length = tokens_BL.shape[1]
        with jax.named_scope("embed"):
            table_VD = constrain(self.embed[...], None, None)  # float32, for the sake of its gradient's sums
            x_BLD = constrain(table_VD[tokens_BL].astype(self.cfg.dtype), "batch", None, None)
            x_BLD = dropout(x_BLD, self.cfg.dropout, subkey(key, self.cfg.num_layers), shared=(1,))
        start = 0 if cache is None else cache.length
        positions_L = start + jnp.arange(length)
        graphdef, blocks = nnx.split(self.blocks)

        def layer(carry: tuple[jax.Array, Any], inputs: tuple[Any, Any]) -> tuple[tuple[jax.Array, Any], None]:
            x_BLD, seen = carry
            params, number = inputs

            def attend(q, k, v):
                nonlocal seen
                if seen is None:
                    return causal_attention(q, k, v, segments_BL)
                keys, values = (_put(old, new, number, start) for old, new in zip(seen, (k, v), strict=True))
                seen, (k_BHSK, v_BHSK) = zip(keys, values, strict=True)
                return cached_attention(q, k_BHSK, v_BHSK, start)

            return (nnx.merge(graphdef, params)(x_BLD, tau, attend, positions_L, subkey(key, number)), seen), None

        if self.cfg.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.cfg.remat])
        carry = x_BLD, None if cache is None else (cache.key, cache.value)
        if layers is None:
            numbers = None if key is None and cache is None else jnp.arange(self.cfg.num_layers)
            # A loop on a GPU copies what its products leave for the gradient into arrays of all layers.
            copies = platform() in ("gpu", "cuda") and cache is None and self.cfg.remat in ("none", "dots")
            unroll = self.cfg.num_layers if copies else 1
            carry, _ = jax.lax.scan(layer, carry, (blocks, numbers), unroll=unroll)
        else:
            for number, params in enumerate(layers):
                carry, _ = layer(carry, (params, number))
        x_BLD, seen = carry
        return x_BLD, None if seen is None or cache is None else KVCache(*seen, cache.length + length)

    def final_norm(self, x_BLD: jax.Array, key: Key = None) -> jax.Array:
        """What the tied embedding turns into logits."""
        h_BLD = layer_norm(x_BLD) * self.norm_scale[...] + self.norm_bias[...]
        h_BLD = dropout(h_BLD, self.cfg.dropout, subkey(key, self.cfg.num_layers + 1), shared=(1,))
        return h_BLD.astype(self.cfg.dtype)

    @jax.named_scope("logits")
    def logits(self, x_BLD: jax.Array, key: Key = None) -> jax.Array:
        """The final norm, then the tied embedding: float32 [B, L, V]."""
        table_VD = constrain(self.embed[...].astype(self.cfg.dtype), "vocab", None)
        logits_BLV = jnp.einsum(
            "bld,vd->blv", self.final_norm(x_BLD, key), table_VD, preferred_element_type=jnp.float32
        )
        return constrain(logits_BLV, "batch", None, "vocab")


def initial_tau(cfg: ModelConfig) -> dict[str, float]:
    """Each projection's τ at birth and after a ramp: √N for its N parameter tokens by default.

    With n = `cfg.tau_tokens` > 0 it depends on n alone, and growth leaves it as it is: √n in the attention and √(4n) in
    the feed-forward, whose scale the authors' TPU code sets for four times as many tokens (its `zoom_dim` is n).
    """
    n = cfg.tau_tokens
    return {name: math.sqrt((4 * n if name == "ffn" else n) or count) for name, count in cfg.unpadded_tokens.items()}


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Draws all parameters (float32) as the authors do."""
    return nnx.to_pure_dict(nnx.state(LanguageModel(cfg, rngs=nnx.Rngs(key))))


def abstract_model(cfg: ModelConfig) -> tuple[nnx.GraphDef, Params, Params]:
    """What a model is, without its memory: `nnx.merge(graphdef, params)` makes one.

    Returns:
      The graphdef, the tree of ShapeDtypeStructs and the tree of their logical axes.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(cfg, rngs=nnx.Rngs(0))))

    def stacked_axes(param: nnx.Param) -> Axes:  # layers are stacked in front
        return (None,) * (len(param.shape) - len(param.axes)) + param.axes

    axes = jax.tree.map(stacked_axes, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def count_params(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
