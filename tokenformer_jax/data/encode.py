"""Tokenizing units of text into files, in processes that share nothing but a folder.

A unit becomes one part or more, each whole once its record is there: what was made before a kill is not made again.
`python -m tokenformer_jax.data.encode JOB` is such a process: it reads numbers of units, and prints what it has done.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tokenformer_jax.data.published import Examples, ReadingSet
from tokenformer_jax.data.readers import Reading
from tokenformer_jax.data.text import Places, Skipped, Split
from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokenformer_jax.data.units import UNIT, Unit
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import parse_json, replace_file, run_path, sealed, unsealed

BLOCK = 4096  # bytes of tokens that share a checksum
_PIECE = 1 << 20  # characters encoded at once; the encoder takes about 100 bytes of memory a token
_TOGETHER = 4 * _PIECE  # characters, work for all cores in little memory
_LARGEST_FILE = 7 << 27  # bytes of tokens after which a part ends: with a document more, it is below 1 GiB
_WRITTEN = 1 << 20  # bytes at once

READINGS: dict[str, Any] = {"files": (Reading, Unit), "examples": (ReadingSet, Examples)}


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a process must know to tokenize, beside the tokenizer; it can be written as JSON."""

    kind: str  # of READINGS
    reading: dict[str, Any]
    units: list[dict[str, Any]]
    splits: dict[str, dict[str, str]]  # of the run: the `Split` of each
    places: dict[str, Any] | None  # `Places`, where documents are split by them
    part_size: int  # bytes of text after which a part ends

    @classmethod
    def of(cls, reading: Any, units: list[Any], splits: Any, places: Places | None) -> "Job":
        kind = next(kind for kind, (reads, _) in READINGS.items() if isinstance(reading, reads))
        return cls(
            kind,
            dataclasses.asdict(reading),
            [dataclasses.asdict(unit) for unit in units],
            {name: dataclasses.asdict(split) for name, split in splits.items()},
            dataclasses.asdict(places) if places else None,
            UNIT,
        )

    @classmethod
    def read(cls, path: pathlib.Path) -> "Job":
        return cls(**parse_json(path.read_text()))


class Done(NamedTuple):
    """What was done since the last one."""

    documents: int
    text: int  # bytes
    position: int  # bytes of the unit's size


def part_name(unit: int, part: int) -> str:
    return f"{unit:05}-{part:03}"


def part_record(folder: pathlib.Path, unit: int, part: int) -> dict[str, Any] | None:
    """The record of a part, or None where it is not whole."""
    try:
        return unsealed((folder / f"{part_name(unit, part)}.json").read_text())
    except (OSError, ValueError):
        return None


