"""Real text from what a machine has installed, as token ids: the data of benchmarks/gpu_growth.py.

python -m benchmarks.gpu_growth_data --out=runs/gpu_growth/data [--tokens=250000000] [--vocab=8192] [--seconds=75]

Source code, headers and documentation under the interpreter's folders, /usr and /opt. Left out: what is not UTF-8,
tables and minified code, files above 1 MB, exact copies, and files most of whose lines other files have (versions of a
header). All choices depend on names and contents alone, but for where the seconds end. Leaves train.npy and
validation.npy (uint16; documents in a shuffled order, each followed by the end-of-text token), tokenizer.json and,
last, data.json. Uses all cores, and no device.
"""

import argparse
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
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

SUFFIXES = frozenset(
    ".py .pyi .pyx .pxd .h .hh .hpp .hxx .cuh .cu .c .cc .cpp .cxx .inl .md .rst .txt .tex .sh .pl .pm .cmake .proto "
    ".f90 .jl .java .go .rs .lua .el .m4 .awk .tcl".split()
)
SKIPPED = frozenset("__pycache__ node_modules proc sys dev".split())  # folders
SMALLEST, LARGEST = 256, 1 << 20  # bytes of a file
LONGEST_LINE, MEAN_LINE = 2000, 150  # bytes; minified or generated code has longer ones
LEAST_LETTERS = 0.5  # of a file's bytes that are no space; tables have fewer
SAMPLE = 20_000_000  # bytes that the tokenizer is trained on
BYTES_PER_TOKEN = 4.5  # at most, to know when enough was read
TASK = 64  # files that a process takes at once
LETTERS = bytes(range(65, 91)) + bytes(range(97, 123))


class File(NamedTuple):
    """What decides whether a file is used; its text is read again later."""

    path: str
    size: int
    digest: bytes
    lines: list[int]  # checksums of some of its lines, chosen by their length, so the same of equal lines


def roots() -> list[str]:
    """Folders with installed text; none lies in another."""
    found = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    found |= {sys.prefix, "/usr/share", "/usr/include", "/usr/local", "/usr/lib", "/usr/src", "/opt"}
    real = sorted({os.path.realpath(path) for path in found if os.path.isdir(path)})
    return [path for path in real if not any(path.startswith(other + os.sep) for other in real)]


def list_files(folders: list[str]) -> list[str]:
    """All files to look at, in an order that depends on their names alone."""

    def walk(folder: str) -> Iterator[str]:
        todo = [folder]
        while todo:
            try:
                entries = list(os.scandir(todo.pop()))
            except OSError:
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in SKIPPED:
                        todo.append(entry.path)
                elif os.path.splitext(entry.name)[1] in SUFFIXES and entry.is_file(follow_symlinks=False):
                    yield entry.path

    paths = {path for folder in folders for path in walk(folder)}
    return sorted(paths, key=lambda path: (hashlib.sha256(path.encode(errors="replace")).digest(), path))


def read_text(path: str) -> bytes | None:
    """A file's contents if they are text that people wrote."""
    try:
        if not SMALLEST <= os.path.getsize(path) <= LARGEST:
            return None
        raw = pathlib.Path(path).read_bytes()
        raw.decode()
    except (OSError, UnicodeDecodeError):
        return None
    lines = raw.split(b"\n")
    dense = b"".join(raw.split())
    letters = len(dense) - len(dense.translate(None, LETTERS))
    prose = dense and letters >= LEAST_LETTERS * len(dense) and b"\0" not in raw
    return raw if prose and len(raw) <= MEAN_LINE * len(lines) and max(map(len, lines)) <= LONGEST_LINE else None


def examine(paths: list[str]) -> list[File]:
    files = []
    for path in paths:
        raw = read_text(path)
        if raw is not None:
            lines = {zlib.crc32(line) for line in raw.split(b"\n") if len(line) > 30 and len(line) % 8 == 0}
            files.append(File(path, len(raw), hashlib.blake2b(raw, digest_size=16).digest(), sorted(lines)))
    return files


class Unique:
    """Remembers files, to tell what is new."""

    def __init__(self) -> None:
        self.digests: set[bytes] = set()
        self.lines: set[int] = set()
        self.copies = self.versions = 0

    def is_new(self, file: File) -> bool:
        if file.digest in self.digests:
            self.copies += 1
            return False
        self.digests.add(file.digest)
        if len(file.lines) >= 4 and sum(line in self.lines for line in file.lines) > len(file.lines) / 2:
            self.versions += 1
            return False
        self.lines.update(file.lines)
        return True


@functools.cache
def load(tokenizer: pathlib.Path) -> Tokenizer:
    return load_tokenizer(tokenizer)


