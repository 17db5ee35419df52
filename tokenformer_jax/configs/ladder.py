"""The paper's ladder: one model of 12 layers and width 768 that grows from 124M to 1.4B by parameter tokens alone.

Trains on: OpenWebText, 512 x 1024 tokens a step (the batch of the authors' released code): 124m for 600 000 steps (300B
tokens), and each rung for 60 000 more (30B; `steps` counts from the model's birth). For the paper's 15B and 60B runs,
override --config.steps. tfds has no OpenWebText (its c4/webtextlike is another text, C4's pages at OpenWebText's
addresses): name a copy (.parquet or another form of docs/data.md), with a tokenizer.json of at most 50304 ids, such as
GPT-2's or GPT-NeoX-20B's:

    python -m tokenformer_jax.train --config=configs/ladder.py:all_mesh --workdir=W --config.mesh.fsdp=16 \
        --config.data.path=OPENWEBTEXT --config.data.tokenizer=TOKENIZER.json

trains 124m, grows it to each next rung on its way, and keeps the last checkpoint of every rung (`--step` of grow,
evaluate and generate names it). `all` and `all_mesh` are the paper's whole ladder in one run.

`early` and `early_mesh` are what docs/growth_beyond.md recommends to whoever wants the largest model and has none yet:
one schedule, warm-up, a constant rate and one decay, over all rungs, the small ones over after 8 % of the FLOPs, 2.1e20
in all, as many as 20 tokens a parameter of 1b4 from scratch. Measured on models of 1M parameters; at this size not run.

The other variants are the rungs one by one, with `grow` between them:

    python -m tokenformer_jax.grow --source=A --workdir=B --config=configs/ladder.py:354m_mesh …
    python -m tokenformer_jax.train --config=configs/ladder.py:354m_mesh --workdir=B …

A rung may have a learning rate, batch, mesh or recipe of its own: add them to its group in `rungs`. Over a run's rungs,
`--config.grow.patience=5` begins the next one early, once five evaluations in a row brought no improvement.

`mesh.tensor` must divide the parameter tokens and the 12 heads. The paper's counts (2140, 4850, 8620) divide by 2
alone on all rungs, and fill no tile of 128 lanes. The rungs of `_mesh` are the next multiples of 128, with 1.5 % more
parameters at most, and allow a `mesh.tensor` of 2 and 4; take all rungs from the same column.

To expect, validation perplexity of the grown models (read off the paper's figure of the ladder), and of Transformers
trained from scratch on as many tokens for each rung. Not run here: it is days on a pod.

| variant | parameters | `_mesh` | 15B a rung | 30B | 60B | Transformer, 30B from scratch | 300B |
|---|---|---|---|---|---|---|---|
| 124m | 123.6M | | 16.4 (300B) | | | | 17.1 |
| 354m | 354.2M | 359.5M | 14.6 | 14.0 | 13.6 | 16.0 | 13.0 |
| 757m | 753.8M | 755.9M | 13.1 | 12.6 | 12.3 | 13.8 | 12.0 |
| 1b4 | 1309.7M | 1322.1M | 12.1 | 11.8 | 11.6 | 13.3 | 11.8 |

The paper's "757M" and "1.4B" are 754M and 1.31B, counted from its own numbers of tokens and 50304 rows of embedding.
"""

from ml_collections import ConfigDict

from tokenformer_jax.configs import base

# Variant -> tokens of the attention's projections, each; the feed-forward has 4 times as many.
TOKENS = {
    "124m": 576,
    "354m": 2140,
    "757m": 4850,
    "1b4": 8620,
    "354m_mesh": 2176,
    "757m_mesh": 4864,
    "1b4_mesh": 8704,
}
RUNGS = ("124m", "354m", "757m", "1b4")
NEXT = {"": RUNGS[1:], "mesh": [f"{rung}_mesh" for rung in RUNGS[1:]]}
FIRST_STEPS, RUNG_STEPS = 600_000, 60_000
EARLY_STARTS, EARLY_STEPS = (7_500, 11_500, 15_000), 60_000  # 1.6, 4 and 8 % of the FLOPs


def get_config(variant: str = "124m") -> ConfigDict:
    ladders = "all", "all_mesh", "early", "early_mesh"
    if variant not in (*TOKENS, *ladders):
        raise ValueError(f"variant {variant!r} must be one of {', '.join((*TOKENS, *ladders))}")
    name, _, column = variant.partition("_")
    config = base.get_config()
    rung = 0 if variant in ladders else RUNGS.index(name)
    config.steps = FIRST_STEPS + rung * RUNG_STEPS
    config.batch_size = 512
    config.accumulation = 4
    config.log_every = 100
    config.eval_every = 5000
    config.eval_batches = 100
    config.checkpoint_every = 1000
    config.model.update(
        vocab_size=50304, dtype="bfloat16", remat="projections", **sizes("124m" if variant in ladders else variant)
    )
    config.data.dataset = "text_files"
    # 1 % of the rung's own steps: grow.restart_schedule lets each rung warm up and decay anew.
    config.optimizer.warmup_steps = RUNG_STEPS // 100 if rung else FIRST_STEPS // 100
    if name == "all":
        starts = [FIRST_STEPS + i * RUNG_STEPS for i in range(len(RUNGS))]
        config.steps = starts.pop()
        config.rungs = tuple(
            {"step": step, "model": sizes(next_rung), "optimizer": {"warmup_steps": RUNG_STEPS // 100}}
            for step, next_rung in zip(starts, NEXT[column], strict=True)
        )
    if name == "early":
        config.steps = EARLY_STEPS
        config.optimizer.update(schedule="wsd", final_learning_rate=0.0, warmup_steps=2000)
        config.grow.restart_schedule = False
        config.rungs = tuple(
            {"step": step, "model": sizes(next_rung)}
            for step, next_rung in zip(EARLY_STARTS, NEXT[column], strict=True)
        )
    return config


def sizes(rung: str) -> dict[str, int]:
    tokens = TOKENS[rung]
    return {"qkv_tokens": tokens, "out_tokens": tokens, "ffn_tokens": 4 * tokens}
