"""Every form of text is read right, whole or in units; what cannot be read is named; URLs are read through fsspec."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import random

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_corpus import make_config, texts_of
from tests.test_data_files import data_config, documents, texts
from tokenformer_jax.data import readers, units
from tokenformer_jax.data.text import TextFiles
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.errors import UserError

RNG = random.Random(0)
TEXTS = [f"text {i} naïve 中文 🙂 " + "some words\n" * RNG.randrange(9) for i in range(300)]


def zstd(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}


def json_lines(texts: list[str], ascii: bool = False) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=ascii) + "\n" for text in texts).encode()


def write_parquet(path: pathlib.Path, texts: list[str | None], kind: pyarrow.DataType | None = None, rows: int = 1000):
    column = pyarrow.array(texts, kind or pyarrow.string())
    table = pyarrow.table({"id": list(range(len(texts))), "text": column})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".JSONL"])
def test_compressed_files_are_read_as_what_is_in_them(tmp_path, ending, compression):
    if ending == ".txt":
        for i, text in enumerate(TEXTS[:9]):
            (tmp_path / f"{i}.txt{compression}").write_bytes(COMPRESSIONS[compression](text.encode()))
    else:
        path = tmp_path / f"a{ending}{compression if ending == '.jsonl' else compression.upper()}"
        path.write_bytes(COMPRESSIONS[compression](b"\xef\xbb\xbf" + json_lines(TEXTS[:9])))
    assert texts(tmp_path) == sorted(TEXTS[:9])


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_files_may_be_joined(tmp_path, compression):
    halves = [COMPRESSIONS[compression](json_lines(half)) for half in (TEXTS[:150], TEXTS[150:])]
    (tmp_path / f"a.jsonl{compression}").write_bytes(b"".join(halves))
    assert texts(tmp_path) == sorted(TEXTS)


def test_what_zstandard_writes_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    raw = json_lines(TEXTS)
    for name, options in (("a", {"level": 1}), ("b", {"level": 19, "write_checksum": True}), ("c", {"threads": 2})):
        (tmp_path / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor(**options).compress(raw))
    stream = zstandard.ZstdCompressor().compressobj()  # which does not say the size
    (tmp_path / "d.jsonl.zst").write_bytes(stream.compress(raw) + stream.flush())
    assert texts(tmp_path) == sorted(4 * TEXTS)


@pytest.mark.parametrize("compression", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_compressed_file_is_named(tmp_path, compression, damage):
    raw = bytearray(COMPRESSIONS[compression](json_lines(TEXTS)))
    raw[len(raw) // 2] ^= 255 * (damage == "changed")
    raw = {"cut": raw[:-20], "changed": raw, "other": b"plain text, after all " * 9}[damage]
    (tmp_path / f"a.jsonl{compression}").write_bytes(raw)
    try:
        found = documents(tmp_path)
        assert compression == ".zst" and damage == "changed"  # it has a checksum only where it was asked for
        assert [document.text for document in found] != TEXTS
    except UserError as error:
        assert str(error).startswith("data.path = ") and f"a.jsonl{compression} cannot be read (" in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
def test_a_column_of_parquet_is_read(tmp_path, kind):
    write_parquet(tmp_path / "a.parquet", TEXTS, kind, rows=70)
    found = documents(tmp_path)
    assert [document.text for document in found] == TEXTS
    assert [document.line for document in found] == [*range(1, 301)]


def test_what_is_no_text_in_parquet_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", None, "", "b"])
    faults = [str(document) for document in documents(tmp_path) if document.fault]
    assert faults == [f"{tmp_path}/a.parquet:2 ('text' is not text)"]
    (fault,) = documents(tmp_path, data__text_key="content")
    assert fault.fault == "no column 'content', but 'id', 'text'"
    assert {document.fault for document in documents(tmp_path, data__text_key="id")} == {"'id' is not text"}
    raw = pyarrow.array([b"\xff\xfe", b"good"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "a.parquet")
    assert [(document.text, document.fault) for document in documents(tmp_path)] == [("", "not UTF-8"), ("good", "")]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read \("):
        documents(tmp_path)


# Endings that a path says.


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ["txt"]),
        ("*", ["txt"]),
        ("**/*.*", ["txt"]),
        ("*.md", ["md"]),
        ("*.[mc]*", ["cpp", "gz", "md"]),
        ("**/*.py", ["py", "sub"]),
        ("a.md", ["md"]),
        ("sub/*.py", ["sub"]),
        ("*.md.gz", ["gz"]),
        ("*.gz", ["gz"]),
    ],
)
def test_a_path_that_says_an_ending_gets_it(tmp_path, path, expected):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "a.md", "a.py", "a.cpp"):
        (tmp_path / name).write_text(name.removeprefix("a."))
    (tmp_path / "sub" / "b.py").write_text("sub")
    (tmp_path / "a.md.gz").write_bytes(gzip.compress(b"gz"))
    assert texts(f"{tmp_path}/{path}") == expected


def test_json_that_is_asked_for_is_lines(tmp_path):
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(json_lines(TEXTS)))
    (tmp_path / "pretty.json").write_text(json.dumps({"text": "x"}, indent=2))
    assert texts(tmp_path / "*.json.gz") == sorted(TEXTS)
    assert {document.fault for document in documents(tmp_path / "pretty.json")} == {"not JSON"}


# Units: whatever they are cut into, every document is in one of them.


def cut(monkeypatch, size: int, longest: int = 1 << 25, part: int = 1 << 20) -> None:
    """Small units, and texts that are long."""
    monkeypatch.setattr(units, "UNIT", size)
    monkeypatch.setattr(readers, "_LONGEST_TEXT", longest)
    monkeypatch.setattr(readers, "_PART", part)
    monkeypatch.setattr(readers, "_TURN", 3)


@pytest.mark.parametrize("size", [1000, 5000, 10**6])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "jsonl.xz", "parquet", "txt", "mixed"])
def test_units_hold_every_document_once(tmp_path, monkeypatch, form, size):
    names = ["jsonl", "jsonl.zst", "parquet"] if form == "mixed" else [form] * 2
    for i, name in enumerate(names):
        path = tmp_path / f"{i}.{name}"
        if name == "parquet":
            write_parquet(path, TEXTS, rows=70)
        elif name == "txt":
            for j, text in enumerate(TEXTS):
                (tmp_path / f"{i}-{j}.txt").write_text(text)
        else:
            path.write_bytes(COMPRESSIONS[path.suffix if path.suffix != ".jsonl" else ""](json_lines(TEXTS)))
    cut(monkeypatch, size)
    found = TextFiles(data_config(tmp_path))
    assert (len(found.units()) > 1) == (size < 10**6)
    assert sorted(document.text for document in found.documents()) == sorted(len(names) * TEXTS)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(st.lists(st.text("a🙂é\n ", max_size=40), min_size=1, max_size=9), st.integers(1, 60), st.sampled_from("jt"))
def test_parts_of_a_plain_file_join(lines, size, kind):
    with pytest.MonkeyPatch.context() as patch, fsspec.filesystem("memory").open("/a", "wb") as file:
        cut(patch, size, longest=8, part=7)
        raw = json_lines(lines) if kind == "j" else "\n".join(lines).encode()
        file.write(raw)
        file.close()
        ending = ".jsonl" if kind == "j" else ".txt"
        reading = readers.Reading("data.path")
        found = [list(reading.read(unit)) for unit in units.units_of([("memory://a", ending, len(raw))], "text")]
        joined = "".join(document.text for unit in found for document in unit)
        assert joined == ("".join(lines) if kind == "j" else "\n".join(lines))
        assert not any(document.fault for unit in found for document in unit)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_long_text_is_cut_alike_in_any_form(tmp_path, monkeypatch, compression):
    cut(monkeypatch, 10**6, 2000, 300)
    whole = "a line 🙂 of text\n" * 500
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESSIONS[compression](whole.encode()))
    expected = [document.text for document in documents(tmp_path)]
    assert "".join(expected) == whole and max(len(part.encode()) for part in expected) <= 300
    monkeypatch.setattr(readers, "_LONG_LINE", 1000)
    (tmp_path / "lines").mkdir()
    for name, ascii in (("a", False), ("b", True)):
        (tmp_path / "lines" / f"{name}.jsonl{compression}").write_bytes(
            COMPRESSIONS[compression](json_lines([whole], ascii))
        )
    write_parquet(tmp_path / "lines" / "c.parquet", [whole])
    assert [document.text for document in documents(tmp_path / "lines")] == 3 * expected


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": 3, "pad": "PAD"}', "not JSON with text in 'text' ("),
        ('{"other": "PAD"}', "'text' is not text"),
        ('{"text": "PAD"', "not JSON with text in 'text' ("),
        ('["PAD"]', "not JSON with text in 'text' ("),
        ('{"text": "PAD\\ud800"}', "not JSON with text in 'text' ("),
        ('{"pad": "PAD", "text": "good"}', ""),
        ('{"text": "good", "deep": [{"text": "PAD"}]}', ""),
    ],
)
def test_long_lines_are_faulty_like_short_ones(tmp_path, monkeypatch, line, fault):
    monkeypatch.setattr(readers, "_LONG_LINE", 1000)
    (tmp_path / "a.jsonl").write_text(line.replace("PAD", "x" * 2000) + '\n{"text": "next"}\n')
    first, second = documents(tmp_path)
    assert first.fault.startswith(fault) and (first.text, bool(first.fault)) == ("" if fault else "good", bool(fault))
    assert second.text == "next"


# URLs.


@pytest.fixture
def bucket():
    """A bucket of fsspec's own, in the memory of this process."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    for name, raw in {
        "b/data/0.jsonl": json_lines(TEXTS[:9]),
        "b/data/sub/1.jsonl.gz": gzip.compress(json_lines(TEXTS[9:20])),
        "b/data/.git/x.txt": b"hidden",
        "b/data/notes.md": b"notes",
        "b/data/[1].txt": b"named [1]",
    }.items():
        with system.open(f"/{name}", "wb") as file:
            file.write(raw)
    yield system
    system.store.clear()


