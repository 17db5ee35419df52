"""Files of tokens, here and in buckets. Every 4 KiB of them have a checksum, which is compared when they are read."""

import os
import pathlib
import tempfile
import zlib
from collections.abc import Sequence

import numpy as np

from tokenformer_jax.buckets import patiently
from tokenformer_jax.data.encode import BLOCK, checksum_file
from tokenformer_jax.errors import UserError

Path = pathlib.Path


class Shard:
    """A file of tokens, mapped read-only."""

    def __init__(self, file: Path, num_tokens: int, dtype: str):
        self.file, self.num_tokens = file, num_tokens
        self.tokens = np.memmap(file, dtype=dtype, mode="r")
        self.checksums = np.memmap(checksum_file(file), dtype=np.uint32, mode="r")
        if len(self.tokens) != num_tokens or len(self.checksums) != -(-self.tokens.nbytes // BLOCK):
            raise ValueError("truncated")

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens of the file. Raises a UserError where they have changed since they were prepared."""
        size = BLOCK // self.tokens.itemsize
        for block in range(begin // size, -(-end // size)):
            if zlib.crc32(self.tokens[block * size : (block + 1) * size].data) != self.checksums[block]:
                raise _changed(self.file, block)
        return self.tokens[begin:end]


class RemoteShard:
    """A file of tokens in a bucket. What is read is copied to a file of this machine, which ends with the process."""

    def __init__(self, file: Path, num_tokens: int, dtype: str):
        self.file, self.num_tokens = file, num_tokens
        self.checksums = np.frombuffer(patiently(file, checksum_file(file).read_bytes), np.uint32)
        with tempfile.TemporaryFile() as copy:
            self.tokens = np.memmap(copy, dtype=dtype, mode="w+", shape=num_tokens)
        if len(self.checksums) != -(-self.tokens.nbytes // BLOCK):
            raise ValueError("truncated")
        self.copied = np.zeros(len(self.checksums), np.bool_)

    def missing(self, begin: int, end: int) -> tuple[int, int]:
        """The bytes that must be copied before these tokens can be read: all their blocks, or none."""
        size = self.tokens.itemsize
        first, last = begin * size // BLOCK, -(-end * size // BLOCK)
        if self.copied[first:last].all():
            return 0, 0
        return first * BLOCK, min(last * BLOCK, self.tokens.nbytes)

    def copy(self, start: int, raw: bytes) -> None:
        """Takes bytes of the bucket. Raises a UserError where they have changed since they were prepared."""
        for place in range(0, len(raw), BLOCK):
            block = raw[place : place + BLOCK]
            number = (start + place) // BLOCK
            if zlib.crc32(block) != self.checksums[number]:
                raise _changed(self.file, number)
            self.tokens.view(np.uint8)[start + place : start + place + len(block)] = np.frombuffer(block, np.uint8)
            self.copied[number] = True

    def read(self, begin: int, end: int) -> np.ndarray:
        copy_missing([(self, begin, end)])
        return self.tokens[begin:end]


def copy_missing(wanted: Sequence[tuple[RemoteShard, int, int]]) -> None:
    """Copies from the bucket what is missing of ranges of tokens, many at once."""
    ranges = {(shard, *shard.missing(begin, end)) for shard, begin, end in wanted}
    found = [(shard, start, stop) for shard, start, stop in ranges if stop]
    if not found:
        return
    import fsspec

    system, _ = fsspec.core.url_to_fs(os.fspath(found[0][0].file))
    names, starts, stops = zip(*((os.fspath(shard.file), start, stop) for shard, start, stop in found), strict=True)
    contents = patiently(names[0], lambda: system.cat_ranges(list(names), list(starts), list(stops), on_error="raise"))
    for (shard, start, stop), raw in zip(found, contents, strict=True):
        if len(raw) != stop - start:
            raise _changed(shard.file, start // BLOCK)
        shard.copy(start, raw)


def _changed(file: Path, block: int) -> UserError:
    return UserError(
        f"{file}: bytes {block * BLOCK} to {(block + 1) * BLOCK} have changed since they were prepared; delete its "
        "folder, and they are prepared anew"
    )


class InMemory:
    """Tokens that are in no file."""

    def __init__(self, tokens: np.ndarray):
        self.tokens, self.num_tokens = tokens, len(tokens)

    def read(self, begin: int, end: int) -> np.ndarray:
        return self.tokens[begin:end]
