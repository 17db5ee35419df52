"""Our own data sets of text. `identity` changes when the data does; `units` is the work of reading them, in parts."""

import os
import pathlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tokenformer_jax.config import DataConfig
from tokenformer_jax.data.folders import File, find, find_remote
from tokenformer_jax.data.readers import Document, Reading
from tokenformer_jax.data.units import Unit, units_of
from tokenformer_jax.errors import UserError, listed, shown
from tokenformer_jax.files import is_url, local_path

Path = pathlib.Path

_VALIDATION_PART = 0.05  # of the documents of our own sets
_NAMED = 3  # of the documents that are skipped
_SLICE = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@dataclass(frozen=True)
class Split:
    """A split of one of our own sets, or a slice of it such as `train[:10%]`."""

    name: str
    begin: str = ""
    end: str = ""

    @classmethod
    def of(cls, text: str, key: str) -> "Split":
        """Raises a UserError, which names the key, where the text is no such split."""
        match = _SLICE.fullmatch(text)
        if not match or match[1] not in ("train", "validation"):
            raise UserError(f"{key} = {text!r}: cannot be read; use train or validation, or a part such as train[:10%]")
        return cls(match[1], match[2] or "", match[3] or "")

    @property
    def counts(self) -> bool:
        """Whether it says a number of documents."""
        return any(edge and "%" not in edge for edge in (self.begin, self.end))

    def range(self, count: int) -> range:
        """Which of so many documents belong to it."""
        edges = [_edge(edge, count) if edge else None for edge in (self.begin, self.end)]
        return range(count)[slice(*edges)]


def _edge(edge: str, count: int) -> int:
    return round(int(edge[:-1]) * count / 100) if edge.endswith("%") else int(edge)


@dataclass
class Places:
    """Which documents of our own sets are for validation."""

    split_at: float = _VALIDATION_PART  # those whose place is lower
    single: bool = False  # there is but one: its end is

    def texts(self, document: Document) -> Iterator[tuple[str, str]]:
        """What a document adds to the splits: their names, and the texts."""
        if self.single:
            cut = int((1 - _VALIDATION_PART) * len(document.text))
            yield "train", document.text[:cut]
            yield "validation", document.text[cut:]
        else:
            yield ("validation" if document.place < self.split_at else "train"), document.text


class LocalSet:
    """Files as a set of documents that are split by a hash."""

    name: ClassVar[str]
    reading: Reading
    files: list[File]

    @property
    def identity(self) -> list[Any]:
        return [(file.path, file.size, file.stamp) for file in self.files]

    def report_skipped(self) -> None:
        """Says which of the files are not read."""

    def units(self) -> list[Unit]:
        return units_of(((file.path, file.ending, file.size) for file in self.files), self.reading.text_key)

    def splits(self, data: DataConfig) -> dict[str, Split]:
        return {
            name: Split.of(getattr(data, f"{name}_split"), f"data.{name}_split") for name in ("train", "validation")
        }

    def documents(self) -> Iterator[Document]:
        for unit in self.units():
            yield from self.reading.read(unit)

    def places(self) -> Places:
        """Where the splits part. Reads documents until both sides have one, which takes few.

        Raises:
          UserError: there is no text.
        """
        low, high = 1.0, 0.0
        skipped = Skipped()
        for document in self.documents():
            if not skipped.skips(document):
                low, high = min(low, document.place), max(high, document.place)
                if low < _VALIDATION_PART <= high:
                    return Places()
        if low > high:
            faults = skipped.named()
            raise UserError(
                f"{self.reading.label}: holds no text that can be used{': ' * bool(faults)}{faults}; use UTF-8 in "
                ".txt, or .jsonl or .parquet whose key --config.data.text_key=KEY holds the text"
            )
        # Few documents may all fall on one side: then the outermost goes alone to the other.
        return Places(float(min(max(_VALIDATION_PART, np.nextafter(low, 1)), high)), low == high)


