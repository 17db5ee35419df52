"""Plain Transformers to compare with: one for each TokenFormer of configs/pile.py, ladder.py and released.py.

Variants: FAMILY_SIZE, such as pile_150m, ladder_354m or released_757m, has the layers, width and heads of that
TokenFormer and exactly its number of parameters: a layer has 4 D² + 2 D h, so that h = 3 n_qkv + n_o + n_ffn - 2 D. The
upper rungs of the ladder become very wide that way: h = 20, 49 and 88 D, where it is 4, 6 or 12 D elsewhere.
FAMILY_SIZE_gpt is what one would train in their place: GPT's shape of that size with h = 4 D, its count within 0.4 %:

| variant | layers x width | parameters | the TokenFormer's |
|---|---|---|---|
| ladder_354m_gpt | 24 x 1024 | 353.5M | 354.2M |
| ladder_757m_gpt | 24 x 1536 | 756.7M | 753.8M |
| ladder_1b4_gpt | 24 x 2048 | 1311.0M | 1309.7M |
| released_757m_gpt | 24 x 1536 | 756.7M | 756.2M |

24 x 1536 is the authors' Transformer of 757M (README of their repository); the other shapes, and 16 heads, are ours.

Trains on: what the TokenFormer trains on, from scratch, for as many steps as it takes from its birth on 300B tokens:
143 000 (Pile) or 600 000; --config.steps=60000 is the 30B run. Numbers to expect stand beside the TokenFormers'. All
else (init, optimizer, rotary, norms, tied embedding) is the same, so they are not the paper's tuned baselines. Not run
here.
"""

from ml_collections import ConfigDict

from tokenformer_jax.configs import ladder, pile, released

FAMILIES = {"pile": (pile, pile.VARIANTS), "ladder": (ladder, ladder.RUNGS), "released": (released, ("354m", "757m"))}
WIDTHS = {"ladder_354m_gpt": 1024, "ladder_757m_gpt": 1536, "ladder_1b4_gpt": 2048, "released_757m_gpt": 1536}
VARIANTS = [f"{family}_{size}" for family, (_, sizes) in FAMILIES.items() for size in sizes] + list(WIDTHS)


def get_config(variant: str = "ladder_124m") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} must be one of {', '.join(VARIANTS)}")
    family, size = variant.removesuffix("_gpt").split("_")
    config = FAMILIES[family][0].get_config(size)
    model = config.model
    hidden = 3 * model.qkv_tokens + model.out_tokens + model.ffn_tokens - 2 * model.embed_dim
    model.update(projection="linear", qkv_tokens=0, out_tokens=0, ffn_tokens=hidden)
    if variant in WIDTHS:
        width = WIDTHS[variant]
        model.update(num_layers=24, num_heads=16, embed_dim=width, ffn_tokens=4 * width)
    if family != "pile":
        config.steps = 600_000
        config.optimizer.warmup_steps = 6000
    return config
