"""An image classifier that trains in minutes on a laptop and grows.

Trains on: 1,438 of scikit-learn's 1,797 handwritten digits (8 x 8 pixels, gray; `pip install scikit-learn`).
Variants: small; grown (from small, four times the parameter tokens); large (as grown, from scratch); vit (a plain ViT).
"""

from ml_collections import ConfigDict

from tokenformer_jax.configs import base


def get_config(variant: str = "small") -> ConfigDict:
    if variant not in ("small", "grown", "large", "vit"):
        raise ValueError(f"variant {variant!r} must be small, grown, large or vit")
    tokens = 32 if variant == "small" else 128
    config = base.get_config()
    config.task = "image_classification"
    config.steps = 1000 if variant == "small" else 3000
    config.batch_size = 64
    config.log_every = 50
    config.eval_every = 250
    config.checkpoint_every = 500
    config.data.update(dataset="digits")
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
        stochastic_depth=0.1,
        stochastic_depth_rises=True,
    )
    if variant == "vit":
        config.model.update(projection="linear", qkv_tokens=0, out_tokens=0, ffn_tokens=256)
    config.optimizer.update(peak_learning_rate=1e-3, final_learning_rate=1e-5, warmup_steps=100)
    config.augment.update(smallest_crop=0.6, label_smoothing=0.1)
    return config
