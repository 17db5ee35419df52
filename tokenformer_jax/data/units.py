"""Files of text: which there are, and how the work of reading them is cut into units.

A unit is what one process reads at a time: files that are small together, a part of a plain file, every n-th document
of a compressed one, or some rows of a parquet file.
"""

import bz2
import gzip
import itertools
import lzma
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow

from tokenformer_jax.files import is_url

PARQUET = ".parquet"
ENDINGS = (".txt", ".jsonl")  # of what is read without being asked for by name, plain or compressed; and PARQUET
UNIT = 256 << 20  # bytes of text that one process reads at least, where there is so much

_BUFFER = 1 << 20  # bytes of a parquet file that are read at once


class _Compression(NamedTuple):
    open: Callable[[Any], Any]
    processes: int  # that a file is worth: each decompresses all of it


COMPRESSIONS = {
    ".gz": _Compression(lambda raw: gzip.GzipFile(fileobj=raw), 4),
    ".zst": _Compression(lambda raw: pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), 4),
    ".xz": _Compression(lzma.LZMAFile, 2),
    ".bz2": _Compression(bz2.BZ2File, 1),
}
_EXPANSION = 4  # bytes of text in one of a compressed or parquet file, about


def ending_of(name: str) -> str:
    """The ending of a file's name in lower case, with that of its compression: `.jsonl.gz`."""
    stem, ending = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] + ending if ending in COMPRESSIONS else ending


def is_known(ending: str) -> bool:
    """Whether files with this ending are read where nobody asks for them by name."""
    return ending == PARQUET or without_compression(ending)[0] in ENDINGS


def without_compression(ending: str) -> tuple[str, str]:
    kind, outer = os.path.splitext(ending) if ending.count(".") > 1 else (ending, "")
    return (kind, outer) if outer in COMPRESSIONS else ("", ending) if ending in COMPRESSIONS else (ending, "")


@dataclass(frozen=True)
class Unit:
    """What one process reads at a time; it can be written as JSON."""

    files: list[list[str]]  # path and ending of each
    size: int  # bytes that are read, as `Reading.position` counts them
    begin: int = 0  # byte of a plain file, or row of a parquet's group
    end: int = 0  # byte or row; 0: the last
    turn: int = 0  # of a compressed file: this turn
    turns: int = 1  # of so many
    group: int = -1  # of a parquet file; -1: all


def units_of(files: Iterable[tuple[str, str, int]], text_key: str) -> list[Unit]:
    """Cuts files, given by path, ending and size, into units in their order."""
    units: list[Unit] = []
    small: list[list[str]] = []
    weight = size = 0
    for path, ending, length in files:
        kind, compression = without_compression(ending)
        text = length * (_EXPANSION if compression or kind == PARQUET else 1)
        if small and weight + text > UNIT:
            units.append(Unit(small, size))
            small, weight, size = [], 0, 0
        if text <= UNIT:
            small.append([path, ending])
            weight, size = weight + text, size + length
        elif kind == PARQUET:
            units += _parquet_units(path, ending, text_key)
        elif compression:
            turns = min(COMPRESSIONS[compression].processes, -(-text // UNIT))
            units += [Unit([[path, ending]], length // turns, turn=turn, turns=turns) for turn in range(turns)]
        else:
            starts = [*range(0, length, UNIT), length]
            units += [Unit([[path, ending]], b - a, a, b) for a, b in itertools.pairwise(starts)]
    return [*units, Unit(small, size)] if small else units


def _parquet_units(path: str, ending: str, text_key: str) -> list[Unit]:
    units = []
    with open_binary(path) as raw, parquet_file(raw) as file:
        for i in range(file.num_row_groups):
            group = file.metadata.row_group(i)
            size = column_size(group, text_key)
            count = max(1, -(-size // UNIT))
            starts = [group.num_rows * k // count for k in range(count + 1)]
            for a, b in itertools.pairwise(starts):
                units.append(Unit([[path, ending]], size // count, a, b, group=i))
    return units


def open_binary(path: str) -> Any:
    """Opens a file of this machine, or of whatever fsspec knows, for reading."""
    if not is_url(path):
        return open(path, "rb")
    import fsspec  # takes a tenth of a second

    return fsspec.open(path, "rb").open()


def column_size(group: Any, text_key: str) -> int:
    """Bytes of a column in a group of rows."""
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_key)


def parquet_file(raw: Any) -> Any:
    import pyarrow.parquet  # takes a tenth of a second

    return pyarrow.parquet.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False)
