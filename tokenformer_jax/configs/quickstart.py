"""A TokenFormer that trains in minutes on a laptop, and its grown successor: `launch/quickstart.sh` runs them all.

Trains on: the Python standard library (3.6 M tokens of a 2048-token BPE), 128 tokens of context.
Variants: small; grown (from small, eight times the parameter tokens); continued (small, trained on for as many FLOPs as
grown spends). The README shows what they reach.
"""

from ml_collections import ConfigDict

from tokenformer_jax.configs import base

SMALL_STEPS, GROWN_STEPS = 600, 600
CONTINUED_STEPS = 1200  # a step of the grown model costs twice the FLOPs of a step of the small one


def get_config(variant: str = "small") -> ConfigDict:
    config = base.get_config()
    config.batch_size = 16
    config.log_every = 20
    config.eval_every = 200
    config.checkpoint_every = 200
    config.steps = SMALL_STEPS
    config.model.update(
        vocab_size=2048,
        context_length=128,
        num_layers=4,
        num_heads=4,
        embed_dim=128,
        qkv_tokens=8,
        out_tokens=8,
        ffn_tokens=32,
    )
    config.optimizer.update(peak_learning_rate=8e-3, final_learning_rate=8e-4, warmup_steps=30)
    if variant == "grown":
        config.steps = SMALL_STEPS + GROWN_STEPS
        config.model.update(qkv_tokens=64, out_tokens=64, ffn_tokens=256)
    elif variant == "continued":
        config.steps = SMALL_STEPS + CONTINUED_STEPS
    elif variant != "small":
        raise ValueError(f"variant {variant!r} must be small, grown or continued")
    return config
