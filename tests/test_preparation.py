"""Preparation on many cores and processes: the same tokens however many, and after a kill none is made twice."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.test_corpus import WORDS, make_config, prepared_tfds_set, read_all, texts_of
from tests.test_inputs import write_parquet
from tests.test_processes import CONFIG, ROOT, finish
from tokenformer_jax.data import encode, units, workers
from tokenformer_jax.data.tokenizer import train_tokenizer
from tokenformer_jax.data.tokens import Corpus, InMemory, TokenSplit, prepare
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import sealed, unsealed

# As they were before text was tokenized by many processes: train, validation and tokenizer.
BEFORE = {
    ("train", "validation"): ("08d4a72d5e29b6f5", "5efead2672977119", "bce010460fe1"),
    ("train[:50%]", "validation"): ("9ff3961879e5e328", "45bd266c4513b5b3", "b5d9bd25e38f"),
    ("train[10:]", "validation[:70%]"): ("48408b4c46443e3b", "a581bcc447008fe1", "4b160e551feb"),
}
SEVERAL = "085dd8a501c1455a"  # the train split of `write_some` in many parts


def write_some(folder: pathlib.Path) -> list[str]:
    """Lines of JSON and files; returns their texts."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=40)) for _ in range(300)]
    (folder / "some.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines) + "{\n\n")
    whole = [" ".join(rng.choices(WORDS, k=200)) for _ in range(20)]
    for i, text in enumerate(whole):
        (folder / f"{i}.txt").write_text(text)
    return lines + whole


@pytest.mark.parametrize("splits", BEFORE)
def test_tokens_of_a_small_set_are_as_they_always_were(tmp_path, splits):
    write_some(tmp_path / "texts")
    corpus = prepare(make_config(tmp_path, data__train_split=splits[0], data__validation_split=splits[1]))
    assert (corpus.train.fingerprint, corpus.validation.fingerprint, corpus.tokenizer.fingerprint) == BEFORE[splits]


def test_tokens_in_a_single_file_as_before_are_read(tmp_path):
    write_some(tmp_path / "texts")
    cfg = make_config(tmp_path)
    expected = prepare(cfg)
    (folder,) = tmp_path.glob("cache/*/tokens-*")
    meta = unsealed((folder / "meta.json").read_text())
    for name in ("train", "validation"):
        ((file, _),) = meta[name].pop("files")
        for ending in (".bin", ".crc32"):
            (folder / file).with_suffix(ending).rename(folder / f"{name}{ending}")
    (folder / "meta.json").write_text(sealed(meta))
    for split, same in zip(read_all(prepare(cfg)), read_all(expected), strict=True):
        np.testing.assert_array_equal(split.tokens, same.tokens)
        assert split.fingerprint == same.fingerprint


@pytest.fixture
def small_units(monkeypatch):
    for module in (units, encode):
        monkeypatch.setattr(module, "UNIT", 9000)


def all_texts(corpus: Corpus) -> list[str]:
    return sorted(text for split in (corpus.train, corpus.validation) for text in texts_of(corpus, split))


@pytest.mark.parametrize("cores", [1, 3])
def test_the_tokens_are_the_same_on_any_number_of_cores(tmp_path, monkeypatch, small_units, cores):
    texts = write_some(tmp_path / "texts")
    monkeypatch.setattr(workers, "cores", lambda: cores)
    tokenizer = train_tokenizer(WORDS, 280)
    corpus = prepare(make_config(tmp_path), tokenizer)
    assert len(corpus.train.shards) > 5
    assert all_texts(corpus) == sorted(texts)
    assert (corpus.train.num_documents, corpus.validation.num_documents) == (304, 16)
    assert corpus.train.num_bytes + corpus.validation.num_bytes == sum(map(len, texts))
    assert corpus.train.fingerprint == SEVERAL


@pytest.mark.slow
def test_what_processes_skip_is_counted_together(tmp_path, monkeypatch, small_units, capfd):
    write_some(tmp_path / "texts")
    monkeypatch.setattr(workers, "cores", lambda: 2)
    (tmp_path / "texts" / "zz.jsonl").write_text("[]\n" * 4000)
    prepare(make_config(tmp_path), train_tokenizer(WORDS, 280))
    said = capfd.readouterr().err
    assert "skipped 4001 unreadable documents (" in said and "some.jsonl" in said and "and 3998 more" in said


@pytest.mark.slow
def test_a_mistake_that_a_process_finds_is_one_line(tmp_path, monkeypatch, small_units):
    write_some(tmp_path / "texts")
    monkeypatch.setattr(workers, "cores", lambda: 2)
    (tmp_path / "texts" / "zz.jsonl.gz").write_bytes(b"no gzip" * 500)
    with pytest.raises(UserError, match=r"^data\.path = .*zz\.jsonl\.gz cannot be read \(Not a gzipped file") as error:
        prepare(make_config(tmp_path), train_tokenizer(WORDS, 280))
    assert "\n" not in str(error.value)
    (tmp_path / "texts" / "zz.jsonl.gz").unlink()
    assert prepare(make_config(tmp_path), train_tokenizer(WORDS, 280)).train.num_documents == 304


def test_a_count_of_documents_is_refused_where_no_process_sees_them_all(tmp_path, small_units):
    write_some(tmp_path / "texts")
    with pytest.raises(UserError, match=r"^data\.train_split = 'train\[:9\]': .*use a part: train\[:10%\]"):
        prepare(make_config(tmp_path, data__train_split="train[:9]"), train_tokenizer(WORDS, 280))
    half = prepare(make_config(tmp_path, data__train_split="train[:50%]"), train_tokenizer(WORDS, 280))
    assert 145 <= half.train.num_documents <= 159


@pytest.mark.slow
def test_parquet_and_published_sets_are_shared_among_processes(tmp_path, monkeypatch, small_units):
    monkeypatch.setattr(workers, "cores", lambda: 2)
    (tmp_path / "texts").mkdir()
    texts = [f"{i} " + " ".join(WORDS) for i in range(500)]
    write_parquet(tmp_path / "texts" / "a.parquet", texts)
    assert all_texts(prepare(make_config(tmp_path), train_tokenizer(WORDS, 280))) == sorted(texts)

    prepared_tfds_set(tmp_path / "tfds", "lm_small")
    published = {"data__dataset": "lm_small", "data__path": str(tmp_path / "tfds"), "data__validation_split": "test"}
    whole = prepare(make_config(tmp_path, **published), train_tokenizer(WORDS, 280))
    for module in (units, encode):
        monkeypatch.setattr(module, "UNIT", 200)
    monkeypatch.setattr("tokenformer_jax.data.published.UNIT", 200)
    parts = prepare(make_config(tmp_path, **published, data__cache_dir=f"{tmp_path}/2"), train_tokenizer(WORDS, 280))
    assert len(parts.train.shards) > 2
    np.testing.assert_array_equal(parts.train.tokens, whole.train.tokens)


def test_a_stream_of_several_files_is_read_like_one():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 99, 1000).astype(np.uint16)
    cuts = np.sort(rng.integers(0, 1000, 9))
    split = TokenSplit([InMemory(part) for part in np.split(tokens, cuts)], 1, 1, 0, "")
    assert split.num_tokens == 1000
    for begin, end in [(0, 0), (0, 1000), (999, 1000), (5, 5), *np.sort(rng.integers(0, 1001, (500, 2)))]:
        found = split.read(int(begin), int(end))
        np.testing.assert_array_equal(found, tokens[begin:end])
        assert found.dtype == np.uint16


# Kills.

PREPARE = """
import pathlib, sys
from tokenformer_jax.data import encode, units, workers
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.storage.workdir import load_config
units.UNIT = encode.UNIT = 9000
workers.cores = lambda: 2
if __name__ == "__main__":
    print(prepare(load_config(pathlib.Path(sys.argv[1]))).train.fingerprint)
"""


def start(folder: pathlib.Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(folder / "config.json")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)


def records(folder: pathlib.Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("cache/*/tokens-*/*-*.json")}


def kills(tmp_path: pathlib.Path, count: int, monkeypatch) -> None:
    """Kills as many preparations, each once it has made some more parts, and lets the last one end."""
    for i in range(count):
        write_some(tmp_path / "texts" / str(i))
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(WORDS, 280).to_json())
    cfg = make_config(tmp_path, data__tokenizer=str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(cfg.to_json())
    monkeypatch.setattr(workers, "cores", lambda: 1)
    whole = prepare(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_dir=str(tmp_path / "whole"))))
    before: dict[str, int] = {}
    for _ in range(count):
        process = start(tmp_path)
        while len(records(tmp_path)) < len(before) + 1 and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        time.sleep(0.3)  # its own processes end when they next report
        now = records(tmp_path)
        assert before.items() <= now.items()  # none is made again
        before = now
    process = start(tmp_path)
    assert process.communicate()[0].strip() == whole.train.fingerprint


