"""The documents of files: plain or compressed text, lines of JSON, and parquet, of any size in bounded memory."""

import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.json

from tokenformer_jax.data.units import (
    COMPRESSIONS,
    PARQUET,
    Unit,
    column_size,
    open_binary,
    parquet_file,
    without_compression,
)
from tokenformer_jax.errors import UserError, listed, shown
from tokenformer_jax.files import parse_json

LINES = (".jsonl", ".json")

_LONGEST_LINE = 256 << 20  # bytes of a .jsonl, which must be in memory to be parsed
_LONG_LINE = 8 << 20  # bytes; such lines are parsed without being decoded, which may cost four bytes a character
_LONGEST_TEXT = 32 << 20  # bytes of a document; those of a longer text become several, so that memory is bounded
_PART = 1 << 20  # bytes of each of these
_TURN = 64  # consecutive lines of a compressed file that go to the same unit
_BATCH = 1 << 22  # bytes of a parquet column that are read at once
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TOO_LONG = f"longer than {_LONGEST_LINE >> 20} MiB"


class Document(NamedTuple):
    path: str
    text: str  # empty where there is a fault
    place: float  # a hash in [0, 1); the lowest 5 % are for validation
    fault: str = ""  # why it cannot be read
    line: int = 0  # of the file, or row, from 1; 0: all of it
    part: int = 0  # of a text that is cut, from 1
    byte: int = 0  # of a file that is not read from its beginning

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else f", byte {self.byte}" if self.byte else ""
        return shown(f"{self.path}{line}") + (f" ({self.fault})" if self.fault else "")


def place_of(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


_DAMAGES = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)


