"""Each form of text file that `data.path` may name: whether it is read right, and the memory that it costs.

python -m benchmarks.inputs [--megabytes=200]

Writes every form into a temporary folder, reads it in a process of its own as `prepare` does, and prints a table:
documents read, whether their texts are those that were written, seconds, and the peak of memory above that of the
imports alone. Forms that need `zstandard` use pyarrow's compressor, which writes the same format.
"""

import argparse
import bz2
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet

TEXTS = [f"text {i}: naïve 中文 🙂 " + "some words of it " * (i % 40) for i in range(2000)]


def zstd(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def put(path: pathlib.Path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def write_forms(folder: pathlib.Path, megabytes: int) -> dict[str, tuple[str, list[str]]]:
    """Writes all forms; returns for each its path and its texts."""
    forms: dict[str, tuple[str, list[str]]] = {}

    def form(name: str, path: str, texts: list[str], files: dict[str, bytes]) -> None:
        place = folder / str(len(forms))
        for file, raw in files.items():
            put(place / file, raw)
        forms[name] = (str(place / path) if path else str(place), texts)

    for ending, compress in COMPRESSIONS.items():
        form(f".jsonl{ending}", "", TEXTS, {f"a.jsonl{ending}": compress(lines(TEXTS))})
        form(f".txt{ending}", "", TEXTS[:3], {f"{i}.txt{ending}": compress(TEXTS[i].encode()) for i in range(3)})
    form(".JSONL.GZ", "", TEXTS, {"a.JSONL.GZ": gzip.compress(lines(TEXTS))})
    halves = [zstd(lines(TEXTS[:1000])), zstd(lines(TEXTS[1000:]))]
    form(".jsonl.zst of two frames", "", TEXTS, {"a.jsonl.zst": b"".join(halves)})
    members = [gzip.compress(lines(TEXTS[:1000])), gzip.compress(lines(TEXTS[1000:]))]
    form(".jsonl.gz of two members", "", TEXTS, {"a.jsonl.gz": b"".join(members)})
    form(".parquet", "", TEXTS, {"a.parquet": parquet(TEXTS)})
    form("*.md", "*.md", TEXTS[:3], {f"{i}.md": TEXTS[i].encode() for i in range(3)} | {"b.py": b"other"})
    form("**/*.py", "**/*.py", TEXTS[:3], {f"sub/{i}.py": TEXTS[i].encode() for i in range(3)})
    form("*.json.gz of lines", "*.json.gz", TEXTS, {"a.json.gz": gzip.compress(lines(TEXTS))})
    form("byte-order mark", "", TEXTS[:2], {f"{i}.txt": b"\xef\xbb\xbf" + TEXTS[i].encode() for i in range(2)})
    form("hidden beside", "", TEXTS[:1], {"a.txt": TEXTS[0].encode(), ".b.txt": b"b", ".git/c.txt": b"c"})
    form("link beside its target", "", TEXTS[:1], {"a.txt": TEXTS[0].encode()})
    pathlib.Path(forms["link beside its target"][0], "b.txt").symlink_to("a.txt")
    form("a name like a glob", "[a]*.txt", TEXTS[:1], {"[a]*.txt": TEXTS[0].encode(), "ab.txt": b"other"})
    form("file:// URL", "", TEXTS, {"a.jsonl": lines(TEXTS)})
    forms["file:// URL"] = (f"file://{forms['file:// URL'][0]}", TEXTS)
    for kind, unit in (("ASCII", "some words of a long text\n"), ("with 🙂", "some 🙂 words of a long one\n")):
        long = [unit * (megabytes * 10**6 // len(unit.encode()))]
        form(f"{megabytes} MB .txt {kind}", "", long, {"a.txt": long[0].encode()})
        form(f"{megabytes} MB .txt.gz {kind}", "", long, {"a.txt.gz": gzip.compress(long[0].encode(), 1)})
        form(f"{megabytes} MB line, {kind}", "", long, {"a.jsonl": lines(long)})
        form(f"{megabytes} MB line, escaped, {kind}", "", long, {"a.jsonl": json.dumps({"text": long[0]}).encode()})
        form(f"{megabytes} MB line, zst, {kind}", "", long, {"a.jsonl.zst": zstd(lines(long))})
        form(f"{megabytes} MB in a .parquet, {kind}", "", long, {"a.parquet": parquet(long)})
    return forms


def parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), sink)
    return sink.getvalue().to_pybytes()


def digest(texts: Any) -> str:
    """Of all bytes, wherever a long text is cut."""
    content = hashlib.sha256()
    for text in texts:
        content.update(text.encode())
    return content.hexdigest()


def read(path: str) -> None:
    """What each process does: reads a path and prints its figures as JSON."""
    from tokenformer_jax.config import read_config
    from tokenformer_jax.configs.base import get_config
    from tokenformer_jax.data.text import TextFiles

    def megabytes(name: str) -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) >> 10

    tree = get_config()
    tree.data.update(dataset="text_files", path=path)
    began, count = time.monotonic(), 0
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = megabytes("VmRSS")
    content = hashlib.sha256()
    for document in TextFiles(read_config(tree.to_dict()).data).documents():
        count += 1
        content.update(document.text.encode())
        del document
    figures = {"count": count, "digest": content.hexdigest(), "seconds": time.monotonic() - began}
    print(json.dumps(figures | {"megabytes": megabytes("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the long texts")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        return read(args.read)
    print("| form | documents | read right | seconds | MB above the imports |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, texts) in write_forms(pathlib.Path(folder), args.megabytes).items():
            command = [sys.executable, "-m", "benchmarks.inputs", f"--read={path}"]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            if done.returncode:
                why = done.stderr.strip().splitlines()[-1]
                print(f"| {name} | – | no: {why[-90:]} | | |", flush=True)
            else:
                row = json.loads(done.stdout)
                right = "yes" if row["digest"] == digest(texts) else "no: other texts"
                figures = f"{row['seconds']:.1f} | {row['megabytes']:.0f}"
                print(f"| {name} | {row['count']} | {right} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