def test_a_kill_costs_no_part_that_was_whole(tmp_path, monkeypatch, small_units):
    kills(tmp_path, 2, monkeypatch)


@pytest.mark.slow
def test_ten_kills_cost_no_part_that_was_whole(tmp_path, monkeypatch, small_units):
    kills(tmp_path, 10, monkeypatch)


def prepare_by_pod(folder: pathlib.Path, count: int, **overrides) -> str:
    """Prepares in a pod of so many processes, in small units; returns what they said."""
    overrides = {"model__vocab_size": 300, "model__context_length": 8, "data__cache_dir": "cache", **overrides}
    (folder / "config.py").write_text(CONFIG.format(overrides={"data__dataset": "text_files", **overrides}))
    code = PREPARE.partition("if __name__")[0] + "from tokenformer_jax.prepare import main\nmain()\n"
    (folder / "command.py").write_text(code)
    command = ["bash", str(ROOT / "launch" / "local_pod.sh"), str(count), "python", "command.py", "--config=config.py"]
    log, environment = folder / "log", os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True)
    assert finish(process) == 0
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_processes_of_a_pod_prepare_together(tmp_path, count):
    write_some(tmp_path / "texts")
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(WORDS, 280).to_json())
    said = prepare_by_pod(tmp_path, count, data__path="texts", data__tokenizer="tokenizer.json")
    assert said.count("train: 304 documents") == 1
    (meta,) = tmp_path.glob("cache/*/tokens-*/meta.json")
    assert unsealed(meta.read_text())["train"]["fingerprint"] == SEVERAL


@pytest.mark.slow
def test_the_processes_of_a_pod_prepare_a_mixture_and_its_tokenizer(tmp_path):
    for name in ("web", "code"):
        write_some(tmp_path / name)
    sources = [{"name": name, "weight": 1, "path": name} for name in ("web", "code")]
    said = prepare_by_pod(tmp_path, 2, data__sources=tuple(sources))
    assert said.count("train: 608 documents") == 1
