"""Which files a data folder holds, what of them is read and what is said, and paths of every kind."""

import json
import os
import pathlib
import time

import numpy as np
import pytest

from tests.commands import call, complaint
from tests.helpers import tiny_tree
from tests.test_corpus import make_config, texts_of
from tokenformer_jax.config import DataConfig, read_config
from tokenformer_jax.data import readers
from tokenformer_jax.data.text import Document, PythonSource, TextFiles
from tokenformer_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.report import named_runs
from tokenformer_jax.files import local_path

NOT_UTF8 = os.fsdecode(b"\xff\xfe.txt")


def data_config(path: pathlib.Path | str, **others: str) -> DataConfig:
    return make_config(pathlib.Path("/nowhere"), data__path=str(path), **others).data


def documents(path: pathlib.Path | str, **others: str) -> list[Document]:
    return list(TextFiles(data_config(path, **others)).documents())


def texts(path: pathlib.Path | str, **others: str) -> list[str]:
    return sorted(document.text for document in documents(path, **others))


def write(folder: pathlib.Path, *files: str) -> pathlib.Path:
    """Writes files, each given as NAME=TEXT."""
    for file in files:
        name, _, word = file.partition("=")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": word}) + "\n" if path.suffix == ".jsonl" else word)
    return folder


# Files that are not data.


