"""A TokenFormer that trains in minutes on a laptop and grows, and its two rivals: `launch/quickstart.sh` runs them all.

Trains on: the Python standard library (4 M tokens of a 1024-token BPE), 128 tokens of context.
Variants: small; grown (from small, four times the parameter tokens); large (as grown, from scratch) and longer (as
small, from scratch), each for as many FLOPs as small and grown together. One schedule spans small and grown: its rate
is constant until the last fifth. The README shows what they reach.
"""

from ml_collections import ConfigDict

from tokenformer_jax.configs import base

GROW_STEP, FLOPS = 1000, 4.2e12  # 20 tokens a parameter of the large model


def get_config(variant: str = "small") -> ConfigDict:
    if variant not in ("small", "grown", "large", "longer"):
        raise ValueError(f"variant {variant!r} must be small, grown, large or longer")
    tokens = 64 if variant in ("grown", "large") else 16
    config = base.get_config()
    config.batch_size = 4
    config.log_every = 50
    config.eval_every = 500
    config.eval_batches = 100
    config.checkpoint_every = 500
    config.train_flops = FLOPS
    config.model.update(
        vocab_size=1024,
        context_length=128,
        num_layers=2,
        num_heads=2,
        embed_dim=64,
        qkv_tokens=tokens,
        out_tokens=tokens,
        ffn_tokens=4 * tokens,
    )
    config.optimizer.update(
        schedule="wsd", peak_learning_rate=2e-3, final_learning_rate=0.0, warmup_steps=200, decay_fraction=0.2
    )
    config.grow.update(restart_schedule=False, tau_ramp=0.1)
    if variant == "small":
        config.train_flops = 0.0
        config.steps = GROW_STEP
        config.optimizer.schedule = "constant"  # the decay is for grown to make
    return config
