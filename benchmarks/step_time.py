"""A training step's time, against PyTorch, a plain Transformer and the matrix rate, in turn in one run.

python -m benchmarks.step_time [--shapes=i,ii] [--rounds=7] [--out=docs/step_time.json]

Shapes: (i) 4 layers of 256, 8 × 256 tokens; (ii) the ladder's 124M, 2 × 256 tokens; both float32. In each round, one
after the other: a product of two 2048 × 2048 matrices, our step, the PyTorch step (needs torch), and our plain
Transformer's of as many parameters. Medians of the rounds, and of the ratios within a round.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import torch_tokenformer
from configs import base
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.data import Batch
from tokenformer_jax.metrics import environment, replace_file, train_flops_per_token
from tokenformer_jax.sharding import make_mesh
from tokenformer_jax.step import make_step, put_batch
from tokenformer_jax.transformer import abstract_model, count_params

MATRIX = 2048
SHAPES: dict[str, tuple[int, dict[str, int]]] = {
    "i": (8, {"num_layers": 4, "embed_dim": 256, "num_heads": 4, "vocab_size": 8192, "context_length": 256}),
    "ii": (2, {"vocab_size": 50304, "context_length": 256}),
    "tiny": (2, {"num_layers": 2, "embed_dim": 32, "num_heads": 2, "vocab_size": 64, "context_length": 16}),
}
TOKENS = {
    "i": {"qkv_tokens": 256, "out_tokens": 256, "ffn_tokens": 1024},
    "ii": {},
    "tiny": {"qkv_tokens": 32, "out_tokens": 32, "ffn_tokens": 64},
}


def config(shape: str, projection: str) -> Config:
    """Of a TokenFormer, or of the plain Transformer with as many parameters to within a row."""
    batch_size, sizes = SHAPES[shape]
    tree = base.get_config()
    tree.model.update(sizes | TOKENS[shape])
    tree.update(batch_size=batch_size, steps=1000)
    if projection == "linear":
        model = tree.model
        patterns = 6 * model.qkv_tokens + 2 * model.out_tokens + 2 * model.ffn_tokens
        model.update(projection="linear", qkv_tokens=0, out_tokens=0, ffn_tokens=(patterns - 4 * model.embed_dim) // 2)
    return read_config(tree.to_dict())


def parameters(cfg: Config) -> int:
    return count_params(abstract_model(cfg.model)[1])


def ours(cfg: Config, batch: Batch) -> Callable[[], float]:
    """A function that trains a step and gives its loss."""
    step = make_step(cfg, make_mesh(cfg.mesh))
    state = step.init(jax.random.key(0))
    here = put_batch(step, batch)

    def run() -> float:
        nonlocal state
        state, metrics = step.train(state, here)
        return float(metrics["loss"])

    return run


def theirs(cfg: Config, batch: Batch) -> Callable[[], float]:
    torch.manual_seed(0)
    model = torch_tokenformer.TokenFormer(cfg.model)
    adamw = torch_tokenformer.optimizer(model, cfg.optimizer.peak_learning_rate)
    tokens, targets = (torch.from_numpy(x.astype(np.int64)) for x in (batch.tokens_BL, batch.targets_BL))
    return lambda: torch_tokenformer.train_step(model, adamw, tokens, targets)


def matrix_product() -> Callable[[], Any]:
    a = jnp.ones((MATRIX, MATRIX))
    product = jax.jit(lambda a: a @ a)
    return lambda: product(a).block_until_ready()


def measure(shape: str, rounds: int) -> dict[str, Any]:
    cfg, plain = config(shape, "pattention"), config(shape, "linear")
    rng = np.random.default_rng(0)
    size = (cfg.batch_size, cfg.model.context_length)
    tokens, targets = (rng.integers(0, cfg.model.vocab_size, size).astype(np.int32) for _ in range(2))
    batch = Batch(tokens, targets, np.ones(size, np.float32), np.ones(size, np.int32))
    runs: dict[str, Callable[[], Any]] = {"matrix": matrix_product(), "ours": ours(cfg, batch)}
    runs |= {"torch": theirs(cfg, batch), "plain": ours(plain, batch)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):  # two to warm up
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    flops = train_flops_per_token(cfg.model) * size[0] * size[1]
    rates = [2 * MATRIX**3 / s for s in seconds["matrix"]]

    def ratio(a: list[float], b: list[float]) -> float:
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    return {
        "params": parameters(cfg),
        "plain_params": parameters(plain),
        "model_flops": flops,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "matrix_gflops": statistics.median(rates) / 1e9,
        "speed_over_torch": ratio(seconds["torch"], seconds["ours"]),
        "time_over_plain": ratio(seconds["ours"], seconds["plain"]),
        "share_of_matrix_rate": ratio([flops / s for s in seconds["ours"]], rates),
        "torch_share_of_matrix_rate": ratio([flops / s for s in seconds["torch"]], rates),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="i,ii")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default="docs/step_time.json")
    args = parser.parse_args()
    shapes = {shape: measure(shape, args.rounds) for shape in args.shapes.split(",")}
    command = f"python -m benchmarks.step_time --shapes={args.shapes} --rounds={args.rounds}"
    result = {"command": command, "torch": torch.__version__, "environment": environment(), "shapes": shapes}
    replace_file(pathlib.Path(args.out), json.dumps(result, indent=2) + "\n")
    for shape, figures in shapes.items():
        medians = figures["median_seconds"]
        print(
            f"({shape}) ours {medians['ours']:.3f} s, torch {medians['torch']:.3f} s, plain {medians['plain']:.3f} s; "
            f"{figures['speed_over_torch']:.2f} x torch's speed, {figures['time_over_plain']:.3f} x the plain "
            f"Transformer's time, {figures['share_of_matrix_rate']:.0%} of the matrix rate of "
            f"{figures['matrix_gflops']:.0f} GFLOP/s (torch {figures['torch_share_of_matrix_rate']:.0%})"
        )


if __name__ == "__main__":
    main()