@pytest.mark.parametrize("form", ["", "/*", "/**", "/**/*", "/**/*.*"])
def test_hidden_files_are_not_read(tmp_path, form):
    folder = write(tmp_path, "a.jsonl=a", ".ipynb_checkpoints/a.jsonl=b", ".a.txt=c", ".git/x/y.txt=d")
    (folder / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07 of a Mac")
    (folder / ".sub").symlink_to(write(tmp_path / ".elsewhere", "e.txt=e"))
    assert texts(f"{folder}{form}") == ["a"]


@pytest.mark.parametrize("named", [".git/x.txt", ".git", ".git/*.txt", ".g*/*"])
def test_hidden_files_that_the_path_names_are_read(tmp_path, named):
    (write(tmp_path, "a.txt=a") / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("b")
    assert texts(tmp_path / named) == ["b"]


def write_run(folder: pathlib.Path) -> None:
    """The files of a run."""
    write(folder, "config.json={}", "environment.json={}", "metrics.jsonl=m", "checkpoints/2/commit_success.txt=c")
    (folder / "checkpoints" / "2" / "commit_success.txt").write_text("c")
    (folder / ".lock").write_text("process 1")
    (folder / "notes.txt").write_text("notes of the run")


@pytest.mark.parametrize("form", ["", "/**", "/**/*.txt", "/*/**/*.txt"])
@pytest.mark.parametrize("lost", ["", "config.json", "metrics.jsonl", ".lock"])
def test_a_run_inside_the_data_is_not_data(tmp_path, form, lost):
    write(tmp_path, "sub/a.txt=a")
    before = TextFiles(data_config(f"{tmp_path}{form}"))
    write_run(tmp_path / "runs" / "W")
    if lost:
        (tmp_path / "runs" / "W" / lost).unlink()
    (tmp_path / "linked").symlink_to(tmp_path / "runs" / "W")
    after = TextFiles(data_config(f"{tmp_path}{form}"))
    assert after.identity == before.identity and after.skipped == before.skipped == []


def test_the_files_of_a_run_are_not_data_where_its_folder_is_named_nor_those_of_a_moved_checkpoint(tmp_path):
    write_run(tmp_path / "W")
    assert texts(tmp_path / "W") == texts(tmp_path / "W" / "*") == ["notes of the run"]
    (tmp_path / "W" / "checkpoints").rename(tmp_path / "best")
    write(tmp_path / "best", "a.txt=a")
    assert texts(tmp_path / "best") == ["a"]


@pytest.mark.parametrize("cache", ["cache", ".", "sub/cache", "link"])
def test_prepared_data_inside_the_data_are_not_data_and_all_else_there_is(tmp_path, cache):
    write(tmp_path, "texts/a.txt=" + "one two three " * 30)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    paths = {"data__path": str(tmp_path), "data__cache_dir": str(tmp_path / cache)}
    cfg = make_config(tmp_path, model__context_length=2, **paths)
    before = TextFiles(cfg.data).identity
    prepare(cfg)
    (prepared,) = (tmp_path / cache).glob("text_files-*")
    write(prepared, "b.txt=b")
    after = TextFiles(cfg.data)
    assert after.identity == before and after.skipped == []
    write(tmp_path / cache, "c.txt=c")
    assert len(TextFiles(cfg.data).files) == 2


# Links.


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["b.jsonl", "sub/a.jsonl", "0.txt"])
def test_a_file_of_several_names_is_read_once(tmp_path, link, name):
    write(tmp_path / "d", "a.jsonl=a")
    alone = TextFiles(data_config(tmp_path / "d")).identity
    (tmp_path / "d" / "sub").mkdir()
    link(tmp_path / "d" / "a.jsonl", tmp_path / "d" / name)
    assert len(documents(tmp_path / "d")) == len(documents(tmp_path / "d/**")) == 1
    if link is os.symlink:
        assert TextFiles(data_config(tmp_path / "d")).identity == alone


@pytest.mark.parametrize("form", ["", "/**", "/**/*", "/**/*.txt", "/../d/**/*.txt"])
@pytest.mark.parametrize("target", ["elsewhere", "elsewhere/deep", "d/own"])
def test_a_folder_and_a_glob_follow_the_same_links(tmp_path, form, target):
    write(tmp_path, "d/a.txt=a", "d/own/b.txt=b", "elsewhere/c.txt=c", "elsewhere/deep/d.txt=d")
    (tmp_path / "d" / "sub").symlink_to(tmp_path / target)
    (tmp_path / "d" / "own" / "circle").symlink_to(tmp_path / "d")
    (tmp_path / "elsewhere" / "mutual").symlink_to(tmp_path / "d")
    beside = {"elsewhere": ["c", "d"], "elsewhere/deep": ["d"], "d/own": []}[target]
    assert texts(f"{tmp_path}/d{form}") == ["a", "b", *beside]


def test_circles_of_links_end(tmp_path):
    folders = [tmp_path / "d" / str(i) for i in range(8)]
    for folder in folders:
        write(folder, f"a.txt={folder.name}")
    for folder in folders:
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    assert texts(tmp_path / "d") == texts(tmp_path / "d/**/*.txt") == texts(tmp_path / "d/0/**") == list("01234567")


@pytest.mark.parametrize(("name", "expected"), [("a.jsonl", "word"), ("a.txt", '{"text": "word"}\n')])
def test_a_link_is_read_by_its_own_ending(tmp_path, name, expected):
    """As in caches of downloads, whose files are named by their hashes."""
    write(tmp_path, "blobs/x.jsonl=word")
    (tmp_path / "blobs" / "x.jsonl").rename(tmp_path / "blobs" / "0f3a")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / name).symlink_to("../blobs/0f3a")
    assert texts(tmp_path / "d") == texts(tmp_path / "d" / name) == [expected]


# What is skipped is said.


def test_files_that_are_not_read_are_named_and_counted(tmp_path, capfd):
    write(tmp_path, "one.txt=a", "b.jsonl.lz4=b", "C.JSONL=c", "d.json=d", "e.csv.gz=e", "sub/f.TXT=f")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "C.JSONL").write_text('{"text": "c"}')
    found = TextFiles(data_config(tmp_path))
    assert sorted(document.text for document in found.documents()) == ["a", "c", "f"]
    found.report_skipped()
    said = capfd.readouterr().err
    assert "skipped 6 files, not .txt, .jsonl or .parquet: b.jsonl.lz4, d.json, e.csv.gz, " in said
    for one in ("gone.txt (a link to nothing)", "pipe.txt (no regular file)", "self.jsonl (a link to nothing)"):
        assert one in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("given", ["", "/*", "/**", "/*.*"])
def test_a_folder_without_data_says_what_it_holds(tmp_path, given):
    write(tmp_path, "a.md=a", "a.json=a")
    with pytest.raises(
        UserError, match=r"^data\.path = .* matches no \.txt, \.jsonl or \.parquet file.* others \(a\."
    ) as error:
        TextFiles(data_config(f"{tmp_path}{given}"))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads all")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    write(tmp_path, "a.txt=a", "sub/b.txt=b")
    (tmp_path / "sub").chmod(0)
    assert TextFiles(data_config(tmp_path)).skipped == ["sub (Permission denied)"]
    (tmp_path / "sub").chmod(0o700)


