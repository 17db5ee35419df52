"""The image classifier: patches around the same stack of blocks, which no mask makes causal."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.data.augment import normalize
from tokenformer_jax.devices.sharding import constrain
from tokenformer_jax.nn.backends import sums_in_float32
from tokenformer_jax.nn.layers import Key, Params, dropout, layer_norm, parameter, subkey
from tokenformer_jax.nn.transformer import Block, Tau, abstract_of, run_blocks, stack_layers


class ImageClassifier(nnx.Module):
    """A ViT (arXiv 2010.11929) of our blocks: patches and head are linear, with biases; positions are learned.

    With `projection="linear"` it is a plain ViT, whose blocks have no biases and whose norms but the last have no
    parameters. Dropout is that of `Block`, and on the embedded patches and the final norm's output, entry by entry.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dim, pixels = cfg.embed_dim, cfg.patch_size**2 * cfg.image_channels
        self.patch_weight = parameter(rngs, (pixels, dim), 1 / math.sqrt(pixels), ("pixels", "embed"))
        self.patch_bias = nnx.Param(jnp.zeros(dim), axes=("embed",))
        if cfg.pooling == "class_token":
            self.class_token = parameter(rngs, (dim,), 0.02, ("embed",))
        self.positions = parameter(rngs, (cfg.positions, dim), 0.02, ("positions", "embed"))
        self.blocks = stack_layers(lambda r: Block(cfg, rngs=r), cfg.num_layers, rngs)
        self.norm_scale = nnx.Param(jnp.ones(dim), axes=("embed",))
        self.norm_bias = nnx.Param(jnp.zeros(dim), axes=("embed",))
        self.head_weight = parameter(rngs, (cfg.num_classes, dim), 0.02, ("classes", "embed"))
        self.head_bias = nnx.Param(jnp.zeros(cfg.num_classes), axes=("classes",))

    def __call__(self, images_BHWC: jax.Array, tau: Tau, key: Key = None) -> jax.Array:
        """Logits of the classes.

        Args:
          images_BHWC: square images, uint8, or floats that `normalized` made.
          tau: each projection's τ; `initial_tau(cfg)` at birth.
          key: PRNG key of dropout and stochastic depth; without it the model is deterministic.

        Returns:
          float32 logits [B, V] of V classes.
        """
        cfg = self.cfg
        with jax.named_scope("embed"):
            patches_BLP = patches(normalized(images_BHWC), cfg.patch_size).astype(cfg.dtype)
            x_BLD = (
                sums_in_float32("blp,pd->bld", patches_BLP, self._in_dtype(self.patch_weight)) + self.patch_bias[...]
            )
            if cfg.pooling == "class_token":
                first_B1D = jnp.broadcast_to(self.class_token[...], (len(x_BLD), 1, cfg.embed_dim))
                x_BLD = jnp.concatenate([first_B1D, x_BLD], axis=1)
            x_BLD = constrain((x_BLD + self.positions[...]).astype(cfg.dtype), "batch", None, None)
            x_BLD = dropout(x_BLD, cfg.dropout, subkey(key, cfg.num_layers))
        x_BLD, _ = run_blocks(self.blocks, x_BLD, tau, remat=cfg.remat, key=key, causal=False)
        with jax.named_scope("logits"):
            # The norm is of each position, so the class token's alone will do; a mean is of all that are normed.
            x_BLD = x_BLD[:, :1] if cfg.pooling == "class_token" else x_BLD
            h_BLD = layer_norm(x_BLD) * self.norm_scale[...] + self.norm_bias[...]
            h_BD = dropout(jnp.mean(h_BLD, axis=1), cfg.dropout, subkey(key, cfg.num_layers + 1)).astype(cfg.dtype)
            return sums_in_float32("bd,vd->bv", h_BD, self._in_dtype(self.head_weight)) + self.head_bias[...]

    def _in_dtype(self, weight: nnx.Param) -> jax.Array:
        return constrain(weight[...].astype(self.cfg.dtype), None, None)

    def sums(self, batch: Any, tau: Tau, cfg: Config, key: Key = None) -> dict[str, jax.Array]:
        """Sums over a batch: `nll` in nats, `weights`, and how often the label is the likeliest, or among five."""
        logits_BV, weights_B = self(batch.images_BHWC, tau, key), batch.weights_BL[:, 0]
        targets_BV = as_targets(batch.targets, cfg.model.num_classes)
        label_B1 = jnp.argmax(targets_BV, axis=-1, keepdims=True)
        of_label_B1 = jnp.take_along_axis(logits_BV, label_B1, axis=-1)
        # Of equal logits the first comes first, as argmax has it.
        before_BV = (logits_BV > of_label_B1) | (
            (logits_BV == of_label_B1) & (jnp.arange(logits_BV.shape[1]) < label_B1)
        )
        rank_B = jnp.sum(before_BV, axis=-1)
        nll_B = -jnp.sum(targets_BV * jax.nn.log_softmax(logits_BV), axis=-1)
        of_each = {"nll": nll_B, "weights": jnp.ones_like(nll_B), "top1": rank_B < 1, "top5": rank_B < 5}
        return {name: jnp.sum(x_B * weights_B) for name, x_B in of_each.items()}

    def loss_sums(self, batch: Any, tau: Tau, cfg: Config, key: Key = None) -> tuple[jax.Array, jax.Array]:
        """The weighted sum of losses in nats, and the sum of weights."""
        sums = self.sums(batch, tau, cfg, key)
        return sums["nll"], sums["weights"]

    def outputs(self, batch: Any, tau: Tau, cfg: Config) -> jax.Array:
        """Logits [B, V] of a batch."""
        return self(batch.images_BHWC, tau)


def normalized(images_BHWC: jax.Array) -> jax.Array:
    """Pixels 0 … 255 -> float32 in [-1, 1]; floats are normalized already."""
    if jnp.issubdtype(images_BHWC.dtype, jnp.floating):
        return images_BHWC
    return normalize(images_BHWC)


def patches(images_BHWC: jax.Array, size: int) -> jax.Array:
    """Square patches in reading order, each of them as one row: pixel by pixel, its channels together. [B, L, P]."""
    B, H, W, C = images_BHWC.shape
    split = images_BHWC.reshape(B, H // size, size, W // size, size, C).swapaxes(2, 3)
    return split.reshape(B, -1, size * size * C)


def as_targets(targets: jax.Array, num_classes: int) -> jax.Array:
    """Probabilities [B, V] of the classes: given as they are, or of labels [B, 1]."""
    if jnp.issubdtype(targets.dtype, jnp.floating):
        return targets
    return jax.nn.one_hot(targets[:, 0], num_classes)


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Draws all parameters (float32)."""
    return nnx.to_pure_dict(nnx.state(ImageClassifier(cfg, rngs=nnx.Rngs(key))))


def abstract_model(cfg: ModelConfig) -> tuple[nnx.GraphDef, Params, Params]:
    """As `language.abstract_model`."""
    return abstract_of(lambda: ImageClassifier(cfg, rngs=nnx.Rngs(0)))
