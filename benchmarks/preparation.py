"""How fast `prepare` is, against the tokenizer alone on the same cores.

python -m benchmarks.preparation [--megabytes=512] [--form=jsonl]

Writes texts of Python's standard library, over and over, as 8 files of a form: jsonl, jsonl.gz, jsonl.zst or parquet.
The tokenizer alone: a process on each core that encodes texts which it holds already. `prepare`: all of the command,
from its start to its end, with 1 and 2 cores, and 1 and 2 processes of a pod on them. Cores are chosen by taskset.
Seconds of CPU tell more where the machine has other work.
"""

import argparse
import gzip
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

import pyarrow
import pyarrow.parquet

from tokenformer_jax.data.tokenizer import load_tokenizer, train_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}


def write_corpus(folder: pathlib.Path, megabytes: int, form: str) -> int:
    """Writes the files and a tokenizer; returns the bytes of text."""
    stdlib = pathlib.Path(sysconfig.get_path("stdlib"))
    sources = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(stdlib.glob("**/*.py"))[:2000]]
    (folder / "tokenizer.json").write_text(train_tokenizer(sources[:500], 8192).to_json())
    # About as long as the documents of OpenWebText, 5 kB.
    texts = [text[start : start + 5000] for text in sources for start in range(0, len(text), 5000)]
    rng, size, data = random.Random(0), 0, folder / "data"
    data.mkdir()
    for i in range(8):
        chosen, length = [], 0
        while length < megabytes * 10**6 // 8:
            chosen.append(f"{rng.random()} {rng.choice(texts)}")
            length += len(chosen[-1].encode())
        size += length
        if form == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": chosen}), data / f"{i}.parquet")
            continue
        raw = "".join(json.dumps({"text": text}) + "\n" for text in chosen).encode()
        if form == "jsonl.zst":
            with pyarrow.CompressedOutputStream(str(data / f"{i}.jsonl.zst"), "zstd") as stream:
                stream.write(raw)
        else:
            (data / f"{i}.{form}").write_bytes(gzip.compress(raw, 6) if form == "jsonl.gz" else raw)
    (folder / "texts.json").write_text(json.dumps([f"{rng.random()} {text}" for text in rng.choices(texts, k=6000)]))
    return size


def encode(folder: pathlib.Path) -> None:
    """A process that only encodes, some 30 MB; prints MB a second, and a second of CPU."""
    tokenizer, texts = load_tokenizer(folder / "tokenizer.json"), json.loads((folder / "texts.json").read_text())
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    began, cpu = time.monotonic(), time.process_time()
    for start in range(0, len(texts), 500):
        tokenizer.encode_batch(texts[start : start + 500])
    print(megabytes / (time.monotonic() - began), megabytes / (time.process_time() - cpu))


def tokenizer_alone(folder: pathlib.Path, cores: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.preparation", f"--encode={folder}"]
    alone = ENVIRONMENT | {"TOKENIZERS_PARALLELISM": "false"}
    processes = [
        subprocess.Popen(["taskset", "-c", str(core), *command], cwd=ROOT, env=alone, stdout=subprocess.PIPE, text=True)
        for core in range(cores)
    ]
    speeds = [[float(number) for number in process.communicate()[0].split()] for process in processes]
    return sum(speed for speed, _ in speeds), sum(speed for _, speed in speeds) / cores


def prepare(folder: pathlib.Path, cores: int, processes: int, size: int) -> tuple[float, float]:
    """MB a second of the whole command, and a second of CPU."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    flags = {"dataset": "text_files", "path": folder / "data", "cache_dir": folder / "cache"}
    flags |= {"tokenizer": folder / "tokenizer.json"}
    command = ["python", "-m", "tokenformer_jax.prepare", "--config=quickstart:small"]
    command += [f"--config.data.{key}={value}" for key, value in flags.items()] + ["--config.model.vocab_size=8192"]
    pod = ["bash", "launch/local_pod.sh", str(processes)] if processes > 1 else []
    began, cpu = time.monotonic(), cpu_of_children()
    chosen = ["taskset", "-c", ",".join(map(str, range(cores)))]
    subprocess.run([*chosen, *pod, *command], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return size / 1e6 / (time.monotonic() - began), size / 1e6 / (cpu_of_children() - cpu)


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--form", default="jsonl", choices=["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
    parser.add_argument("--encode", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.encode:
        return encode(args.encode)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        size = write_corpus(folder, args.megabytes, args.form)
        print(f"{size / 1e6:.0f} MB of text as {args.form}\n")
        names = "tokenizer alone, MB/s | prepare, MB/s | part | tokenizer alone, MB/s of CPU | prepare | part"
        print(f"| cores | processes | {names} |\n|---|---|---|---|---|---|---|---|")
        for cores, processes in ((1, 1), (1, 2), (2, 1), (2, 2)):
            alone, speed = tokenizer_alone(folder, cores), prepare(folder, cores, processes, size)
            row = [
                f"{ours:.2f} | {theirs:.2f} | {theirs / ours:.0%}" for ours, theirs in zip(alone, speed, strict=True)
            ]
            print(f"| {cores} | {processes} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