def test_the_first_unreadable_documents_are_named_with_why(tmp_path, capfd):
    lines = ['{"text": "as good"}', "{", '{"content": "x", "id": 1}', '{"text": 3}', "[1]", '{"text": "\\ud800"}', ""]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.jsonl").write_text("\n".join([*lines, '{"text": "good"}\n' * 20]))
    faults = [document.fault for document in documents(tmp_path / "texts") if document.fault]
    expected = ["not JSON", "no key 'text', but 'content', 'id'", "'text' is not text", "not {…} with keys"]
    assert faults == [*expected, "'text' is not Unicode"]
    (tmp_path / "texts" / "a.txt").write_bytes(b"\xff")
    prepare(make_config(tmp_path, model__context_length=1))
    said = capfd.readouterr().err
    assert "skipped 6 unreadable documents (" in said and " and 3 more) and 1 empty ones" in said
    assert f"{tmp_path}/texts/a.txt (not UTF-8), {tmp_path}/texts/b.jsonl:2 (not JSON), " in said


def test_a_wrong_text_key_is_answered_with_those_that_there_are(tmp_path):
    write(tmp_path / "texts", "a.jsonl=" + "words " * 50)
    with pytest.raises(UserError, match=r"a\.jsonl:1 \(no key 'content', but 'text'\).*--config\.data\.text_key=KEY"):
        prepare(make_config(tmp_path, data__text_key="content"))


@pytest.mark.parametrize("parts", [["no"], ["a" * 300], ["a"] * 3000, ["[z-a]", "*"], ["[", "**", "]*"], ["**"] * 9])
def test_any_path_without_data_is_refused_in_one_line(tmp_path, parts):
    (tmp_path / "a.md").write_text("")
    with pytest.raises(UserError, match=r"^data\.path = .* matches no") as error:
        TextFiles(data_config(tmp_path / "/".join(parts)))
    assert "\n" not in str(error.value)


# Names.


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("d/a[1].jsonl", ["exact"]),
        ("d/a[[]1].jsonl", ["exact"]),
        ("d/a[12].jsonl", ["glob"]),
        ("d/?*.txt", ["named *"]),
        ("d/x*.txt", ["named x*"]),
        ("x[12]/a.txt", ["in x[12]"]),
        ("x[12]/*.txt", ["in x[12]"]),
        ("x[12]/**", ["in x[12]"]),
        ("x[13]/*.txt", ["in x1"]),
        ("x[12]", ["in x[12]"]),
    ],
)
def test_a_path_that_exists_beats_a_glob(tmp_path, path, expected, monkeypatch):
    for name, word in {
        "d/a[1].jsonl": '{"text": "exact"}',
        "d/a1.jsonl": '{"text": "glob"}',
        "d/?*.txt": "named *",
        "d/x*.txt": "named x*",
        "d/xy.txt": "y",
        "x[12]/a.txt": "in x[12]",
        "x1/a.txt": "in x1",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(word)
    assert texts(tmp_path / path) == expected
    monkeypatch.chdir(tmp_path)
    assert texts(path) == expected


@pytest.mark.parametrize("name", [NOT_UTF8, "a\nb.txt", "a\tb '\".txt", "ä€🙂.txt"])
def test_a_file_of_any_name_is_read(tmp_path, name, capfd):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / name).write_text("one two three " * 99)
    (tmp_path / "texts" / name.replace(".txt", ".jsonl")).write_text('{"text": "four five six"}\n{\n')
    (tmp_path / "texts" / name.replace(".txt", ".other")).write_text("")
    corpus = prepare(make_config(tmp_path, model__context_length=2))
    assert corpus.train.num_documents + corpus.validation.num_documents == 2
    assert capfd.readouterr().err.count("\n") == 2  # what is skipped, on one line each
    assert texts(tmp_path / "texts" / name) == ["one two three " * 99]


