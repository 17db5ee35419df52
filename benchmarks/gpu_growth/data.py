"""Real text from what a machine has installed, as token ids: the data of benchmarks/gpu_growth.

Source code, headers and documentation. Left out: what is not UTF-8, tables and minified code, files above 1 MB, copies,
and files most of whose lines other files have (versions of a header). All choices depend on names and contents alone,
but for where the seconds end.
"""

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tokenformer_jax.data.tokenizer import load_tokenizer, train_tokenizer

ROOTS = (sys.prefix, sysconfig.get_path("stdlib"), "/usr", "/opt")
SUFFIXES = frozenset(
    ".py .pyi .pyx .pxd .h .hh .hpp .hxx .cuh .cu .c .cc .cpp .cxx .inl .md .rst .txt .tex .sh .pl .pm .cmake .proto "
    ".f90 .jl .java .go .rs .lua .el .m4 .awk .tcl".split()
)
SMALLEST, LARGEST = 256, 1 << 20  # bytes of a file
LONGEST_LINE, MEAN_LINE = 2000, 150  # bytes; minified or generated code has longer ones
LEAST_LETTERS = 0.5  # of a file's bytes that are no space; tables have fewer
LETTERS = bytes(range(65, 91)) + bytes(range(97, 123))
SAMPLE = 20_000_000  # bytes from whose beginning the tokenizer is trained
BYTES_PER_TOKEN = 4.5  # at most, to know when enough was read
TASK = 64  # files that a process takes at once


class File(NamedTuple):
    """What decides whether a file is used; its text is read again later."""

    path: str
    size: int
    digest: bytes
    lines: set[int]  # checksums of some of its lines, chosen by their length, so the same of equal lines


def list_files(folders: Iterable[str]) -> list[str]:
    """All files to look at, in an order that depends on their names alone."""
    paths: set[str] = set()
    for root in set(map(os.path.realpath, folders)):
        for folder, _, names in os.walk(root):
            paths |= {os.path.join(folder, name) for name in names if os.path.splitext(name)[1] in SUFFIXES}
    return sorted(paths, key=lambda path: (hashlib.sha256(path.encode(errors="replace")).digest(), path))


def read_text(path: str) -> bytes | None:
    """A file's contents if they are text that people wrote."""
    try:
        if os.path.islink(path) or not SMALLEST <= os.path.getsize(path) <= LARGEST:
            return None
        raw = pathlib.Path(path).read_bytes()
        raw.decode()
    except (OSError, UnicodeDecodeError):
        return None
    lines, dense = raw.split(b"\n"), b"".join(raw.split())
    letters = len(dense) - len(dense.translate(None, LETTERS))
    prose = dense and letters >= LEAST_LETTERS * len(dense) and b"\0" not in raw
    return raw if prose and len(raw) <= MEAN_LINE * len(lines) and max(map(len, lines)) <= LONGEST_LINE else None


def examine(paths: list[str]) -> list[File]:
    files = []
    for path in paths:
        if raw := read_text(path):
            lines = {zlib.crc32(line) for line in raw.split(b"\n") if len(line) > 30 and len(line) % 8 == 0}
            files.append(File(path, len(raw), hashlib.blake2b(raw, digest_size=16).digest(), lines))
    return files


def unique(files: Iterable[File]) -> Iterator[File]:
    """Without copies, and without files most of whose lines were seen before."""
    digests: set[bytes] = set()
    seen: set[int] = set()
    for file in files:
        version = len(file.lines) >= 4 and len(file.lines & seen) > len(file.lines) / 2
        if file.digest not in digests and not version:
            seen |= file.lines
            yield file
        digests.add(file.digest)


def encode(tokenizer: pathlib.Path, paths: list[str]) -> tuple[np.ndarray, int, int]:
    """Token ids of files, one after another, each followed by end-of-text; how many files and bytes they are."""
    bpe = load_tokenizer(tokenizer)
    texts = [raw for raw in map(read_text, paths) if raw]
    ids = [
        np.asarray([*each, bpe.end_of_text], np.uint16) for each in bpe.encode_batch([raw.decode() for raw in texts])
    ]
    return np.concatenate([np.zeros(0, np.uint16), *ids]), len(texts), sum(map(len, texts))


def prepare(
    out: pathlib.Path, folders: Iterable[str], tokens: int, vocabulary: int, held_out: int, limit: float
) -> None:
    """Writes train.npy and validation.npy (uint16), tokenizer.json and, last, data.json; uses all cores, no device.

    `tokens` of training are enough; one file of so many as `held_out` says is for validation. Nothing more is encoded
    after `limit` seconds, and nothing more read after half of them.
    """
    began = time.monotonic()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of the workers, which are one a core
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([encode.__module__])
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), context) as pool:
        pool.submit(os.getpid).result()
        os.environ["TOKENIZERS_PARALLELISM"] = "true"  # of this process

        def results(function: Any, paths: list[str], seconds: float) -> Iterator[Any]:
            """Of files, task by task; until the seconds are over, or the caller has enough."""
            tasks = [pool.submit(function, paths[i : i + TASK]) for i in range(0, len(paths), TASK)]
            try:
                for task in tasks:
                    if time.monotonic() - began < seconds:
                        yield task.result()
            finally:
                for task in tasks:
                    task.cancel()

        paths, size, sample = list_files(folders), 0, []
        names: dict[str, list[str]] = {"validation": [], "train": []}
        for file in unique(file for files in results(examine, paths, limit / 2) for file in files):
            is_held_out = zlib.crc32(file.path.encode(errors="replace")) % held_out == 0
            names["validation" if is_held_out else "train"].append(file.path)
            size += file.size
            if size < SAMPLE and not is_held_out:
                sample.append((read_text(file.path) or b"").decode())
            if size > tokens * BYTES_PER_TOKEN:
                break

        (out / "tokenizer.json").write_text(train_tokenizer(sample, vocabulary).to_json())

        figures: dict[str, Any] = {"files_seen": len(paths), "files_kept": sum(map(len, names.values()))}
        for split, chosen in names.items():
            parts, count = [], 0
            for part in results(functools.partial(encode, out / "tokenizer.json"), chosen, limit):
                parts.append(part)
                count += len(part[0])
                if count >= tokens:
                    break
            arrays, files, lengths = zip(*parts, strict=True)
            ids = np.concatenate(arrays)[:tokens]
            np.save(out / f"{split}.npy", ids)
            figures[split] = {"documents": sum(files), "bytes": sum(lengths), "tokens": len(ids)}
            figures[split]["fingerprint"] = hashlib.sha256(ids.tobytes()).hexdigest()[:12]
    figures |= {"folders": list(folders), "vocabulary": vocabulary, "seconds": round(time.monotonic() - began, 2)}
    (out / "data.json").write_text(json.dumps(figures, indent=1) + "\n")
