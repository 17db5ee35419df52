"""The growth that the authors released with their PyTorch code: 354m, and 757m grown from it.

Trains on: OpenWebText2 in the GPT-NeoX-20B vocabulary, 512 x 1024 tokens a step: 354m for 600 000 steps, then 757m for
60 000 more, or 120 000 (757m_120k; `steps` counts from the model's birth). tfds has no OpenWebText2: name a copy
(.jsonl.zst or another form of docs/data.md) in --config.data.path, and that tokenizer's tokenizer.json in
--config.data.tokenizer. Commands as in configs/ladder.py. The 354m weights they released can be imported with
`convert --from_torch`; those start at step 0, so grow them with --config.steps=60000.

To expect, validation perplexity on their split of OpenWebText2 (the README of the authors' repository). Not run here:

| variant | parameters | perplexity |
|---|---|---|
| 354m, 600k steps from scratch | 353.5M | 11.9 |
| 757m, +60k | 756.2M | 10.9 |
| 757m_120k, +120k | 756.2M | 10.7 |
| Transformer, 60k / 120k / 600k from scratch | 756.7M | 12.0 / 11.3 / 10.5 |

That Transformer is configs/transformer.py:released_757m_gpt.
"""

from ml_collections import ConfigDict

from tokenformer_jax.configs import base

# Variant -> tokens of the attention's projections, each (the feed-forward has 4 times as many), and its own steps.
VARIANTS = {"354m": (768, 600_000), "757m": (1792, 60_000), "757m_120k": (1792, 120_000)}


def get_config(variant: str = "354m") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
    config = base.get_config()
    tokens, steps = VARIANTS[variant]
    config.steps = steps if variant == "354m" else VARIANTS["354m"][1] + steps
    config.batch_size = 512
    config.accumulation = 4
    config.log_every = 100
    config.eval_every = 5000
    config.eval_batches = 100
    config.checkpoint_every = 500
    config.model.update(num_layers=24, num_heads=16, embed_dim=1024)
    config.model.update(qkv_tokens=tokens, out_tokens=tokens, ffn_tokens=4 * tokens)
    config.model.update(vocab_size=50304, dtype="bfloat16", remat="projections")
    config.data.dataset = "text_files"
    config.optimizer.warmup_steps = steps // 100
    return config