@dataclass
class Skipped:
    """What is not read as it is, of documents."""

    unreadable: int = 0
    empty: int = 0
    cut: int = 0
    first: tuple[str, ...] = ()
    first_cut: str = ""

    def skips(self, document: Document) -> bool:
        if document.part == 1:
            self.cut += 1
            self.first_cut = self.first_cut or str(document)
        if document.fault:
            self.unreadable += 1
            self.first = (*self.first, str(document))[:_NAMED]
        elif not document.text.strip():
            self.empty += 1
        else:
            return False
        return True

    def add(self, other: "Skipped") -> None:
        for key in ("unreadable", "empty", "cut"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        self.first = (*self.first, *other.first)[:_NAMED]
        self.first_cut = self.first_cut or other.first_cut

    def named(self) -> str:
        more = self.unreadable - len(self.first)
        return ", ".join(self.first) + (f" and {more} more" if more else "")

    def report(self, label: str) -> None:
        if self.unreadable or self.empty:
            which = f" ({self.named()})" if self.unreadable else ""
            print(
                f"{label}: skipped {self.unreadable} unreadable documents{which} and {self.empty} empty ones",
                file=sys.stderr,
            )
        if self.cut:
            print(
                f"{label}: cut {self.cut} texts of more than 32 MiB into documents of 1 MiB, "
                f"after line ends where there are any; the first is {self.first_cut}",
                file=sys.stderr,
            )


class PythonSource(LocalSet):
    """The running interpreter's standard library, without its tests; split by a hash of the relative path."""

    name = "python_source"
    _LEFT_OUT: ClassVar = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

    def __init__(self, data: DataConfig, root: Path | None = None):
        root = root or Path(sysconfig.get_path("stdlib"))
        self.reading = Reading(f"data.dataset = {self.name!r}: {root}", root=str(root))
        found = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = set(subfolders) - self._LEFT_OUT
            files = [Path(folder, name) for name in names if name.endswith(".py")]
            found += [file for file in files if file.is_file() and file.stat().st_size]  # many are empty
        self.files = []
        for file in sorted(found):
            stat = file.stat()
            self.files.append(File(str(file), ".py", stat.st_size, stat.st_mtime_ns))


class TextFiles(LocalSet):
    """What a folder, file, glob or URL names: text, lines of JSON and parquet; split by a hash of the text."""

    name = "text_files"

    def __init__(self, data: DataConfig):
        label = f"data.path = {data.path!r}"
        self.reading = Reading(label, data.text_key)
        if not data.path:
            raise UserError(f"{label}: names no data; use --config.data.path=PLACE, a folder, file, glob or URL")
        place = ""
        if is_url(data.path):
            self.files, self.skipped = find_remote(data.path)
        else:
            path = local_path(data.path, "data.path", any_bytes=True)
            cache = None if is_url(data.cache_dir) else local_path(data.cache_dir, "data.cache_dir")
            self.files, self.skipped = find(path, cache)
            place = "" if path.is_absolute() else f" in {os.getcwd()}"
        if not self.files:
            others = f", but {len(self.skipped)} others ({listed(self._skipped)})" if self.skipped else ""
            raise UserError(
                f"{label}: matches no .txt, .jsonl or .parquet file{place}{others}; use a folder or file of such, "
                "or a glob that says another ending, such as '**/*.py' "
                "(where they were moved, --config.data.path=PLACE says so)"
            )

    @property
    def _skipped(self) -> list[str]:
        return [shown(name) for name in self.skipped]

    def report_skipped(self) -> None:
        if self.skipped:
            print(
                f"{self.reading.label}: skipped {len(self.skipped)} files, not .txt, .jsonl or .parquet: "
                f"{listed(self._skipped)}",
                file=sys.stderr,
            )

    @property
    def identity(self) -> list[Any]:
        # A link whose ending is not that of its file decides how it is read.
        kinds = [[file.ending] if Path(file.path).suffix != file.ending else [] for file in self.files]
        return [self.reading.text_key, *([*stat, *kind] for stat, kind in zip(super().identity, kinds, strict=True))]
