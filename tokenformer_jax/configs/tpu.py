"""What the authors released for TPUs, their fork of MaxText: 124m, 354m grown from it, and its file's own defaults.

Trains on: OpenWebText in the GPT-NeoX-20B vocabulary, packed, 1024 tokens a sequence: 124m for 600 000 steps, then 354m
for 120 000 more (`steps` counts from the model's birth). Name a copy and the tokenizer as in configs/ladder.py, whose
commands these take too. They say 32 sequences a device and not how many devices; 512 a step is 16 of them.

What this sets and their PyTorch code has not: tanh gelu, no rotary, attention within documents, a τ that growth
leaves alone (`tau_tokens`; their `zoom_dim`), and stochastic depth of 0.1 in `defaults`, their tokenformer.yml with
nothing overridden; both of their commands set it to 0. docs/reproducing.md lists what differs all the same: the
initialization, the scale of the logits, weight decay on the final norm, how growth fills the new tokens.

Their command for 354m leaves `zoom_dim` at 0, so that τ jumps to √2140 with the new tokens. Here τ stays at √576 and
growth is lossless. With --config.model.tau_tokens=0 for both, 124m is the same model, and τ is ramped to √2140.

| variant | parameters | τ of the attention, of the feed-forward | validation perplexity |
|---|---|---|---|
| 124m | 123.6M | √576, √2304 | they give none for this code; not run here |
| 354m, +120k | 354.2M | √576, √2304 | likewise |
| defaults | 151.9M | √768, √3072 | likewise |
"""

from ml_collections import ConfigDict

from tokenformer_jax.configs import base

# Variant -> tokens of the attention's projections, each (the feed-forward has 4 times as many), and its own steps.
VARIANTS = {"124m": (576, 600_000), "354m": (2140, 120_000), "defaults": (768, 150_001)}


def get_config(variant: str = "124m") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
    config = base.get_config()
    tokens, steps = VARIANTS[variant]
    config.steps = VARIANTS["124m"][1] + steps if variant == "354m" else steps
    config.batch_size = 512
    config.accumulation = 4
    config.log_every = 100
    config.eval_every = 10_000
    config.eval_batches = 100
    config.checkpoint_every = 10_000
    config.model.update(qkv_tokens=tokens, out_tokens=tokens, ffn_tokens=4 * tokens)
    config.model.update(vocab_size=50304, dtype="bfloat16", remat="projections")
    config.model.update(gelu="tanh", rotary_fraction=0.0)
    if variant == "defaults":
        config.model.stochastic_depth = 0.1
    else:
        config.model.tau_tokens = VARIANTS["124m"][0]
    config.data.dataset = "text_files"
    config.data.mask_documents = True
    config.optimizer.warmup_steps = steps // 100
    return config