def test_identities_of_ordinary_folders_are_as_they_were(tmp_path):
    """Data that were prepared before are found again."""
    write(tmp_path, "b.txt=b", "a.jsonl=a", "sub/c.txt=c")
    files = [tmp_path.resolve() / name for name in ("a.jsonl", "b.txt", "sub/c.txt")]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    assert json.dumps(TextFiles(data_config(tmp_path)).identity) == json.dumps(["text", *stats])
    assert TextFiles(data_config(tmp_path, data__text_key="body")).identity[0] == "body"


def test_an_edit_that_keeps_size_and_time_is_not_seen(tmp_path):
    write(tmp_path, "a.txt=a")
    before, stat = TextFiles(data_config(tmp_path)).identity, (tmp_path / "a.txt").stat()
    (tmp_path / "a.txt").write_text("b")
    os.utime(tmp_path / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert TextFiles(data_config(tmp_path)).identity == before
    os.utime(tmp_path / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert TextFiles(data_config(tmp_path)).identity != before


# Byte-order marks.


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("a.txt", b"\xef\xbb\xbfword", "word"),
        ("a.txt", b"\xef\xbb\xbf", ""),
        ("a.txt", b"a \xef\xbb\xbf b", "a \ufeff b"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "word"}\n', "word"),
        ("a.jsonl", b"\xef\xbb\xbf\n", ""),
        ("a.jsonl", b'{"text": "\xef\xbb\xbfword"}', "\ufeffword"),
        ("a.txt", b"\xef\xbb\xbf" + b"word " * 50, "word " * 50),
    ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, raw, expected, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_TEXT", 100)
    (tmp_path / name).write_bytes(raw)
    (document,) = documents(tmp_path)
    assert (document.text, document.fault) == (expected, "")


def test_a_byte_order_mark_before_python_and_before_a_tokenizer(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfimport os")
    assert [document.text for document in PythonSource(data_config(""), tmp_path).documents()] == ["import os"]
    tokenizer = train_tokenizer(["some words"], 300)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8-sig")
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint == tokenizer.fingerprint


# Long words, lines and texts.


@pytest.mark.parametrize("word", ["a", "7", "-", " ", "\n", "é", "中", "_", "a\u0301", "a1"])
def test_a_word_of_any_length_trains_a_tokenizer(word, capfd):
    text = word * (300_000 // len(word))
    began = time.monotonic()
    tokenizer = train_tokenizer([f"some {text} words", text[:1000]], 300)
    ids = tokenizer.encode(text)
    assert time.monotonic() - began < 20
    assert tokenizer.decode(ids) == text
    said = capfd.readouterr().err
    assert said == "" if "\u0301" in word else "cut 1 word of more than 1,000 characters" in said


def test_words_of_ordinary_length_train_as_before(capfd):
    texts = ["word " * 5000, "no,spaces;here." * 300, "x" * 1000, "中文，没有空格。" * 400, "\n" * 1000]
    one, two = train_tokenizer(texts, 300), train_tokenizer([text[:900] for text in texts], 300)
    assert one.vocab_size == two.vocab_size and capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("unit", ["a line of text\n", "no line end ", "🙂é"])
def test_a_long_text_becomes_documents_that_join(tmp_path, monkeypatch, kind, unit, capfd):
    monkeypatch.setattr(readers, "_LONGEST_TEXT", 2000)
    monkeypatch.setattr(readers, "_PART", 200)
    whole = unit * 400
    (tmp_path / "texts").mkdir()
    line = json.dumps({"text": whole}) + '\n{"text": "short"}\n'
    (tmp_path / "texts" / f"a.{kind}").write_text(line if kind == "jsonl" else whole)
    parts = [document.text for document in documents(tmp_path / "texts") if document.part]
    assert "".join(parts) == whole and max(len(part.encode()) for part in parts) <= 200
    assert all(part.endswith("\n") for part in parts) == ("\n" in unit)
    corpus = prepare(make_config(tmp_path, model__context_length=2))
    count = corpus.train.num_documents + corpus.validation.num_documents
    assert count == len(parts) + (kind == "jsonl")
    assert "cut 1 texts of more than " in capfd.readouterr().err


def test_a_long_text_that_is_not_utf8_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_TEXT", 300)
    monkeypatch.setattr(readers, "_PART", 200)
    (tmp_path / "a.txt").write_bytes(b"good\n" * 80 + b"\xff\n" + b"good\n" * 80)
    assert [document.fault for document in documents(tmp_path)].count("not UTF-8") == 1


@pytest.mark.parametrize("long", ["x" * 5000, "x" * 1001, "\n".join(["x" * 2000] * 3)])
def test_a_line_that_is_too_long_to_be_held_is_skipped_and_said(tmp_path, monkeypatch, long):
    monkeypatch.setattr(readers, "_LONGEST_LINE", 1000)
    monkeypatch.setattr(readers, "_PART", 300)
    (tmp_path / "a.jsonl").write_text(f'{{"text": "before"}}\n{long}\n{{"text": "after"}}\n{long}')
    found = documents(tmp_path)
    assert [document.text for document in found if document.text] == ["before", "after"]
    many = long.count("\n") + 1
    assert [document.line for document in found if document.fault][: many + 1] == [*range(2, 2 + many), 3 + many]


def test_many_tiny_documents_are_encoded_in_bounded_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenformer_jax.data.encode._PIECE", 4096)
    monkeypatch.setattr("tokenformer_jax.data.encode._TOGETHER", 4 * 4096)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(20_000)))
    sizes = []
    encode = type(train_tokenizer([], 257)).encode_batch

    def counted(self, pieces):
        sizes.append(len(pieces))
        return encode(self, pieces)

    monkeypatch.setattr("tokenformer_jax.data.tokenizer.Tokenizer.encode_batch", counted)
    corpus = prepare(make_config(tmp_path))
    assert corpus.train.num_documents + corpus.validation.num_documents == 20_000 == sum(sizes)
    assert max(sizes) < 4096
    assert sorted(texts_of(corpus, corpus.validation) + texts_of(corpus, corpus.train)) == sorted(
        str(i) for i in range(20_000)
    )


# Paths of every flag and key.

URLS = ["s3://bucket/a b", "hf://owner/name", "https://host/x", "file:///tmp/x", "gs:/bucket"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("key", ["tokenizer", "cache_dir"])
def test_a_url_in_a_key_is_refused(url, key):
    with pytest.raises(UserError, match=rf"^data\.{key} = '{url}': is a URL; use a path") as error:
        read_config(tiny_tree(**{f"data__{key}": url}).to_dict())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["runs/a", "/a:b/c", "a:b", "~/x", "c:", "1:/x", "./gs://x", "a/b://c", ""])
def test_other_paths_are_no_urls(path):
    assert local_path(path, "--workdir") == pathlib.Path(os.path.expanduser(path))


FLAGS = [
    ("train", "--config=quickstart:small --workdir={url}"),
    ("train", "--config={url}/c.py:small --workdir={f}/w"),
    ("train", "--config=quickstart:small --config.data.cache_dir={url} --workdir={f}/w"),
    ("grow", "--config=quickstart:grown --source={url} --workdir={f}/w"),
    ("evaluate", "--workdir={url}"),
    ("generate", "--workdir={url}"),
    ("checkpoint", "--workdir={url}"),
    ("convert", "--from_torch={url} --workdir={f}/w"),
    ("convert", "--to_torch={url} --workdir={f}/w"),
    ("convert", "--from_torch={f}/x.npz --tokenizer={url} --workdir={f}/w"),
    ("report", "--runs=a={url}"),
    ("report", "--runs={url}"),
    ("report", "--runs={f} --out={url}"),
    ("plan", "--config=quickstart:grown --topology=v5e:2x2 --out={url}"),
]


@pytest.mark.parametrize("command, args", FLAGS, ids=[f"{c} {a.split('=')[-2].split()[-1]}" for c, a in FLAGS])
def test_a_url_in_a_flag_is_refused_and_nothing_made(tmp_path, command, args):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(dict.fromkeys("step params train_flops eval_loss eval_perplexity eval_bits_per_byte".split(), 1))
        + "\n"
    )
    before = set(os.listdir())
    line = complaint(call(command, *args.format(url="s3://bucket/x", f=tmp_path).split()))
    assert "s3://bucket/x" in line and ": is a URL; use a path" in line
    may_be_in_a_bucket = any(key in line for key in ("--workdir=", "--source=", "--runs=", "cache_dir = "))
    assert line.endswith(", or gs://BUCKET/FOLDER" if may_be_in_a_bucket else " (copy it there, or from there)")
    assert set(os.listdir()) == before and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["--workdir", "--source", "data.cache_dir"])
