"""Data sets of text. `identity` changes when the data does; `build` gives a prepared tfds builder."""

import contextlib
import hashlib
import io
import os
import pathlib
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from tokenformer_jax.config import DataConfig
from tokenformer_jax.data.folders import find
from tokenformer_jax.errors import UserError, listed, shown
from tokenformer_jax.files import local_path, parse_json

Path = pathlib.Path

_VALIDATION_PART = 0.05  # of the documents of our own sets
_LONGEST_LINE = 256 << 20  # bytes of a .jsonl, which must be in memory to be parsed
_LONGEST_TEXT = 32 << 20  # bytes of a document; those of a longer text become several, so that memory is bounded
_PART = 1 << 20  # bytes of each of these
_NAMED = 3  # of the documents that are skipped
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    path: str
    text: str  # empty where there is a fault
    place: float  # a hash in [0, 1); the lowest 5 % are for validation
    fault: str = ""  # why it cannot be read
    line: int = 0  # of the file, from 1; 0: all of it
    part: int = 0  # of a text that is cut, from 1

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        return shown(f"{self.path}{line}") + (f" ({self.fault})" if self.fault else "")


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

    def report_skipped(self) -> None:
        """Says which of the files are not read."""

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            try:
                yield from self.read(file)
            except OSError as error:
                raise UserError(f"{self}: {shown(file)} cannot be read ({error.strerror})") from None

    def build(self, folder: Path) -> Any:
        split_at, single = self._survey()
        splits = {name: self._examples(name, split_at, single) for name in ("train", "validation")}
        return prepare_builder(self.name, folder, splits)

    def _survey(self) -> tuple[float, bool]:
        """Reports what is skipped. Returns the place that parts the splits, and whether all documents are one."""
        unreadable, empty, cut, low, high = 0, 0, 0, 1.0, 0.0
        first: list[Document] = []
        first_cut = None
        for document in self.documents():
            if document.fault:
                unreadable += 1
                first += [document] if len(first) < _NAMED else []
            elif not document.text.strip():
                empty += 1
            else:
                low, high = min(low, document.place), max(high, document.place)
            if document.part == 1:
                cut += 1
                first_cut = first_cut or document
        more = f" and {unreadable - len(first)} more" if unreadable > len(first) else ""
        faults = ", ".join(map(str, first)) + more
        if low > high:
            raise UserError(
                f"{self}: holds no text that can be used{': ' * bool(faults)}{faults}; use UTF-8 in .txt, "
                "or .jsonl whose key --config.data.text_key=KEY holds the text"
            )
        if unreadable or empty:
            which = f" ({faults})" if faults else ""
            print(f"{self}: skipped {unreadable} unreadable documents{which} and {empty} empty ones", file=sys.stderr)
        if cut:
            print(
                f"{self}: cut {cut} texts of more than {_LONGEST_TEXT >> 20} MiB into documents of {_PART >> 20} MiB, "
                f"after line ends where there are any; the first is {first_cut}",
                file=sys.stderr,
            )
        # Few documents may all fall on one side: then the outermost goes alone to the other.
        split_at = min(max(_VALIDATION_PART, np.nextafter(low, 1)), high)
        return split_at, low == high

    def _examples(self, split: str, split_at: float, single: bool) -> Iterator[tuple[int, dict[str, str]]]:
        for key, document in enumerate(self.documents()):
            text = document.text
            if not text.strip():
                continue
            if single:  # nothing to choose from: its end is for validation
                cut = int((1 - _VALIDATION_PART) * len(text))
                text = text[:cut] if split == "train" else text[cut:]
            elif (document.place < split_at) != (split == "validation"):
                continue
            yield key, {"text": text, "path": document.path}


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
        text = _decode(file.read_bytes())
        yield Document(path, text or "", _place(path), "not UTF-8" if text is None else "")


