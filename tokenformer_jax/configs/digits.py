"""An image classifier that trains in minutes on a laptop and grows: docs/vision.md walks through it.

Trains on: 1,438 of scikit-learn's 1,797 handwritten digits (8 x 8 pixels, gray; `pip install scikit-learn`); every
fifth is for validation.
Variants: small; grown (from small, twice the parameter tokens); large (as grown, from scratch) and vit (a plain ViT of
as many parameters), each for as many FLOPs as small and grown together. One schedule spans small and grown: its rate is
constant until the last fifth. docs/vision.md shows what they reach.
"""

from ml_collections import ConfigDict

from tokenformer_jax.configs import base

GROW_STEP, FLOPS = 500, 2.2e12


def get_config(variant: str = "small") -> ConfigDict:
    if variant not in ("small", "grown", "large", "vit"):
        raise ValueError(f"variant {variant!r} must be small, grown, large or vit")
    tokens = 16 if variant == "small" else 32
    config = base.get_config()
    config.task = "image_classification"
    config.train_flops = FLOPS
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 500
    config.data.update(dataset="digits", train_examples=1438)
    config.model.update(
        vocab_size=0,
        context_length=0,
        rotary_fraction=0.0,
        num_layers=4,
        num_heads=4,
        embed_dim=64,
        qkv_tokens=tokens,
        out_tokens=tokens,
        ffn_tokens=4 * tokens,
        image_size=8,
        patch_size=2,
        image_channels=1,
        num_classes=10,
        pooling="mean",
        stochastic_depth=0.1,
        stochastic_depth_rises=True,
    )
    config.optimizer.update(
        schedule="wsd",
        peak_learning_rate=3e-3,
        final_learning_rate=0.0,
        warmup_steps=100,
        decay_fraction=0.2,
        average=0.99,
    )
    config.grow.update(restart_schedule=False, tau_ramp=0.1)
    config.augment.update(smallest_crop=0.6, mixup=0.2, cutmix=1.0, label_smoothing=0.1)
    if variant == "vit":
        config.model.update(projection="linear", qkv_tokens=0, out_tokens=0, ffn_tokens=8 * tokens - 2 * 64)
    if variant == "small":
        config.train_flops = 0.0
        config.steps = GROW_STEP
        config.optimizer.schedule = "constant"  # the decay is for grown to make
    return config