def token_type(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def encode_unit(job: Job, folder: pathlib.Path, tokenizer: Tokenizer, number: int) -> Iterator[Done]:
    """Tokenizes what is missing of a unit.

    Raises:
      UserError: the text cannot be read.
      OSError: the tokens cannot be written.
    """
    part, done = 0, 0
    while record := part_record(folder, number, part):
        if record["is_last"]:
            return
        part, done = part + 1, record["documents"]
    reads, unit_type = READINGS[job.kind]
    reading, unit = reads(**job.reading), unit_type(**job.units[number])
    places = Places(**job.places) if job.places else None
    made, documents = _Part(job, tokenizer), done
    for key, document in enumerate(reading.read(unit)):
        if key < done:
            continue
        documents = key + 1
        if not places:
            made.add(unit.name, key, document.text)
        elif not made.skipped.skips(document):
            for name, text in places.texts(document):
                made.add(name, key, text)
        if made.waiting_size >= _TOGETHER:
            made.encode()
            yield made.progress(reading)
        if made.is_full:
            made.write(folder, number, part, documents, is_last=False)
            yield made.progress(reading)
            part, made = part + 1, _Part(job, tokenizer)
    made.write(folder, number, part, documents, is_last=True)
    yield made.progress(reading)


class _Documents:
    """Tokens of documents of a split, and where each ends."""

    def __init__(self) -> None:
        self.tokens = bytearray()
        self.ends, self.sizes, self.keys = array("Q"), array("Q"), bytearray()


def _order_key(split: str, number: int) -> bytes:
    """What documents are shuffled by: the hash that data sets of tfds are ordered by, as all texts here were once."""
    return hashlib.md5(f"{split}{number}".encode()).digest()


def _shuffled(keys: bytes | bytearray) -> np.ndarray:
    halves = np.frombuffer(keys, ">u8").reshape(-1, 2)
    return np.lexsort((halves[:, 1], halves[:, 0]))


class _Part:
    """Documents that become the files of a part: their tokens are held until all are there and can be shuffled."""

    def __init__(self, job: Job, tokenizer: Tokenizer):
        self.job, self.tokenizer, self.dtype = job, tokenizer, token_type(tokenizer)
        self.end = np.array([tokenizer.end_of_text], self.dtype).tobytes()
        self.splits = {name: Split(**split) for name, split in job.splits.items()}
        self.made = {split.name: _Documents() for split in self.splits.values()}
        self.waiting: list[tuple[str, bool, str]] = []  # name, whether it ends its document, and a piece of text
        self.text = self.waiting_size = 0
        self.done = Done(0, 0, 0)  # since the last report
        self.skipped = Skipped()

    def add(self, name: str, key: int, text: str) -> None:
        if name not in self.made or not text:
            return
        made, size = self.made[name], len(text.encode())
        made.keys += _order_key(name, key)
        made.sizes.append(size)
        self.text += size
        self.done = Done(self.done.documents + 1, self.done.text + size, 0)
        for piece, is_last in pieces(text):
            self.waiting.append((name, is_last, piece))
            self.waiting_size += len(piece) + _PIECE // 4096  # so that there are not too many, however short they are
            if self.waiting_size >= _TOGETHER and not is_last:
                self.encode()

    @property
    def is_full(self) -> bool:
        return self.text >= self.job.part_size or max(len(made.tokens) for made in self.made.values()) >= _LARGEST_FILE

    def progress(self, reading: Any) -> Done:
        """What was done since it was asked last."""
        done, self.done = self.done._replace(position=reading.position), Done(0, 0, 0)
        reading.position = 0
        return done

    def encode(self) -> None:
        """Encodes what waits."""
        encoded = self.tokenizer.encode_batch([text for _, _, text in self.waiting])
        for (name, is_last, _), ids in zip(self.waiting, encoded, strict=True):
            made = self.made[name]
            made.tokens += np.array(ids, self.dtype).tobytes()
            if is_last:
                made.tokens += self.end
                made.ends.append(len(made.tokens))
        self.waiting, self.waiting_size = [], 0

    def write(self, folder: pathlib.Path, unit: int, part: int, documents: int, is_last: bool) -> None:
        """Writes a file of tokens and one of checksums for each split of the run, then the record."""
        self.encode()
        figures = {}
        for name, split in self.splits.items():
            made = self.made[split.name]
            order = _shuffled(made.keys) if self.job.places else np.arange(len(made.ends))
            order = order[list(split.range(len(order)))] if split.begin or split.end else order
            starts = [0, *made.ends]
            view = memoryview(made.tokens)
            pieces = [self.end] if unit == part == 0 else []  # the stream begins with an end of text
            file = token_file(folder, name, unit, part)
            size, fingerprint = _write(file, pieces, (view[starts[i] : starts[i + 1]] for i in order))
            figures[name] = {
                "num_tokens": size // len(self.end),
                "num_bytes": int(np.frombuffer(made.sizes, np.uint64)[order].sum()) if len(order) else 0,
                "num_documents": len(order),
                "fingerprint": fingerprint,
            }
        record = {"splits": figures, "documents": documents, "is_last": is_last}
        record["skipped"] = dataclasses.asdict(self.skipped)
        replace_file(folder / f"{part_name(unit, part)}.json", sealed(record))


def token_file(folder: pathlib.Path, name: str, unit: int, part: int) -> pathlib.Path:
    return folder / f"{name}-{part_name(unit, part)}.bin"


def checksum_file(file: pathlib.Path) -> pathlib.Path:
    return file.with_suffix(".crc32")


def _write(file: pathlib.Path, first: list[bytes], others: Iterable[memoryview]) -> tuple[int, str]:
    """Writes tokens and their checksums; returns the bytes and a hash of them."""
    content, size, rest = hashlib.sha256(), 0, bytearray(b"".join(first))
    with file.open("wb") as stream, checksum_file(file).open("wb") as checksums:

        def write(whole: int) -> None:
            nonlocal rest, size
            raw = bytes(rest[:whole])
            sums = [zlib.crc32(raw[start : start + BLOCK]) for start in range(0, whole, BLOCK)]
            checksums.write(np.array(sums, np.uint32).tobytes())
            stream.write(raw)
            content.update(raw)
            size += whole
            rest = rest[whole:]

        for piece in others:
            rest += piece
            if len(rest) >= _WRITTEN:
                write(len(rest) // BLOCK * BLOCK)
        write(len(rest))
    return size, content.hexdigest()


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Cuts a long text after line ends, where cutting changes next to no token; says which piece is the last."""
    start = 0
    while start < len(text):
        stop = start + _PIECE
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop], stop >= len(text)
        start = stop


def split_texts(reading: Any, unit: Any, places: Places | None, split: Split, characters: int) -> Iterator[str]:
    """The texts that a unit adds to a split, up to about so many characters."""

    def texts() -> Iterator[tuple[int, str]]:
        left = characters
        for key, document in enumerate(reading.read(unit)):
            if left <= 0:
                return
            if not places:
                found = [(unit.name, document.text)]
            else:
                found = [] if Skipped().skips(document) else list(places.texts(document))
            for name, text in found:
                if name == split.name:
                    left -= len(text)
                    yield key, text

    if not (split.begin or split.end):
        yield from (text for _, text in texts())
        return
    keys = [key for key, _ in texts()]  # read twice, so that no texts must be held
    order = _shuffled(b"".join(_order_key(split.name, key) for key in keys))
    chosen = {keys[i] for i in order[list(split.range(len(order)))]}
    yield from (text for key, text in texts() if key in chosen)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    path = run_path(sys.argv[1], "JOB")
    job = Job.read(path)
    tokenizer = load_tokenizer(path.with_name("tokenizer.json"))

    def say(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    for line in sys.stdin:
        try:
            for progress in encode_unit(job, path.parent, tokenizer, int(line)):
                say(progress=progress)
        except UserError as error:
            say(error=str(error))
        except OSError as error:
            say(not_written=error.strerror or str(error))
        else:
            say(done=True)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # who started this process is gone
        os._exit(1)