@pytest.mark.parametrize(
    ("url", "expected", "skipped"),
    [
        ("memory://b/data", [*TEXTS[:20], "named [1]"], ["notes.md"]),
        ("memory://b/data/", [*TEXTS[:20], "named [1]"], ["notes.md"]),
        ("memory://b/data/*", [*TEXTS[:9], "named [1]"], ["notes.md"]),
        ("memory://b/data/**/*.jsonl*", TEXTS[:20], []),
        ("memory://b/data/sub/1.jsonl.gz", TEXTS[9:20], []),
        ("memory://b/data/*.md", ["notes"], []),
        ("memory://b/data/[1].txt", ["named [1]"], []),
        ("memory://b/data/.git/*.txt", ["hidden"], []),
        ("memory://b/data/.git", ["hidden"], []),
    ],
)
def test_a_url_is_read_like_a_path(bucket, url, expected, skipped):
    found = TextFiles(data_config(url))
    assert sorted(document.text for document in found.documents()) == sorted(expected)
    assert found.skipped == skipped


def test_texts_from_a_url_become_tokens_that_other_content_changes(tmp_path, bucket):
    cfg = make_config(tmp_path, data__path="memory://b/data")
    corpus = prepare(cfg)
    assert sorted(texts_of(corpus, corpus.train) + texts_of(corpus, corpus.validation)) == sorted(
        [*TEXTS[:20], "named [1]"]
    )
    assert json.loads(cfg.to_json())["data"]["path"] == "memory://b/data"
    with bucket.open("/b/data/0.jsonl", "wb") as file:
        file.write(json_lines(TEXTS[20:29]))
    assert prepare(cfg).train.fingerprint != corpus.train.fingerprint


def test_a_file_url_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    assert texts(f"file://{tmp_path}") == sorted(TEXTS)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://b/none", "matches no"),
        ("memory://b/data/*.csv", "matches no"),
        ("nosuch://b/x", "cannot be listed"),
        ("gs:/bucket", "data.path = 'gs:/bucket'"),
    ],
)
def test_a_url_without_data_is_refused_in_one_line(bucket, url, message):
    with pytest.raises(UserError, match=r"^data\.path = ") as error:
        TextFiles(data_config(url))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
    def missing(_: str):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"Please install gcsfs.*pip install 'tokenformer-jax\[gcs\]'"):
        TextFiles(data_config("gs://bucket/x"))


def test_a_bucket_says_what_its_content_is(bucket, monkeypatch):
    """Where it does, and not by the time, files that were copied are the same."""
    info = type(bucket).info

    def with_hash(self, path, **others):
        found = info(self, path, **others)
        return found | {"etag": "e" + os.path.basename(path)} if found["type"] == "file" else found

    monkeypatch.setattr(type(bucket), "info", with_hash)
    (file,) = TextFiles(data_config("memory://b/data/0.jsonl")).files
    assert file.stamp == "e0.jsonl"