class TextFiles(_LocalFiles):
    """A folder, file or glob of .txt (each a document) and .jsonl (each line one); split by a hash of the text."""

    name = "text_files"
    ENDINGS = (".txt", ".jsonl")

    def __init__(self, data: DataConfig):
        self.path, self.text_key = data.path, data.text_key
        path = local_path(data.path, "data.path", any_bytes=True)
        if not data.path:
            raise UserError(f"{self}: names no data; use --config.data.path=PLACE, a folder, file or glob")
        found, self.skipped = find(path, self.ENDINGS, local_path(data.cache_dir, "data.cache_dir"))
        self.endings = {file.path: file.ending for file in found}
        self.files = list(self.endings)
        if not found:
            others = f", but {len(self.skipped)} others ({listed(self._skipped)})" if self.skipped else ""
            place = "" if path.is_absolute() else f" in {os.getcwd()}"
            raise UserError(
                f"{self}: matches no .txt or .jsonl file{place}{others}; use a folder, file or glob of such files "
                "(where they were moved, --config.data.path=PLACE says so)"
            )

    def __str__(self) -> str:
        return f"data.path = {self.path!r}"

    @property
    def _skipped(self) -> list[str]:
        return [shown(name) for name in self.skipped]

    def report_skipped(self) -> None:
        if self.skipped:
            count = len(self.skipped)
            print(f"{self}: skipped {count} files, not .txt or .jsonl: {listed(self._skipped)}", file=sys.stderr)

    @property
    def identity(self) -> list[Any]:
        # A link whose ending is not that of its file decides how it is read.
        kinds = [[ending] if file.suffix != ending else [] for file, ending in self.endings.items()]
        return [self.text_key, *([*stat, *kind] for stat, kind in zip(super().identity, kinds, strict=True))]

    def read(self, file: Path) -> Iterator[Document]:
        path = os.fsencode(file).decode(errors="backslashreplace")  # names need not be UTF-8
        with file.open("rb") as content:
            if self.endings[file] == ".jsonl":
                for number, line in enumerate(_lines(content), 1):
                    text, fault = _json_text(line, self.text_key) if line is not None else ("", _TOO_LONG)
                    del line
                    raw = text.encode()
                    if len(raw) <= _LONGEST_TEXT:
                        yield Document(path, text, _place(text), fault, number)
                    else:
                        del text
                        for part, cut in enumerate(_parts(io.BytesIO(raw)), 1):
                            yield Document(path, cut.decode(), _place(cut.decode()), "", number, part)
            else:
                if content.read(len(_BYTE_ORDER_MARK)) != _BYTE_ORDER_MARK:
                    content.seek(0)
                whole = os.fstat(content.fileno()).st_size <= _LONGEST_TEXT
                for part, raw in enumerate([content.read()] if whole else _parts(content), 1):
                    found = _decode(raw)
                    fault = "not UTF-8" if found is None else ""
                    yield Document(path, found or "", _place(found or ""), fault, part=0 if whole else part)


_TOO_LONG = f"longer than {_LONGEST_LINE >> 20} MiB"


def _lines(content: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long to be held."""
    while line := content.readline(_LONGEST_LINE + 1):
        if len(line) <= _LONGEST_LINE:
            yield line
        else:
            while line and not line.endswith(b"\n"):
                line = content.readline(_PART)
            yield None


def _parts(content: BinaryIO) -> Iterator[bytes]:
    """Cuts a text of UTF-8 after line ends or, where there are none, after characters."""
    rest = b""
    while raw := content.read(_PART):
        rest += raw
        while len(rest) > _PART:
            cut = rest.rfind(b"\n", _PART // 2, _PART) + 1 or _PART
            while rest[cut] & 0xC0 == 0x80 and cut > _PART - 4:
                cut -= 1
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def _decode(raw: bytes) -> str | None:
    try:
        return raw.removeprefix(_BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError:
        return None


def _json_text(line: bytes, key: str) -> tuple[str, str]:
    """The text of a line of JSON, or why there is none."""
    line = line.removeprefix(_BYTE_ORDER_MARK)
    if not line.strip():
        return "", ""
    try:
        tree = parse_json(line)
    except ValueError:
        return "", "not JSON"
    if not isinstance(tree, dict):
        return "", "not {…} with keys"
    if key not in tree:
        return "", f"no key {key!r}, but {listed([repr(other)[:40] for other in tree]) or 'none'}"
    text = tree[key]
    if not isinstance(text, str):
        return "", f"{key!r} is not text"
    try:
        text.encode()  # JSON can spell lone surrogates, which are no text
    except UnicodeEncodeError:
        return "", f"{key!r} is not Unicode"
    return text, ""


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
        self.data_dir = str(local_path(data.path, "data.path").resolve()) if data.path else None

    @property
    def identity(self) -> list[Any]:
        return [self.name, self.data_dir, self.text_feature]

    def report_skipped(self) -> None:
        """A set has no files of ours."""

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
                f"{_moved(self.data_dir)}"
            ) from None
        texts = [name for name, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)]
        if self.text_feature not in texts:
            would_do = " or ".join(texts) or "none"
            raise UserError(f"data.text_key = {self.text_feature!r}: no text of {self.name}; {would_do} would do")
        return builder


def _moved(folder: str | None) -> str:
    if folder is None or os.path.isdir(folder):
        return ""
    return f"; there is no {shown(folder)}: where it was moved, use --config.data.path=PLACE"


def cause(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]


LOCAL_SETS = {"python_source": PythonSource, "text_files": TextFiles}
