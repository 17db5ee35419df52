"""Data sets of text. `identity` changes when the data does; `build` gives a prepared tfds builder."""

import contextlib
import glob
import hashlib
import io
import os
import pathlib
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tokenformer_jax.config import DataConfig
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import parse_json

Path = pathlib.Path

_VALIDATION_PART = 0.05  # of the documents of our own sets


class Document(NamedTuple):
    path: str
    text: str | None  # None: not UTF-8, not JSON, or without the key
    place: float  # a hash in [0, 1); the lowest 5 % are for validation


class _LocalFiles:
    """Files of this machine as a tfds set with the features `text` and `path`."""

    name: ClassVar[str]
    text_feature = "text"
    files: list[Path]

    @property
    def identity(self) -> list[Any]:
        stats = [(str(file), file.stat()) for file in self.files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def read(self, file: Path) -> Iterator[Document]:
        raise NotImplementedError

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            try:
                yield from self.read(file)
            except OSError as error:
                raise UserError(f"{self}: {file} cannot be read ({error.strerror})") from None

    def build(self, folder: Path) -> Any:
        split_at, single = self._survey()
        splits = {name: self._examples(name, split_at, single) for name in ("train", "validation")}
        return prepare_builder(self.name, folder, splits)

    def _survey(self) -> tuple[float, bool]:
        """Reports what is skipped. Returns the place that parts the splits, and whether all documents are one."""
        unreadable, empty, low, high = 0, 0, 1.0, 0.0
        for document in self.documents():
            if document.text is None:
                unreadable += 1
            elif not document.text.strip():
                empty += 1
            else:
                low, high = min(low, document.place), max(high, document.place)
        if unreadable or empty:
            print(
                f"{self}: skipped {unreadable} unreadable documents (not UTF-8, not JSON, or without data.text_key) "
                f"and {empty} empty ones",
                file=sys.stderr,
            )
        if low > high:
            raise UserError(
                f"{self}: holds no text that can be used; UTF-8 in .txt, or .jsonl with data.text_key, would do"
            )
        # Few documents may all fall on one side: then the outermost goes alone to the other.
        split_at = min(max(_VALIDATION_PART, np.nextafter(low, 1)), high)
        return split_at, low == high

    def _examples(self, split: str, split_at: float, single: bool) -> Iterator[tuple[int, dict[str, str]]]:
        for key, (path, text, place) in enumerate(self.documents()):
            if text is None or not text.strip():
                continue
            if single:  # nothing to choose from: its end is for validation
                cut = int((1 - _VALIDATION_PART) * len(text))
                text = text[:cut] if split == "train" else text[cut:]
            elif (place < split_at) != (split == "validation"):
                continue
            yield key, {"text": text, "path": path}


class PythonSource(_LocalFiles):
    """The running interpreter's standard library, without its tests; split by a hash of the relative path."""

    name = "python_source"
    _LEFT_OUT: ClassVar = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

    def __init__(self, data: DataConfig):
        self.root = Path(sysconfig.get_path("stdlib"))
        self.files = []
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = set(subfolders) - self._LEFT_OUT
            files = [Path(folder, name) for name in names if name.endswith(".py")]
            self.files += [file for file in files if file.is_file() and file.stat().st_size]  # many are empty
        self.files.sort()

    def __str__(self) -> str:
        return f"data.dataset = {self.name!r}: {self.root}"

    def read(self, file: Path) -> Iterator[Document]:
        path = file.relative_to(self.root).as_posix()
        yield Document(path, _decode(file.read_bytes()), _place(path))


class TextFiles(_LocalFiles):
    """A folder, file or glob of .txt (each a document) and .jsonl (each line one); split by a hash of the text."""

    name = "text_files"

    def __init__(self, data: DataConfig):
        self.path, self.text_key = data.path, data.text_key
        path = Path(data.path).expanduser()
        found = path.rglob("*") if data.path and path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        self.files = sorted(file.resolve() for file in found if file.suffix in (".txt", ".jsonl") and file.is_file())
        if not self.files:
            raise UserError(f"{self}: matches no .txt or .jsonl file; a folder, file or glob of them would do")

    def __str__(self) -> str:
        return f"data.path = {self.path!r}"

    @property
    def identity(self) -> list[Any]:
        return [self.text_key, *super().identity]

    def read(self, file: Path) -> Iterator[Document]:
        with file.open("rb") as content:
            for part in content if file.suffix == ".jsonl" else [content.read()]:
                text = _json_text(part, self.text_key) if file.suffix == ".jsonl" else _decode(part)
                yield Document(str(file), text, _place(text or ""))


def _decode(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _json_text(line: bytes, key: str) -> str | None:
    if not line.strip():
        return ""
    try:
        text = parse_json(line)[key]
        text.encode()  # JSON can spell lone surrogates, which are no text
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return text


def _place(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def prepare_builder(name: str, folder: Path, splits: dict[str, Iterator[tuple[int, dict[str, str]]]]) -> Any:
    """Writes examples as the tfds set `name` into the folder, unless it is there."""
    import tensorflow_datasets as tfds  # takes half a second, which a run on prepared tokens saves

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # there are no download checksums beside this file to look for

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"text": tfds.features.Text(), "path": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return splits

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # abstract in tfds; the splits are generators already

    Builder.name = name
    for leftover in folder.glob(f"{name}/incomplete.*"):  # of a preparation that was killed
        shutil.rmtree(leftover)
    builder = Builder(data_dir=folder, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # of a download, which this is not
        builder.download_and_prepare()
    return builder


class PublishedSet:
    """A text set of tfds by name, such as "lm1b" or "wiki40b/en"; downloaded if its data_dir lacks it."""

    def __init__(self, data: DataConfig):
        self.name, self.text_feature = data.dataset, data.text_key
        self.data_dir = str(Path(data.path).expanduser().resolve()) if data.path else None

    @property
    def identity(self) -> list[Any]:
        return [self.name, self.data_dir, self.text_feature]

    def build(self, folder: Path) -> Any:
        import tensorflow_datasets as tfds
        import tensorflow_datasets.text  # registers c4, wiki40b and others, which tfds alone does not

        key = f"data.dataset = {self.name!r}"
        try:
            builder = tfds.builder(self.name, data_dir=self.data_dir)
            with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command
                builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # whatever the set's own code, its download or a missing package of it raises
            raise UserError(
                f"{key}: cannot be loaded ({cause(error)}); python_source, text_files, "
                "or a tfds set that is prepared as array_record in the folder data.path would do"
            ) from None
        texts = [name for name, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)]
        if self.text_feature not in texts:
            would_do = " or ".join(texts) or "none"
            raise UserError(f"data.text_key = {self.text_feature!r}: no text of {self.name}; {would_do} would do")
        return builder


def cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]


LOCAL_SETS = {"python_source": PythonSource, "text_files": TextFiles}
