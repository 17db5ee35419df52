"""Text sets of TensorFlow Datasets, and the choice among all data sets."""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenformer_jax.config import DataConfig
from tokenformer_jax.data.readers import Document
from tokenformer_jax.data.text import LocalSet, PythonSource, Split, TextFiles
from tokenformer_jax.data.units import UNIT
from tokenformer_jax.errors import UserError, shown
from tokenformer_jax.files import local_path


@dataclass(frozen=True)
class Examples:
    """A unit of a published set: some examples of a split."""

    split: str
    name: str  # the split of the run: train or validation
    begin: int
    end: int
    size: int


@dataclass
class ReadingSet:
    """Reads units of a set of tfds, and counts what it has read."""

    label: str
    dataset: str
    data_dir: str | None
    text_key: str
    position: int = 0

    def __post_init__(self) -> None:
        self._opened: dict[str, Any] = {}

    def open(self, split: str) -> Any:
        if split not in self._opened:
            import tensorflow_datasets as tfds
            import tensorflow_datasets.text  # registers c4, wiki40b and others, which tfds alone does not

            self._opened[split] = tfds.builder(self.dataset, data_dir=self.data_dir).as_data_source(split)
        return self._opened[split]

    def read(self, unit: Examples) -> Iterator[Document]:
        source, start, count = self.open(unit.split), unit.begin, 1
        while start < unit.end:  # several at once as long as they are short
            records = source.__getitems__(range(start, min(start + count, unit.end)))
            texts = [record[self.text_key] for record in records]
            start += len(texts)
            count = min(64, 2 * count) if sum(map(len, texts)) < 1 << 22 else max(1, count // 4)
            for text in filter(None, texts):
                self.position += len(text)
                yield Document(unit.name, text.decode(errors="replace"), 0.0)


class PublishedSet:
    """A text set of tfds by name, such as "lm1b" or "wiki40b/en"; downloaded if its data_dir lacks it."""

    def __init__(self, data: DataConfig):
        self.data, self.name = data, data.dataset
        self.data_dir = str(local_path(data.path, "data.path").resolve()) if data.path else None
        self.reading = ReadingSet(f"data.dataset = {self.name!r}", self.name, self.data_dir, data.text_key)

    @property
    def identity(self) -> list[Any]:
        return [self.name, self.data_dir, self.data.text_key]

    def report_skipped(self) -> None:
        """A set has no files of ours."""

    def places(self) -> None:
        """Its splits are its own."""

    def splits(self, data: DataConfig) -> dict[str, Split]:
        return {name: Split(name) for name in ("train", "validation")}  # the units are of those already

    def units(self) -> list[Examples]:
        builder = self._builder()
        units: list[Examples] = []
        for name in ("train", "validation"):
            split = getattr(self.data, f"{name}_split")
            count = len(open_split(builder, split, f"data.{name}_split"))
            size = max(1, builder.info.splits[split].num_bytes)
            parts = max(1, min(count, -(-size // UNIT)))
            edges = [count * i // parts for i in range(parts + 1)]
            units += [Examples(split, name, a, b, size // parts) for a, b in itertools.pairwise(edges) if a < b]
        return units

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds
        import tensorflow_datasets.text  # registers c4, wiki40b and others, which tfds alone does not

        builder = open_builder(self.name, self.data_dir, "python_source, text_files")
        texts = [name for name, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)]
        if self.data.text_key not in texts:
            use = f"use {' or '.join(texts)}" if texts else "it has none"
            raise UserError(f"data.text_key = {self.data.text_key!r}: no text of {self.name}; {use}")
        return builder


def open_builder(name: str, data_dir: str | None, others: str) -> Any:
    """A set of tfds, which is downloaded if its data_dir lacks it. Raises a UserError, which tells of other sets."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever the set's own code, its download or a missing package of it raises
        raise UserError(
            f"data.dataset = {name!r}: cannot be loaded ({cause(error)}); use {others}, or a tfds set that is prepared "
            f"as array_record in the folder data.path{_moved(data_dir)}"
        ) from None
    return builder


def open_split(builder: Any, split: str, key: str, **how: Any) -> Any:
    """The examples of a split by number. Raises a UserError, which names the key."""
    try:
        source = builder.as_data_source(split, **how)
        len(source)
    except NotImplementedError as error:
        raise UserError(f"{key} = {split!r}: {cause(error)}; use array_record") from None
    except Exception as error:  # tfds raises ValueError and AssertionError, array_record its own
        use = " or ".join(builder.info.splits) or "another data.dataset"
        raise UserError(f"{key} = {split!r}: cannot be read ({cause(error)}); use {use}") from None
    return source


def _moved(folder: str | None) -> str:
    if folder is None or os.path.isdir(folder):
        return ""
    return f"; there is no {shown(folder)}: where it was moved, use --config.data.path=PLACE"


def cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]


SETS: dict[str, Callable[[DataConfig], LocalSet]] = {"python_source": PythonSource, "text_files": TextFiles}


def open_set(data: DataConfig) -> LocalSet | PublishedSet:
    return SETS.get(data.dataset, PublishedSet)(data)
