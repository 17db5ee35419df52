"""What the processes of `benchmarks.accelerator` do: each holds the device for one task, and answers in lines of JSON.

python -m benchmarks.accelerator_work TASK '{"argument": …}'

A line that comes in is a command; lines that go out are {"partial": figures}, {"reply": figures} or {"error": …}. All
else that a library prints goes to stderr.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

Figures = dict[str, Any]
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory|CUDA_ERROR_OUT_OF_MEMORY|ALLOC_FAILED", re.I)
TINY = {
    "tiny": {"qkv_tokens": 128, "out_tokens": 128, "ffn_tokens": 512},
    "tiny_grown": {"qkv_tokens": 256, "out_tokens": 256, "ffn_tokens": 1024},
}


class Talk:
    """The pipe to the driver. Standard output is turned to stderr for everyone else."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def _say(self, kind: str, figures: Any) -> None:
        self.out.write(json.dumps({kind: figures}) + "\n")

    def partial(self, **figures: Any) -> None:
        self._say("partial", figures)

    def reply(self, **figures: Any) -> None:
        self._say("reply", figures)

    def error(self, error: BaseException) -> None:
        lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        self._say("error", {"what": lines[0][:400], "no_memory": is_no_memory(error)})

    def commands(self) -> Iterator[Figures]:
        for line in sys.stdin:
            yield json.loads(line)


def is_no_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(f"{type(error).__name__}: {error}"))


def config(size: str, projection: str = "pattention", batch: int = 8, overrides: Figures | None = None) -> Any:
    """Of a rung of the ladder, or of the plain Transformer with as many parameters; keys of overrides have dots."""
    from configs import base, ladder
    from tokenformer_jax.config import read_config

    if size in TINY:
        tree = base.get_config()
        tree.model.update(vocab_size=512, context_length=64, num_layers=2, num_heads=2, embed_dim=128, **TINY[size])
    else:
        tree = ladder.get_config(size)
        tree.model.remat = "none"
    tree.update(batch_size=batch, accumulation=1)
    model = tree.model
    if projection == "linear":
        hidden = 3 * model.qkv_tokens + model.out_tokens + model.ffn_tokens - 2 * model.embed_dim
        model.update(projection="linear", qkv_tokens=0, out_tokens=0, ffn_tokens=hidden)
    tree.update_from_flattened_dict(overrides or {})
    return read_config(tree.to_dict())


def seconds(function: Callable[[], Any]) -> float:
    import jax

    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def repeat(function: Callable[..., Any], *arguments: Any, times: int = 5) -> Any:
    """The last result; a device computes one after the other."""
    return [function(*arguments) for _ in range(times)][-1]