def encode(tokenizer: pathlib.Path, paths: list[str]) -> tuple[np.ndarray, int, int]:
    """Token ids of files, one after another, with how many files and bytes they are."""
    bpe = load(tokenizer)
    texts = [raw for raw in map(read_text, paths) if raw is not None]
    ids = [
        np.asarray([*each, bpe.end_of_text], np.uint16) for each in bpe.encode_batch([raw.decode() for raw in texts])
    ]
    return np.concatenate([np.zeros(0, np.uint16), *ids]), len(texts), sum(map(len, texts))


def in_tasks(paths: list[str]) -> list[list[str]]:
    return [paths[i : i + TASK] for i in range(0, len(paths), TASK)]


def prepare(
    out: pathlib.Path, folders: list[str], tokens: int, vocab: int, seconds: float, held_out: int
) -> dict[str, Any]:
    """Writes the data set; returns what data.json holds.

    Args:
      out: a folder, made if it is not there.
      folders: where to look for text.
      tokens: how many training tokens are enough.
      vocab: of the tokenizer.
      seconds: after which no more files are read or encoded; what is there by then is used.
      held_out: one file of so many is for validation.
    """
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    phases: dict[str, float] = {}

    def late(part: float) -> bool:
        return time.monotonic() - began > part * seconds

    def passed(phase: str) -> None:
        phases[phase] = round(time.monotonic() - began - sum(phases.values()), 2)

    cores = len(os.sched_getaffinity(0))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of the workers, which are one a core
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([encode.__module__])
    with concurrent.futures.ProcessPoolExecutor(cores, context) as pool:
        for _ in range(cores):  # starts them
            pool.submit(os.getpid)
        os.environ["TOKENIZERS_PARALLELISM"] = "true"  # of this process
        paths = list_files(folders)
        passed("list")

        unique, kept, size = Unique(), [], 0
        tasks = [pool.submit(examine, part) for part in in_tasks(paths)]
        for task in tasks:
            new = [file for file in task.result() if unique.is_new(file)]
            kept += new
            size += sum(file.size for file in new)
            if size > tokens * BYTES_PER_TOKEN or late(0.5):
                break
        for task in tasks:
            task.cancel()
        names: dict[str, list[str]] = {"validation": [], "train": []}
        for file in kept:
            is_held_out = zlib.crc32(file.path.encode(errors="replace")) % held_out == 0
            names["validation" if is_held_out else "train"].append(file.path)
        passed("read")

        sample: list[str] = []
        sampled = 0
        for path in names["train"]:
            sample += [raw.decode() for raw in [read_text(path)] if raw is not None]
            sampled += len(sample[-1]) if sample else 0
            if sampled > SAMPLE:
                break
        tokenizer = train_tokenizer(sample, vocab)
        (out / "tokenizer.json").write_text(tokenizer.to_json())
        passed("train the tokenizer")

        figures: dict[str, Any] = {}
        encoder = functools.partial(encode, out / "tokenizer.json")
        work = {split: [pool.submit(encoder, part) for part in in_tasks(chosen)] for split, chosen in names.items()}
        for split, encoded in work.items():
            parts, documents, read, count = [], 0, 0, 0
            for each in encoded:
                ids, files, length = each.result()
                parts.append(ids)
                documents, read, count = documents + files, read + length, count + len(ids)
                if split == "train" and (count >= tokens or late(1)):
                    break
            for each in encoded:
                each.cancel()
            ids = np.concatenate([np.zeros(0, np.uint16), *parts])[: tokens if split == "train" else None]
            np.save(out / f"{split}.npy", ids)
            figures[split] = {
                "documents": documents,
                "bytes": read,
                "bytes_per_token": round(read / max(1, count), 3),
                "tokens": len(ids),
                "fingerprint": hashlib.sha256(ids.tobytes()).hexdigest()[:12],
            }
        passed("encode")
    figures |= {
        "wanted_tokens": tokens,
        "out_of_time": late(1),
        "folders": folders,
        "files_seen": len(paths),
        "left_out": {"copies": unique.copies, "versions": unique.versions},
        "vocabulary": tokenizer.vocab_size,
        "cores": cores,
        "seconds": phases,
    }
    (out / "data.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=250_000_000)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--held_out", type=int, default=100)
    parser.add_argument(
        "--folders", default="", help="where to look, separated by colons; by default all that is known"
    )
    args = parser.parse_args()
    folders = args.folders.split(":") if args.folders else roots()
    print(json.dumps(prepare(args.out, folders, args.tokens, args.vocab, args.seconds, args.held_out)))


if __name__ == "__main__":
    main()
