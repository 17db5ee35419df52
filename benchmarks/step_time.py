"""A training step's time and memory, against PyTorch, a plain Transformer and the matrix rate, in turn in one run.

python -m benchmarks.step_time [--shapes=i,ii] [--rounds=7] [--out=docs/step_time.json]

Shapes: (i) 4 layers of 256, 8 × 256 tokens; (ii) the ladder's 124M, 2 × 256 tokens; both float32. Each contender is a
process of its own: our step (and, in another one, its forward and backward pass alone), a PyTorch TokenFormer's (needs
torch), and our plain Transformer's of as many parameters. In each round each takes six steps while the others wait; the
last two count, since a virtual machine takes back what a process frees while it waits, and the next steps are slower by
up to a half. The matrix rate is measured likewise: a product of two 2048 × 2048 matrices by XLA, the fastest of ten.
Figures are medians of the rounds, and of the ratios within a round; memory is the most that a process held.

All run with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as the README recommends on a CPU; --tunables= runs them without.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import base
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.data.batches import Batch
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.files import replace_file
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.training.metrics import train_flops_per_token
from tokenformer_jax.training.step import loss_sums, make_step, put_batch

MATRIX = 2048
WARM = 4  # steps before those that count
REST = 0.3  # seconds between contenders; threads of PyTorch wait busily for as long
SHAPES: dict[str, tuple[int, dict[str, int]]] = {
    "i": (8, {"num_layers": 4, "embed_dim": 256, "num_heads": 4, "vocab_size": 8192, "context_length": 256}),
    "ii": (2, {"vocab_size": 50304, "context_length": 256}),
    "tiny": (4, {"num_layers": 2, "embed_dim": 128, "num_heads": 2, "vocab_size": 1024, "context_length": 128}),
}
TOKENS = {
    "i": {"qkv_tokens": 256, "out_tokens": 256, "ffn_tokens": 1024},
    "ii": {},
    "tiny": {"qkv_tokens": 128, "out_tokens": 128, "ffn_tokens": 512},
}
Run = Callable[[], float | None]  # the seconds that it took, where it knows better


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


def random_batch(cfg: Config) -> Batch:
    rng = np.random.default_rng(0)
    size = (cfg.batch_size, cfg.model.context_length)
    tokens, targets = (rng.integers(0, cfg.model.vocab_size, size).astype(np.int32) for _ in range(2))
    return Batch(tokens, targets, np.ones(size, np.float32), np.ones(size, np.int32))


def ours(cfg: Config) -> dict[str, Run]:
    """Functions that train a step, and that make its forward pass and its gradients only."""
    step = make_step(cfg, make_mesh(cfg.mesh))
    state = step.init(jax.random.key(0))
    batch = put_batch(step, random_batch(cfg))
    step.compile(state, batch)
    graphdef, _, _ = abstract_model(cfg.model)

    @jax.jit
    def only_gradients(params: Any, tau: Any, batch: Batch) -> Any:
        return jax.value_and_grad(lambda p: loss_sums(nnx.merge(graphdef, p), tau, batch, mask_documents=False)[0])(
            params
        )

    def train() -> None:
        nonlocal state
        state, metrics = step.train(state, batch)
        wait(metrics)

    return {
        "step": train,
        "forward": lambda: wait(step.evaluate(state, batch)),
        "gradients": lambda: wait(only_gradients(state.params, state.tau_now(), batch)),
    }


def wait(arrays: Any) -> None:
    jax.block_until_ready(arrays)


def theirs(cfg: Config) -> dict[str, Run]:
    import torch

    from benchmarks import torch_tokenformer

    torch.manual_seed(0)
    model = torch_tokenformer.TokenFormer(cfg.model)
    adamw = torch_tokenformer.optimizer(model, cfg.optimizer.peak_learning_rate)
    batch = random_batch(cfg)
    tokens, targets = (torch.from_numpy(x.astype(np.int64)) for x in (batch.tokens_BL, batch.targets_BL))

    def train() -> None:
        torch_tokenformer.train_step(model, adamw, tokens, targets)

    return {"step": train}


@functools.cache
def _product() -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda a: a @ a)


def product_seconds() -> float:
    """Of a product of two MATRIX × MATRIX matrices, the fastest of ten."""
    a = jnp.ones((MATRIX, MATRIX))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        _product()(a).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times)


CONTENDERS: dict[str, tuple[Callable[[Config], dict[str, Run]], str, tuple[str, ...]]] = {
    "matrix": (lambda cfg: {"product": product_seconds}, "pattention", ("product",)),
    "ours": (ours, "pattention", ("step",)),
    "torch": (theirs, "pattention", ("step",)),
    "plain": (ours, "linear", ("step",)),
    "shares": (ours, "pattention", ("forward", "gradients", "step")),
}


def timed(run: Run) -> float:
    for _ in range(WARM):
        run()
    began = time.perf_counter()
    told = [run() for _ in range(2)]
    return told[0] or (time.perf_counter() - began) / 2


def work(name: str, shape: str) -> None:
    """A contender's process: after each line that comes in, what it does is timed, and the seconds go out."""
    make, projection, parts = CONTENDERS[name]
    runs = make(config(shape, projection))
    for _ in sys.stdin:
        print(json.dumps({part: timed(runs[part]) for part in parts}), flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(shape: str, rounds: int, tunables: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.step_time", f"--shapes={shape}", "--work"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = os.environ | {"GLIBC_TUNABLES": tunables}
    seconds: dict[str, list[float]] = {}
    peaks = {}
    workers: dict[str, Any] = {name: subprocess.Popen([*command, name], env=env, **pipes) for name in CONTENDERS}
    try:
        for _ in range(rounds):
            for name, worker in workers.items():
                time.sleep(REST)
                worker.stdin.write("\n")
                worker.stdin.flush()
                for part, time_taken in json.loads(worker.stdout.readline()).items():
                    seconds.setdefault(part if name == "shares" else name, []).append(time_taken)
        for name, worker in workers.items():
            peaks[name] = int(worker.communicate(timeout=60)[0])
    finally:
        for worker in workers.values():
            worker.kill()
    return summary(shape, seconds, peaks)


def summary(shape: str, seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    cfg = config(shape, "pattention")
    flops = train_flops_per_token(cfg.model) * cfg.batch_size * cfg.model.context_length
    rates = [2 * MATRIX**3 / s for s in seconds["matrix"]]

    def ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    forward, backward, step = (statistics.median(seconds[part]) for part in ("forward", "gradients", "step"))
    return {
        "params": parameters(cfg),
        "plain_params": parameters(config(shape, "linear")),
        "model_flops": flops,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "matrix_gflops": statistics.median(rates) / 1e9,
        "speed_over_torch": ratio(seconds["torch"], seconds["ours"]),
        "time_over_plain": ratio(seconds["ours"], seconds["plain"]),
        "share_of_matrix_rate": ratio([flops / s for s in seconds["ours"]], rates),
        "torch_share_of_matrix_rate": ratio([flops / s for s in seconds["torch"]], rates),
        "shares": {
            "forward": forward / step,
            "backward": (backward - forward) / step,
            "optimizer": (step - backward) / step,
        },
        "peak_bytes": {name: peaks[name] for name in ("ours", "torch", "plain")},
        "seconds": seconds,
    }


def describe(shape: str, figures: dict[str, Any]) -> str:
    medians, shares = figures["median_seconds"], figures["shares"]
    gigabytes = {name: f"{peak / 1e9:.2f} GB" for name, peak in figures["peak_bytes"].items()}
    return (
        f"({shape}) ours {medians['ours']:.3f} s and {gigabytes['ours']}, torch {medians['torch']:.3f} s and "
        f"{gigabytes['torch']}, plain {medians['plain']:.3f} s and {gigabytes['plain']}; "
        f"{figures['speed_over_torch']:.2f} x torch's speed, {figures['time_over_plain']:.3f} x the plain "
        f"Transformer's time, {figures['share_of_matrix_rate']:.0%} of the matrix rate of "
        f"{figures['matrix_gflops']:.0f} GFLOP/s (torch {figures['torch_share_of_matrix_rate']:.0%}); "
        + ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="i,ii")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tunables", default="glibc.malloc.hugetlb=1")
    parser.add_argument("--out", default="docs/step_time.json")
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.shapes)
    shapes = {}
    for shape in args.shapes.split(","):
        shapes[shape] = measure(shape, args.rounds, args.tunables)
        print(describe(shape, shapes[shape]), flush=True)
    command = f"python -m benchmarks.step_time --shapes={args.shapes} --rounds={args.rounds} --tunables={args.tunables}"
    result = {"command": command, "environment": environment(), "torch": version("torch"), "shapes": shapes}
    replace_file(pathlib.Path(args.out), json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
