"""What a user waits for besides the step: compiling, starting, reading data, saving, and the next token.

python -m benchmarks.waits [--parts=compile,start,input,save,decode] [--out=docs/waits.json]

    compile  the step of shape (i) of benchmarks.step_time with 4, 12 and 40 layers, in turn; no cache
    start    from `python -m tokenformer_jax.train` to its first step, the quickstart's: without a compiled program, and
             with JAX_COMPILATION_CACHE_DIR holding it; the data is prepared
    input    batches from prepared tokens, against what a step of shape (i) takes
    save     of the 124M model with its moments: how long the loop stands still, of how long it takes; and how long its
             fingerprints take alone
    decode   the 124M model's next token at batch 1, against reading its parameters once at the machine's bandwidth
             (of reads and writes) and at the rate of reads alone; a prompt of 512 tokens against the matrix rate
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import step_time
from configs import quickstart
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.data.batches import data_identity, train_batches
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.evaluation.sampling import Sampling, generate
from tokenformer_jax.files import replace_file
from tokenformer_jax.nn.language import init_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.arrays import by_name
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.fingerprint import fingerprints
from tokenformer_jax.storage.record import Record
from tokenformer_jax.training.language import train_flops_per_token
from tokenformer_jax.training.step import make_step

ROUNDS = 3
Figures = dict[str, Any]


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def measure_compile(shape: str, layers: tuple[int, ...]) -> Figures:
    def compile_step(num_layers: int) -> float:
        cfg = step_time.config(shape, "pattention")
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, num_layers=num_layers))
        step = make_step(cfg, make_mesh(cfg.mesh))
        batch = step_time.random_batch(cfg)
        return seconds(lambda: step.train.lower(step.abstract_state, batch).compile() and None)

    times: dict[int, list[float]] = {n: [] for n in layers}
    for number in range(ROUNDS + 1):  # the first, which also traces for the first time, does not count
        for n in layers:
            taken = compile_step(n)
            if number:
                times[n].append(taken)
    most = statistics.median(last / first for last, first in zip(times[layers[-1]], times[layers[0]], strict=True))
    return {"seconds": {str(n): statistics.median(t) for n, t in times.items()}, "most_over_fewest_layers": most}


def small_config(folder: pathlib.Path) -> Config:
    tree = quickstart.get_config("small")
    tree.data.cache_dir = str(folder / "data")
    return read_config(tree.to_dict())


def measure_start(folder: pathlib.Path) -> Figures:
    prepare(small_config(folder))

    def start(name: str, cache: str) -> float:
        workdir = folder / name
        flags = [
            f"--workdir={workdir}",
            "--config=configs/quickstart.py:small",
            f"--config.data.cache_dir={folder}/data",
            "--config.log_every=1",
        ]
        env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        began = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, "-m", "tokenformer_jax.train", *flags],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not (workdir / "metrics.jsonl").exists() or '"loss"' not in (workdir / "metrics.jsonl").read_text():
            if run.poll():
                raise RuntimeError("training failed")
            time.sleep(0.01)
        taken = time.perf_counter() - began
        run.kill()
        run.wait()
        return taken

    cold, warm = [], []
    for number in range(ROUNDS):
        cold.append(start(f"cold{number}", f"cache{number}"))
        warm.append(start(f"warm{number}", f"cache{number}"))
    return {"cold_seconds": statistics.median(cold), "warm_seconds": statistics.median(warm)}


def measure_input(shape: str, folder: pathlib.Path) -> Figures:
    cfg = step_time.config(shape, "pattention")
    source = small_config(folder)
    corpus = prepare(source)
    cfg = dataclasses.replace(cfg, data=source.data)
    batches = train_batches(corpus.train, cfg)
    tokens = cfg.batch_size * cfg.model.context_length
    train = step_time.ours(cfg)["step"]
    reading, training = [], []
    for number in range(ROUNDS + 1):
        read = seconds(lambda: [next(batches) for _ in range(200)] and None) / 200
        trained = step_time.timed(train)
        if number:
            reading.append(tokens / read)
            training.append(tokens / trained)
    return {
        "read_tokens_per_second": statistics.median(reading),
        "trained_tokens_per_second": statistics.median(training),
        "times_the_training_rate": statistics.median(r / t for r, t in zip(reading, training, strict=True)),
    }


def measure_save(shape: str, folder: pathlib.Path) -> Figures:
    cfg = dataclasses.replace(step_time.config(shape, "pattention"), data=small_config(folder).data)
    corpus = prepare(small_config(folder))
    data = train_batches(corpus.train, cfg)
    step = make_step(cfg, make_mesh(cfg.mesh))
    state = step.init(jax.random.key(0))
    record = Record(dataclasses.asdict(cfg.model), data_identity(corpus.train, cfg), cfg.batch_size)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    blocked, whole, marking = [], [], []
    arrays = by_name(state)
    for number in range(ROUNDS + 1):
        began = time.perf_counter()
        checkpoints.save(number + 1, state, data, corpus.assets, record)
        stood = time.perf_counter() - began
        checkpoints.wait()
        took = time.perf_counter() - began
        mark = seconds(lambda: fingerprints(arrays))
        if number:
            blocked.append(stood)
            whole.append(took)
            marking.append(mark)
    return {
        "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "blocked_seconds": statistics.median(blocked),
        "seconds": statistics.median(whole),
        "blocked_share": statistics.median(b / w for b, w in zip(blocked, whole, strict=True)),
        "fingerprint_seconds": statistics.median(marking),
        "fingerprint_share": statistics.median(m / w for m, w in zip(marking, whole, strict=True)),
    }


def bandwidths() -> tuple[float, float]:
    """Bytes a second between memory and all cores: adding an array up, and the better of that and scaling in place."""
    x = jnp.ones(2**28)
    add_up, scale = jax.jit(jnp.sum), jax.jit(lambda x: x * 1.5, donate_argnums=0)
    reading = x.nbytes / min(seconds(lambda: add_up(x)) for _ in range(6))
    best = reading
    for _ in range(6):
        began = time.perf_counter()
        x = scale(x).block_until_ready()
        best = max(best, 2 * x.nbytes / (time.perf_counter() - began))
    return reading, best


def measure_decode(shape: str, prompt: int, new: int) -> Figures:
    cfg = step_time.config(shape, "pattention").model
    cfg = dataclasses.replace(cfg, context_length=prompt + new)
    params = jax.jit(functools.partial(init_params, cfg))(jax.random.key(0))
    tau = jax.tree.map(jnp.float32, initial_tau(cfg))
    prompt_BL = jax.random.randint(jax.random.key(1), (1, prompt), 0, cfg.vocab_size)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    vocabulary = 2 * cfg.vocab_size * cfg.embed_dim  # FLOPs of a position's logits; of a prompt only the last has some
    prompt_flops = prompt * (train_flops_per_token(cfg) / 3 - vocabulary) + vocabulary
    prefill, decode, bounds, reads, products = [], [], [], [], []
    for number in range(ROUNDS + 1):
        (reading, rate), product = bandwidths(), step_time.product_seconds()
        stream = generate(cfg, params, tau, prompt_BL, new, how=Sampling(temperature=0.0), block=1)
        following = functools.partial(next, stream)
        first = seconds(following)
        later = [seconds(following) for _ in range(new - 1)][1:]
        if number:
            prefill.append(prompt / first)
            decode.append(1 / statistics.median(later))
            bounds.append(rate / size)
            reads.append(reading / size)
            products.append(2 * step_time.MATRIX**3 / product / prompt_flops * prompt)
    return {
        "parameter_bytes": size,
        "prefill_tokens_per_second": statistics.median(prefill),
        "prefill_share_of_matrix_rate": statistics.median(a / b for a, b in zip(prefill, products, strict=True)),
        "decode_tokens_per_second": statistics.median(decode),
        "bandwidth_bound_tokens_per_second": statistics.median(bounds),
        "reading_alone_tokens_per_second": statistics.median(reads),
        "decode_share_of_reading_alone": statistics.median(a / b for a, b in zip(decode, reads, strict=True)),
        "decode_share_of_bound": statistics.median(a / b for a, b in zip(decode, bounds, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="compile,start,input,save,decode")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny tries it in seconds")
    parser.add_argument("--out", default="docs/waits.json")
    args = parser.parse_args()
    small, large = ("tiny", "tiny") if args.size == "tiny" else ("i", "ii")
    layers, prompt = ((2, 3), 16) if args.size == "tiny" else ((4, 12, 40), 512)
    found: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        measures: dict[str, Callable[[], Figures]] = {
            "compile": lambda: measure_compile(small, layers),
            "start": lambda: measure_start(folder),
            "input": lambda: measure_input(small, folder),
            "save": lambda: measure_save(large, folder),
            "decode": lambda: measure_decode(large, prompt, 32),
        }
        for part in args.parts.split(","):
            found[part] = measures[part]()
            print(f"{part}: {json.dumps(found[part])}", flush=True)
    command = f"python -m benchmarks.waits --parts={args.parts}"
    result = {"command": command, "environment": environment(), **found}
    replace_file(pathlib.Path(args.out), json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
