"""The authors' four language models on the Pile: 150m, 450m, 900m, 1b5.

Trains on: 300B tokens of the Pile, 143 000 steps of 1024 x 2048, in the GPT-NeoX-20B vocabulary (50277 ids in 50304
rows). tfds has no Pile: name a copy (.jsonl.zst, say), with that tokenizer's tokenizer.json. `text_files` holds
5 % of the documents out for validation, which is not the Pile's own split. For example, on 16 devices:

    python -m tokenformer_jax.train --config=configs/pile.py:150m --workdir=W --config.mesh.fsdp=16 \
        --config.data.path=PILE --config.data.tokenizer=TOKENIZER.json

Each device works through batch_size / accumulation / (mesh.slice * mesh.data * mesh.fsdp) sequences at a time: 8 there.

To expect (paper, table 1; accuracies zero-shot). Not run here: it is days on a pod. The released weights can be had
with `convert --from_hub=Haiyang-W/TokenFormer-150M`, -450M, -900M or -1-5B, which takes heads and context from here.

| variant | parameters | of them embedding | Pile perplexity | LAMBADA perplexity | mean accuracy of 6 tasks |
|---|---|---|---|---|---|
| 150m | 151.9M | 38.6M | 10.45 | 16.38 | 44.7 |
| 450m | 454.2M | 51.5M | 8.28 | 7.69 | 52.0 |
| 900m | 903.3M | 64.4M | 7.38 | 5.46 | 56.4 |
| 1b5 | 1587.2M | 77.3M | 6.91 | 5.24 | 59.3 |
"""

from ml_collections import ConfigDict

from tokenformer_jax.configs import base

# Parameter tokens are as many as the width, and 4 times that in the feed-forward.
VARIANTS = {
    "150m": {"num_layers": 12, "num_heads": 12, "embed_dim": 768},
    "450m": {"num_layers": 24, "num_heads": 16, "embed_dim": 1024},
    "900m": {"num_layers": 32, "num_heads": 16, "embed_dim": 1280},
    "1b5": {"num_layers": 40, "num_heads": 16, "embed_dim": 1536},
}


def get_config(variant: str = "150m") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
    config = base.get_config()
    config.steps = 143_000
    config.batch_size = 1024
    config.accumulation = 8
    config.log_every = 100
    config.eval_every = 5000
    config.eval_batches = 100
    config.checkpoint_every = 500
    config.model.update(VARIANTS[variant])
    width = config.model.embed_dim
    config.model.update(qkv_tokens=width, out_tokens=width, ffn_tokens=4 * width)
    config.model.update(vocab_size=50304, context_length=2048, dtype="bfloat16", remat="projections")
    config.data.dataset = "text_files"
    config.optimizer.warmup_steps = 1430  # 1 %, from 6e-4 down to 6e-5 as in the base
    return config