@dataclass
class Reading:
    """Reads units, and counts what it has read."""

    label: str  # the key and value that errors name
    text_key: str = "text"  # key of lines of JSON, or column
    root: str = ""  # of files that are split by a hash of their path below it, and named so
    position: int = 0  # bytes

    def read(self, unit: Unit) -> Iterator[Document]:
        """The documents of a unit, in an order that is always the same. Raises a UserError where a file is damaged."""
        for path, ending in unit.files:
            try:
                yield from self._file(path, ending, unit)
            except _DAMAGES as error:
                reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"{self.label}: {shown(path)} cannot be read ({reason}); mend it or take it away"
                ) from None

    def _file(self, path: str, ending: str, unit: Unit) -> Iterator[Document]:
        kind, compression = without_compression(ending)
        name = os.fsencode(path).decode(errors="backslashreplace")  # names need not be UTF-8
        with open_binary(path) as raw:
            if kind == PARQUET:
                yield from self._parquet(name, raw, unit)
                return
            content: Any = _Counted(self, raw, unit.turns)
            if compression:
                content = COMPRESSIONS[compression].open(io.BufferedReader(content, _PART))
            content = io.BufferedReader(content, _PART)
            if kind in LINES:
                yield from self._lines(name, content, unit)
            else:
                yield from self._text(name, content, unit)

    def _lines(self, name: str, content: Any, unit: Unit) -> Iterator[Document]:
        begin, number = unit.begin, 0
        if begin:  # the line that holds the byte before belongs to the unit before
            content.seek(begin - 1)
            begin += sum(len(cut) for cut in _rest_of_line(content)) - 1
        for start, line in _lines(content, begin):
            if unit.end and start >= unit.end:
                return
            number += 1
            if unit.turns > 1 and (number - 1) // _TURN % unit.turns != unit.turn:
                continue
            where: dict[str, int] = {"byte": start} if unit.begin else {"line": number}
            if line is None:
                yield Document(name, "", 0.0, _TOO_LONG, **where)
                continue
            text, fault = _json_text(line, self.text_key)
            del line
            yield from _documents(name, text, fault, where)

    def _text(self, name: str, content: Any, unit: Unit) -> Iterator[Document]:
        stop = None
        if unit.end:
            stop, start = _cut_after(content, unit.end), _cut_after(content, unit.begin)
            content.seek(start)
            stop -= start
        head = content.read(_LONGEST_TEXT + 1 if stop is None else min(stop, _LONGEST_TEXT + 1))
        whole = len(head) <= _LONGEST_TEXT and not unit.end
        head = head if unit.begin else head.removeprefix(_BYTE_ORDER_MARK)
        if whole:
            if not unit.turn:
                yield self._plain(name, head, 0)
            return
        for part, raw in enumerate(_parts(content, head, stop), 1):
            if part % unit.turns == unit.turn:
                yield self._plain(name, raw, part)

    def _plain(self, name: str, raw: bytes, part: int) -> Document:
        text, fault = _decoded(raw)
        if self.root:
            name = os.path.relpath(name, self.root).replace(os.sep, "/")
        return Document(name, text, place_of(name if self.root else text), fault, part=part)

    def _parquet(self, name: str, raw: Any, unit: Unit) -> Iterator[Document]:
        with parquet_file(raw) as file:
            columns = file.schema_arrow.names
            for i in range(file.num_row_groups) if unit.group < 0 else [unit.group]:
                group = file.metadata.row_group(i)
                number = sum(file.metadata.row_group(k).num_rows for k in range(i))
                if self.text_key not in columns:
                    have = listed([repr(column)[:40] for column in columns])
                    yield Document(name, "", 0.0, f"no column {self.text_key!r}, but {have}", number + 1)
                    continue
                rows = max(1, min(1024, _BATCH * group.num_rows // max(1, column_size(group, self.text_key))))
                row, end = 0, unit.end or group.num_rows
                for batch in file.iter_batches(rows, [i], [self.text_key], use_threads=False):
                    first, last = max(row, unit.begin), min(row + len(batch), end)
                    for value in batch.column(0)[first - row : max(first, last) - row] if first < last else ():
                        first += 1
                        text, fault = _value_text(value, self.text_key)
                        yield from _documents(name, text, fault, {"line": number + first})
                    row += len(batch)
                    self.position += batch.nbytes if unit.end and row > unit.begin else 0
                    if row >= end:
                        break
        self.position += 0 if unit.end else raw.seek(0, os.SEEK_END)


class _Counted(io.RawIOBase):
    """A file that adds what is read of it to a reading's position; of a file that several read, its share."""

    def __init__(self, reading: Reading, raw: Any, share: int):
        self.reading, self.raw, self.share = reading, raw, share

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()

    def readinto(self, buffer: Any) -> int:
        count = self.raw.readinto(buffer)
        self.reading.position += count // self.share
        return count


def _documents(name: str, text: Any, fault: str, where: dict[str, int]) -> Iterator[Document]:
    """The document of a text, given as str or as a buffer of Arrow, or several where it is too long."""
    raw = pyarrow.py_buffer(text.encode()) if isinstance(text, str) else text
    if raw.size <= _LONGEST_TEXT:
        if not isinstance(text, str):
            text, fault = _decoded(raw.to_pybytes())
        yield Document(name, text, place_of(text), fault, **where)
        return
    del text
    for part, cut in enumerate(_parts(pyarrow.BufferReader(raw)), 1):
        text, fault = _decoded(cut)
        yield Document(name, text, place_of(text), fault, part=part, **where)


def _decoded(raw: bytes) -> tuple[str, str]:
    try:
        return raw.decode(), ""
    except UnicodeDecodeError:
        return "", "not UTF-8"


def _lines(content: BinaryIO, start: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file and where they start; None for one that is too long to be held."""
    while line := content.readline(_LONGEST_LINE + 1):
        begin, start = start, start + len(line)
        if len(line) <= _LONGEST_LINE:
            yield begin, line
        else:
            if not line.endswith(b"\n"):
                start += sum(map(len, _rest_of_line(content)))
            yield begin, None


def _rest_of_line(content: BinaryIO) -> Iterator[bytes]:
    while cut := content.readline(_PART):
        yield cut
        if cut.endswith(b"\n"):
            return


def _cut_after(content: BinaryIO, place: int) -> int:
    """Where a text may be cut at a place or after it: after a line's end, or else a character."""
    if not place:
        return 0
    content.seek(place)
    near = content.read(_PART)
    line = near.find(b"\n") + 1
    return place + (line or _characters(near[:4]))


def _characters(raw: bytes) -> int:
    """How many bytes belong to the character before."""
    return next((i for i, byte in enumerate(raw) if byte & 0xC0 != 0x80), len(raw))


def _parts(content: BinaryIO, rest: bytes = b"", length: int | None = None) -> Iterator[bytes]:
    """Cuts a text of UTF-8, of which `rest` was read, after line ends or, where there are none, after characters."""
    left = (length - len(rest)) if length is not None else None
    whole, start = rest, 0
    while True:
        while len(whole) - start > _PART:
            cut = whole.rfind(b"\n", start + _PART // 2, start + _PART) + 1 or start + _PART
            while whole[cut] & 0xC0 == 0x80 and cut > start + _PART - 4:
                cut -= 1
            yield whole[start:cut]
            start = cut
        raw = content.read(_PART if left is None else min(left, _PART))
        if not raw:
            break
        left = None if left is None else left - len(raw)
        whole, start = whole[start:] + raw, 0
    if start < len(whole):
        yield whole[start:]


def _json_text(line: bytes, key: str) -> tuple[Any, str]:
    """The text of a line of JSON, or why there is none."""
    line = line.removeprefix(_BYTE_ORDER_MARK)
    if not line.strip():
        return "", ""
    if len(line) > _LONG_LINE:
        return _long_json_text(line, key)
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


def _long_json_text(line: bytes, key: str) -> tuple[Any, str]:
    try:
        table = pyarrow.json.read_json(
            pyarrow.BufferReader(line),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(line) + 1),
            pyarrow.json.ParseOptions(
                pyarrow.schema([(key, pyarrow.string())]), newlines_in_values=False, unexpected_field_behavior="ignore"
            ),
        )
    except pyarrow.ArrowInvalid as error:
        return "", f"not JSON with text in {key!r} ({str(error).partition(chr(10))[0][:80]})"
    return _value_text(table.column(0)[0], key)


def _value_text(value: Any, key: str) -> tuple[Any, str]:
    """The text of a value of Arrow, as a buffer, or why there is none."""
    kind = value.type
    if pyarrow.types.is_dictionary(kind):
        value = value.value if value.is_valid else value
        kind = kind.value_type
    if not value.is_valid or kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        return "", f"{key!r} is not text"
    return value.as_buffer(), ""
