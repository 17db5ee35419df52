"""The language model: tied embeddings around a stack of blocks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.devices.sharding import constrain
from tokenformer_jax.nn.attention import Cache
from tokenformer_jax.nn.backends import sums_in_float32
from tokenformer_jax.nn.layers import (
    Key,
    Params,
    dropout,
    layer_norm,
    parameter,
    subkey,
)
from tokenformer_jax.nn.loss import cross_entropy, log_likelihoods
from tokenformer_jax.nn.transformer import Block, Tau, abstract_of, run_blocks, stack_layers


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
        cache: Cache = None,
        key: Key = None,
    ) -> tuple[jax.Array, Cache]:
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
        cache: Cache = None,
        key: Key = None,
        layers: Sequence[Params] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The last layer's output [B, L, D], before the final norm; arguments as for a call.

        With `layers`, from `unstack`, each layer's parameters are taken from there, and the cache may be unstacked too.
        """
        with jax.named_scope("embed"):
            table_VD = constrain(self.embed[...], None, None)  # float32, for the sake of its gradient's sums
            x_BLD = constrain(table_VD[tokens_BL].astype(self.cfg.dtype), "batch", None, None)
            x_BLD = dropout(x_BLD, self.cfg.dropout, subkey(key, self.cfg.num_layers), shared=(1,))
        return run_blocks(
            self.blocks,
            x_BLD,
            tau,
            remat=self.cfg.remat,
            segments_BL=segments_BL,
            cache=cache,
            key=key,
            layers=layers,
        )

    def final_norm(self, x_BLD: jax.Array, key: Key = None) -> jax.Array:
        """What the tied embedding turns into logits."""
        h_BLD = layer_norm(x_BLD) * self.norm_scale[...] + self.norm_bias[...]
        h_BLD = dropout(h_BLD, self.cfg.dropout, subkey(key, self.cfg.num_layers + 1), shared=(1,))
        return h_BLD.astype(self.cfg.dtype)

    def loss_sums(self, batch: Any, tau: Tau, cfg: Config, key: Key = None) -> tuple[jax.Array, jax.Array]:
        """The weighted sum of next-token losses in nats over the padded vocabulary, and the sum of weights.

        With a PRNG key the model drops out; without, it is deterministic.
        """
        segments_BL = batch.segments_BL if cfg.data.mask_documents else None
        x_BLD, _ = self.features(batch.tokens_BL, tau, segments_BL=segments_BL, key=key)
        with jax.named_scope("loss"):
            nll = cross_entropy(self.final_norm(x_BLD, key), self.embed[...], batch.targets_BL, batch.weights_BL)
        return nll, jnp.sum(batch.weights_BL)

    def sums(self, batch: Any, tau: Tau, cfg: Config) -> dict[str, jax.Array]:
        """What an evaluation adds up: `nll` and `weights`, those of `loss_sums`."""
        return dict(zip(("nll", "weights"), self.loss_sums(batch, tau, cfg), strict=True))

    def outputs(self, batch: Any, tau: Tau, cfg: Config) -> jax.Array:
        """Next-token logits of a batch."""
        segments_BL = batch.segments_BL if cfg.data.mask_documents else None
        return self(batch.tokens_BL, tau, segments_BL=segments_BL)[0]

    def log_likelihoods(self, tokens_BL: jax.Array, targets_BL: jax.Array, tau: Tau) -> tuple[jax.Array, jax.Array]:
        """Of each target the log-probability, float32 [B, L], and whether no token is likelier."""
        x_BLD, _ = self.features(tokens_BL, tau)
        return log_likelihoods(self.final_norm(x_BLD), self.embed[...], targets_BL)

    @jax.named_scope("logits")
    def logits(self, x_BLD: jax.Array, key: Key = None) -> jax.Array:
        """The final norm, then the tied embedding: float32 [B, L, V]."""
        table_VD = constrain(self.embed[...].astype(self.cfg.dtype), "vocab", None)
        logits_BLV = sums_in_float32("bld,vd->blv", self.final_norm(x_BLD, key), table_VD)
        return constrain(logits_BLV, "batch", None, "vocab")


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Draws all parameters (float32) as the authors do."""
    return nnx.to_pure_dict(nnx.state(LanguageModel(cfg, rngs=nnx.Rngs(key))))


def abstract_model(cfg: ModelConfig) -> tuple[nnx.GraphDef, Params, Params]:
    """What a model is, without its memory: `nnx.merge(graphdef, params)` makes one.

    Returns:
      The graphdef, the tree of ShapeDtypeStructs and the tree of their logical axes.
    """
    return abstract_of(lambda: LanguageModel(cfg, rngs=nnx.Rngs(0)))
