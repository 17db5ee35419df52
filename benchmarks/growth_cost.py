"""What growth costs: its time against copying as many bytes, its memory against the grown state.

python -m benchmarks.growth_cost [--config=ladder] [--repeats=2] [--processes=1,2] [--out=docs/growth_cost.json]

A checkpoint of configs/ladder.py:354m, with random weights and moments, grows to 757m. In turn, each with the source
out of the page cache, and after a rest, in which a virtual machine gives free memory back to its host: whoever comes
next waits for it as the growth does (a copy right after another process took 16 s instead of 24).

    grow     `grow()`, as the command calls it
    copy     reading the source's files, and writing as many bytes as the grown workdir holds
    restore, save    both states through Orbax, without growing

`--config=tiny` tries it in seconds. Needs 14 GB of memory and 25 GB of disk otherwise.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from configs import ladder
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.data.batches import data_identity, train_batches
from tokenformer_jax.data.tokenizer import train_tokenizer
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.files import replace_file
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.storage.checkpoints import Checkpoints, save_one
from tokenformer_jax.storage.record import Record
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import make_step

TIME_BOUND, MEMORY_BOUND = 2.0, 1.3  # times the copy, and times the grown state
REST = {"ladder": 30, "tiny": 0}  # seconds
BLOCK, FILE = 1 << 24, 1 << 31  # bytes copied at once, and of one file, as Orbax has them
TINY = {"num_layers": 2, "embed_dim": 96, "num_heads": 4, "context_length": 64, "vocab_size": 512}
Folder = pathlib.Path


def config(name: str, variant: str, folder: Folder, processes: int) -> Config:
    tree = ladder.get_config(variant)
    if name == "tiny":
        tokens = {"354m": 60, "757m": 160}[variant]
        tree.model.update(TINY | {"qkv_tokens": tokens, "out_tokens": tokens, "ffn_tokens": 4 * tokens})
    tree.data.update(path=str(folder / "text"), tokenizer=str(folder / "tokenizer.json"), cache_dir=str(folder / "c"))
    tree.mesh.fsdp = processes
    return read_config(tree.to_dict())


def make(name: str, folder: Folder, processes: int) -> dict[str, Any]:
    """Writes the source: text, a tokenizer of few ids, and a checkpoint as `train` leaves one."""
    (folder / "text").mkdir()
    texts = [path.read_text() for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))]
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    (folder / "tokenizer.json").write_text(train_tokenizer(texts, 512).to_json())
    cfg = config(name, "354m", folder, processes)
    step = make_step(cfg, make_mesh(cfg.mesh))
    corpus = prepare(cfg)
    state = step.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))

    def moment(leaf: jax.Array) -> jax.Array:
        return 1e-3 * jnp.abs(jax.random.normal(next(keys), leaf.shape)) if leaf.ndim else leaf + cfg.steps

    state = TrainState(jnp.int32(cfg.steps), state.params, jax.tree.map(moment, state.opt_state), state.tau)
    record = Record(dataclasses.asdict(cfg.model), data_identity(corpus.train, cfg), cfg.batch_size)
    data = train_batches(corpus.train, cfg)
    save_one(folder / "source" / "checkpoints", cfg.steps, state, data, corpus.tokenizer, record)
    if jax.process_index() == 0:
        replace_file(folder / "source" / "config.json", cfg.to_json())
    larger = config(name, "757m", folder, processes).model
    after = count_params(make_step(dataclasses.replace(cfg, model=larger), step.mesh).abstract_state.params)
    return {"params_before": count_params(state.params), "params_after": after, "environment": environment()}


def run_grow(name: str, folder: Folder, processes: int) -> dict[str, Any]:
    began = time.monotonic()
    figures = grow(folder / "source", config(name, "757m", folder, processes), folder / "grown")
    wanted = "max_logit_difference", "max_logit", "loss_before", "loss_after"
    return {"seconds": time.monotonic() - began, "phases": figures["seconds"]} | {key: figures[key] for key in wanted}


def copy(name: str, folder: Folder) -> dict[str, Any]:
    """Reads the source once and writes as much as the grown workdir holds, safely on the disk as Orbax has it."""
    forget(folder / "source")
    time.sleep(REST[name])
    began = time.monotonic()
    target, left = folder / "copy", size(folder / "grown")
    target.mkdir()
    blocks = read_blocks(folder / "source")
    block, number = b"", 0
    while left > 0:
        with (target / str(number)).open("wb", buffering=0) as file:
            while left > 0 and file.tell() < FILE:
                block = next(blocks, block)
                left -= file.write(block[:left])
            os.fsync(file.fileno())
        number += 1
    for _ in blocks:  # what was not needed is read all the same
        pass
    return {"seconds": time.monotonic() - began}


def read_blocks(folder: Folder) -> Iterator[bytes]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    yield block


def run_orbax(name: str, folder: Folder, processes: int) -> dict[str, Any]:
    """Restores the source's state, and saves the grown one, which it has read before."""

    def restored(workdir: Folder, variant: str) -> tuple[Checkpoints, int, Config, TrainState]:
        cfg = config(name, variant, folder, processes)
        checkpoints = Checkpoints(workdir / "checkpoints")
        number = checkpoints.choose(None)
        abstract = make_step(cfg, make_mesh(cfg.mesh)).abstract_state
        return checkpoints, number, cfg, jax.block_until_ready(checkpoints.restore(number, abstract))

    began = time.monotonic()
    *_, state = restored(folder / "source", "354m")
    restore = time.monotonic() - began
    del state
    checkpoints, number, cfg, state = restored(folder / "grown", "757m")
    corpus = prepare(cfg)
    items = (state, train_batches(corpus.train, cfg), corpus.tokenizer, checkpoints.record(number))
    os.sync()
    time.sleep(REST[name])
    began = time.monotonic()
    save_one(folder / "copy" / "checkpoints", number, *items)
    return {"seconds": restore + time.monotonic() - began, "restore": restore, "save": time.monotonic() - began}