def peak_bytes() -> int:
    """The most that jax held of a device, or on a CPU this process of the machine."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def device(talk: Talk, tiny: bool) -> Figures:
    """What the device is, and what it can do at most: a product of matrices, a copy, a sum."""
    import jax
    import jax.numpy as jnp

    from tokenformer_jax.devices.hardware import environment, peak_flops

    here = jax.devices()[0]
    limit = (here.memory_stats() or {}).get("bytes_limit")
    talk.partial(kind=here.device_kind, platform=here.platform, memory_limit=limit, peak_flops=peak_flops(1))
    with_driver: Figures = {}
    fields = "name,driver_version,memory.total,power.limit,clocks.max.sm"
    try:
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        with_driver = dict(zip(fields.split(","), told.splitlines()[0].split(", "), strict=False))
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        packages = environment()
    except Exception as error:  # a package whose version cannot be told is no reason to measure nothing
        packages = {"error": str(error)}
    talk.partial(nvidia_smi=with_driver, environment=packages)

    size, times = (256, 4) if tiny else (8192, 16)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)  # bfloat16 in and out; the sums are float32 inside

    jax.block_until_ready(product(a, b))
    rates = [2 * size**3 * times / seconds(functools.partial(repeat, product, a, b, times=times)) for _ in range(6)]
    talk.partial(
        matrix_size=size, matrix_flops_per_second=max(rates), matrix_flops_per_second_median=statistics.median(rates)
    )
    x = jnp.ones(2**20 if tiny else 2**29)
    scale, add_up = jax.jit(lambda x: x * 1.0001, donate_argnums=0), jax.jit(jnp.sum)
    copying, reading = [], []
    for number in range(7):
        began = time.perf_counter()
        for _ in range(5):
            x = scale(x)
        x.block_until_ready()
        copied = 5 * 2 * x.nbytes / (time.perf_counter() - began)
        read = 5 * x.nbytes / seconds(functools.partial(repeat, add_up, x))
        if number:
            copying.append(copied)
            reading.append(read)
    return {"copy_bytes_per_second": max(copying), "read_bytes_per_second": max(reading), "copied_bytes": x.nbytes}


def decode(talk: Talk, size: str, batches: list[int], prompt: int, new: int) -> Figures:
    """Prompts and next tokens: through `generate`, and by the same function in a loop on the device.

    The loop shows what the device does where nobody waits for Python.
    """
    import jax
    import jax.numpy as jnp

    from tokenformer_jax.evaluation.sampling import (
        Sampling,
        decoding_params,
        empty_cache,
        generate,
        make_decoder,
        make_loop,
    )
    from tokenformer_jax.nn.language import init_params
    from tokenformer_jax.nn.transformer import initial_tau
    from tokenformer_jax.training.language import train_flops_per_token

    cfg = dataclasses.replace(config(size).model, context_length=prompt + new)
    how = Sampling(temperature=0.0)
    step = make_decoder(cfg, how)
    params = jax.jit(functools.partial(init_params, cfg))(jax.random.key(0))
    ready = decoding_params(cfg, params)
    tau = jax.tree.map(jnp.float32, initial_tau(cfg))
    held = sum(x.nbytes for x in jax.tree.leaves(ready))
    vocabulary = 2 * cfg.vocab_size * cfg.embed_dim  # FLOPs of a position's logits; of a prompt only the last has some
    flops = prompt * (train_flops_per_token(cfg) / 3 - vocabulary) + vocabulary

    loop = make_loop(cfg, how, None, new - 1)
    found: Figures = {"parameter_bytes": held, "prompt": prompt, "new": new}
    for batch in batches:
        prompt_BL = jax.random.randint(jax.random.key(1), (batch, prompt), 0, cfg.vocab_size)
        token = 2 * cfg.num_layers * cfg.embed_dim * jnp.dtype(cfg.dtype).itemsize
        figures: Figures = {"cache_bytes": batch * (prompt + new // 2) * token, "prompt_flops": batch * flops}

        def say(batch: int = batch, figures: Figures = figures) -> None:
            talk.partial(**found | {str(batch): figures})

        def several(count: int, prompt_BL: Any = prompt_BL) -> list[Any]:
            return list(generate(cfg, params, tau, prompt_BL, count, how=how))

        figures["compile_seconds"] = seconds(lambda: several(new))
        first = statistics.median([seconds(lambda: several(1)) for _ in range(4)][1:])
        figures["prefill_tokens_per_second"] = batch * prompt / first
        say()
        took = [(seconds(lambda: several(new)) - first) / (new - 1) for _ in range(3)]
        figures["generate_tokens_per_second"] = batch / statistics.median(took)
        say()
        took = []
        for _ in range(4):
            cache = empty_cache(cfg, batch, prompt + new)
            tokens_B, cache = jax.block_until_ready(step(ready, tau, prompt_BL, cache, jax.random.key(0)))
            took.append(seconds(lambda: loop(ready, tau, tokens_B, cache, jax.random.key(0), 1)) / (new - 1))  # noqa: B023
        figures["loop_tokens_per_second"] = batch / statistics.median(took[1:])
        say()
        found[str(batch)] = figures
    return found | {"peak_bytes": peak_bytes()}


class Position:
    """Stands for a training iterator, of which a checkpoint holds the position."""

    def get_state(self) -> Figures:
        return {"step": 0}

    def set_state(self, state: Figures) -> None:
        pass


def checkpoint_parts(cfg: Any) -> tuple[Any, Any, Any]:
    from tokenformer_jax.data.tokenizer import train_tokenizer
    from tokenformer_jax.storage.record import Record

    assets = {"tokenizer": train_tokenizer(["key value query token"], 300).to_json()}
    return Position(), assets, Record(dataclasses.asdict(cfg.model), "none", 1)


def save(talk: Talk, size: str, grown: str, rounds: int) -> Figures:
    """Seconds of a save of the model with its moments, of reading it, and of growing it."""
    import jax

    from benchmarks.step_time import random_batch
    from tokenformer_jax.devices.sharding import make_mesh
    from tokenformer_jax.growth.grow import grow_state
    from tokenformer_jax.growth.verify import measure
    from tokenformer_jax.storage.checkpoints import Checkpoints
    from tokenformer_jax.training.step import make_step

    cfg = config(size)
    step = make_step(cfg, make_mesh(cfg.mesh))
    state = jax.block_until_ready(step.init(jax.random.key(0)))
    found: Figures = {"bytes": sum(x.nbytes for x in jax.tree.leaves(state))}
    with tempfile.TemporaryDirectory() as folder:
        position, assets, record = checkpoint_parts(cfg)
        checkpoints = Checkpoints(pathlib.Path(folder) / "checkpoints", keep=1)
        blocked, whole = [], []
        for number in range(rounds + 1):  # the first also compiles the fingerprints
            began = time.perf_counter()
            checkpoints.save(number + 1, state, position, assets, record)
            stood = time.perf_counter() - began
            checkpoints.wait()
            whole.append(time.perf_counter() - began)
            blocked.append(stood)
        found |= {"save_blocked_seconds": statistics.median(blocked[1:])}
        found |= {"save_seconds": statistics.median(whole[1:]), "first_save_seconds": whole[0]}
        talk.partial(**found)
        began = time.perf_counter()
        restored = checkpoints.restore(rounds + 1, step.abstract_state)
        jax.block_until_ready(restored)
        found["restore_seconds"] = time.perf_counter() - began
        checkpoints.close()
        del restored
    talk.partial(**found)
    new_cfg = config(grown, batch=1)
    new_step = make_step(new_cfg, step.mesh)
    grow = jax.jit(
        lambda state, key: grow_state(state, new_step.abstract_state, new_cfg.model, key, new_cfg.grow.recipe, 250),
        out_shardings=jax.tree.map(lambda a: a.sharding, new_step.abstract_state),
    )
    for name in ("first_growth", "growth")[:rounds]:
        new = None  # frees the first one's memory
        began = time.perf_counter()
        new = jax.block_until_ready(grow(state, jax.random.key(1)))
        appended = time.perf_counter() - began
        figures = measure(state, new, cfg, new_cfg, new_step, [random_batch(new_cfg)])
        found[f"{name}_seconds"] = {"append": appended, "verify": time.perf_counter() - began - appended}
    return found | {name: figures[name] for name in ("max_logit_difference", "max_logit", "new_key_gradient_norm")}


def plan(talk: Talk, steps: list[Figures], topology: str) -> Figures:
    """What `plan` says of each step, compiled ahead of time; by a formula where there is no compiler for it."""
    import importlib.util

    from tokenformer_jax.devices.hardware import CHIPS
    from tokenformer_jax.planning.plan import make_plan
    from tokenformer_jax.training.language import train_flops_per_token

    chip = CHIPS[topology.split(":")[0]]
    there = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    found: Figures = {"topology": topology}
    for given in steps:
        cfg = config(given["size"], given["projection"], given["batch"], given["overrides"])
        model, tokens = cfg.model, given["batch"] * cfg.model.context_length
        figures: Figures = {"batch": given["batch"]}
        began = time.perf_counter()
        try:
            if not there:
                raise RuntimeError("no GPU compiler is installed")
            made = make_plan(cfg, topology)
            figures |= {"by": "plan", "bytes": made["memory"]["total"], "memory": made["memory"]}
            figures |= {"seconds": made["seconds"]["one operation after another"], "all_seconds": made["seconds"]}
        except Exception as error:
            scores = sum(model.tokens.values()) or model.ffn_tokens
            weights = (
                train_flops_per_token(model) - 12 * model.num_layers * model.context_length * model.embed_dim
            ) / 6
            kept = 2 * tokens * model.num_layers * (scores + 8 * model.embed_dim)  # bfloat16, with eight arrays of D
            figures |= {"by": "formula", "why": str(error).splitlines()[0][:300], "bytes": 16 * weights + kept}
            figures |= {"seconds": tokens * train_flops_per_token(model) / chip.flops}
        figures["took_seconds"] = time.perf_counter() - began
        found[given["name"]] = figures
        talk.partial(**found)
    return found


def laws(talk: Talk, names: list[str] | None, known: list[str], tiny: bool) -> Figures:
    from benchmarks import accelerator_laws

    return accelerator_laws.check(names, known, tiny, talk.partial)


def train_jax(talk: Talk, **arguments: Any) -> None:
    from benchmarks import accelerator_train

    accelerator_train.train_jax(talk, **arguments)


def train_torch(talk: Talk, **arguments: Any) -> None:
    from benchmarks import accelerator_train

    accelerator_train.train_torch(talk, **arguments)


TASKS: dict[str, Callable[..., Any]] = {
    "device": device,
    "laws": laws,
    "train_jax": train_jax,
    "train_torch": train_torch,
    "decode": decode,
    "save": save,
    "plan": plan,
}


def main() -> None:
    talk = Talk()
    try:
        talk.reply(**(TASKS[sys.argv[1]](talk, **json.loads(sys.argv[2])) or {}))
    except BaseException as error:
        talk.error(error)
        raise


if __name__ == "__main__":
    main()
