"""The language model: tied embeddings around a stack of blocks."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.devices.sharding import Axes, constrain
from tokenformer_jax.nn.attention import KVCache, cached_attention, causal_attention, put_in_cache
from tokenformer_jax.nn.layers import (
    Key,
    Params,
    dropout,
    layer_norm,
    parameter,
    subkey,
)
from tokenformer_jax.nn.transformer import REMAT_POLICIES, Block, Tau, stack_layers


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
                keys, values = (put_in_cache(old, new, number, start) for old, new in zip(seen, (k, v), strict=True))
                seen, (k_BHSK, v_BHSK) = zip(keys, values, strict=True)
                return cached_attention(q, k_BHSK, v_BHSK, start)

            return (nnx.merge(graphdef, params)(x_BLD, tau, attend, positions_L, subkey(key, number)), seen), None

        if self.cfg.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.cfg.remat])
        carry = x_BLD, None if cache is None else (cache.key, cache.value)
        if layers is None:
            numbers = None if key is None and cache is None else jnp.arange(self.cfg.num_layers)
            carry, _ = jax.lax.scan(layer, carry, (blocks, numbers))
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