def test_what_libraries_cannot_write_is_refused(name):
    for path in (os.fsdecode(b"w\xff"), os.fsdecode(b"/\xfe/w")):
        with pytest.raises(UserError, match=rf"^{name}.*is not UTF-8") as error:
            local_path(path, name)
        str(error.value).encode()
    with pytest.raises(UserError, match="zero byte"):
        local_path("a\0b", name)


# Separators.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["small=runs/lr=0.1"], {"small": "runs/lr=0.1"}),
        (["runs/lr=0.1"], {"lr=0.1": "runs/lr=0.1"}),
        (["x=runs/a,b"], {"x": "runs/a,b"}),
        (["runs/a,b,y=runs/a"], {"a,b": "runs/a,b", "y": "runs/a"}),
        (["x=runs/a, b=c,1,runs/lr=0.1"], {"x": "runs/a", "b": "c,1", "lr=0.1": "runs/lr=0.1"}),
        (["x=runs/a,b=c", "y=runs/a,b"], {"x": "runs/a,b=c", "y": "runs/a,b"}),
        (["small=runs/a,none,z=runs/a,b"], {"small": "runs/a", "none": "none", "z": "runs/a,b"}),
        (["runs/typo=1,x=runs/a,"], {"typo=1": "runs/typo=1", "x": "runs/a"}),
        (["x="], {"x": "."}),
        ([""], {}),
    ],
)
def test_separators_inside_the_paths_of_runs(tmp_path, monkeypatch, given, expected):
    for name in ("runs/lr=0.1", "runs/a", "runs/a,b", "c,1"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if given == ["x=runs/a,b=c", "y=runs/a,b"]:
        (tmp_path / "runs/a,b=c").mkdir()
    assert {name: str(path) for name, path in named_runs(given).items()} == expected


def test_a_config_whose_path_has_a_colon_is_refused_with_the_reason(tmp_path):
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "c.py").write_text("")
    for variant in ("", ":small"):
        line = complaint(call("train", f"--config={tmp_path}/a:b/c.py{variant}", f"--workdir={tmp_path}/w"))
        assert "its path holds a colon" in line
    assert not (tmp_path / "w").exists()