PARTS: dict[str, Callable[[str, Folder, int], dict[str, Any]]] = {
    "make": make,
    "grow": run_grow,
    "orbax": run_orbax,
}


def size(folder: Folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget(folder: Folder) -> None:
    """Drops files from the page cache, so that whoever reads them next reads from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def part(name: str, args: argparse.Namespace, folder: Folder, processes: int = 1) -> dict[str, Any]:
    """Runs a part in processes of its own. The first one's figures, with the peak memory of each and the wall time."""
    forget(folder / "source")
    time.sleep(REST[args.config])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    began = time.monotonic()
    children = [
        subprocess.Popen(
            f"{sys.executable} -m benchmarks.growth_cost --config={args.config} --folder={folder} --part={name} "
            f"--processes={processes} --process={i} --address={address}".split(),
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{name}: a process failed, see above")
    each = [json.loads(text.splitlines()[-1]) for text in said]
    figures = {"wall": time.monotonic() - began, **each[0], "peak_bytes": [one["peak_bytes"] for one in each]}
    print(f"{name} x {processes}: {figures['seconds']:.1f} s", file=sys.stderr, flush=True)
    return figures


def child(args: argparse.Namespace) -> None:
    processes = int(args.processes)
    if processes > 1:
        jax.distributed.initialize(args.address, processes, args.process)
    began = time.monotonic()
    figures = PARTS[args.part](args.config, pathlib.Path(args.folder), processes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.monotonic() - began} | figures | {"peak_bytes": peak}))


def phase(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda run: run["grow"]["phases"][name]


def compare(args: argparse.Namespace, folder: Folder) -> dict[str, Any]:
    """Measures all parts in turn, `repeats` times."""
    made = part("make", args, folder)
    grown_bytes = 12 * made["params_after"]  # float32 parameters and two moments
    runs = []
    for processes in [int(n) for n in args.processes.split(",")] * args.repeats:
        row = {"processes": processes, "grow": part("grow", args, folder, processes)}
        row["source_bytes"], row["written_bytes"] = size(folder / "source"), size(folder / "grown")
        row["copy"] = copy(args.config, folder)
        shutil.rmtree(folder / "copy")
        row["orbax"] = part("orbax", args, folder)
        for name in ("copy", "grown"):
            shutil.rmtree(folder / name)
        total, checks = row["grow"]["seconds"], row["grow"]["phases"]["verify"]
        row |= {
            "over_copy": total / row["copy"]["seconds"],
            "without_checks_over_copy": (total - checks) / row["copy"]["seconds"],
            "without_checks_over_restore_and_save": (total - checks) / row["orbax"]["seconds"],
            "peak_over_grown_state": max(row["grow"]["peak_bytes"]) / grown_bytes,
        }
        runs.append(row)
    return {
        "command": f"python -m benchmarks.growth_cost --config={args.config} --repeats={args.repeats} "
        f"--processes={args.processes}",
        "bounds": {"time_over_copy": TIME_BOUND, "peak_over_grown_state": MEMORY_BOUND},
        "grown_bytes": grown_bytes,
        "cores": os.cpu_count(),
        **{name: made[name] for name in ("params_before", "params_after", "environment")},
        "runs": runs,
    }


def table(result: dict[str, Any]) -> str:
    """The medians over repeats, for people."""
    counts = sorted({run["processes"] for run in result["runs"]})

    def row(label: str, pick: Callable[[dict[str, Any]], float], digits: int = 1) -> str:
        values = [statistics.median(pick(r) for r in result["runs"] if r["processes"] == n) for n in counts]
        return f"{label:<46}" + "".join(f"{value:>12.{digits}f}" for value in values)

    before, after = result["params_before"], result["params_after"]
    grown = result["grown_bytes"]
    lines = [
        f"{before / 1e6:.1f}M -> {after / 1e6:.1f}M parameters; the grown state is {grown / 1e9:.2f} GB",
        f"{'processes':<46}" + "".join(f"{n:>12}" for n in counts),
        row("grow, with the start of Python, s", lambda r: r["grow"]["wall"]),
        row("grow, s", lambda r: r["grow"]["seconds"]),
        *(row(f"  {name}, s", phase(name)) for name in result["runs"][0]["grow"]["phases"]),
        row("copy of as many bytes, s", lambda r: r["copy"]["seconds"]),
        row("restore and save by Orbax alone, s", lambda r: r["orbax"]["seconds"]),
        row("grow / copy", lambda r: r["over_copy"], 2),
        row("grow without verify / copy", lambda r: r["without_checks_over_copy"], 2),
        row("grow without verify / restore and save", lambda r: r["without_checks_over_restore_and_save"], 2),
        row("peak memory of a process, GB", lambda r: max(r["grow"]["peak_bytes"]) / 1e9, 2),
        row("peak memory of a process / grown state", lambda r: r["peak_over_grown_state"], 2),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=["ladder", "tiny"], default="ladder")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--processes", default="1,2", help="how many processes share a growth, one after another")
    parser.add_argument("--folder", help="where the checkpoints are made; by default a temporary directory")
    parser.add_argument("--out", default="docs/growth_cost.json")
    for name, kind in (("part", str), ("process", int), ("address", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # of the processes it starts
    args = parser.parse_args()
    if args.part:
        child(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = compare(args, pathlib.Path(folder))
    pathlib.Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