# Relative paths.


@pytest.mark.parametrize("path", ["d", "d/*.txt", "./d/**", "../here/d", "[here]/*"])
def test_relative_paths_are_absolute_in_a_written_config(tmp_path, monkeypatch, path):
    here = write(tmp_path / "here", "d/a.txt=a")
    (here / "[here]").symlink_to("d")
    monkeypatch.chdir(here)
    cfg = make_config(tmp_path, data__path=path, data__cache_dir="c", data__tokenizer="t.json")
    written = json.loads(cfg.to_json())["data"]
    monkeypatch.chdir("/")
    assert texts(written["path"]) == ["a"]
    assert (written["cache_dir"], written["tokenizer"]) == (str(here / "c"), str(here / "t.json"))


@pytest.mark.parametrize("path", ["", "~/d", "/d/*"])
def test_paths_that_hold_anywhere_are_written_as_they_are(tmp_path, path):
    cfg = make_config(tmp_path, data__path=path)
    assert json.loads(cfg.to_json())["data"]["path"] == path


def test_data_that_were_moved_give_the_same_tokens(tmp_path):
    write(
        tmp_path / "texts", "b.txt=" + "one two three " * 50, "a.jsonl=" + "four " * 50, "sub/c.txt=" + "five six " * 50
    )
    first = prepare(make_config(tmp_path))
    (tmp_path / "texts").rename(tmp_path / "elsewhere")
    again = prepare(make_config(tmp_path, data__path=str(tmp_path / "elsewhere")), first.tokenizer)
    np.testing.assert_array_equal(first.train.tokens, again.train.tokens)
    assert first.train.fingerprint == again.train.fingerprint
