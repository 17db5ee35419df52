"""Laws of preparation: what is in the token files, whatever happens while they are made."""

import itertools
import json
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import base
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.data.batches import eval_batches
from tokenformer_jax.data.text import PythonSource
from tokenformer_jax.data.tokenizer import Tokenizer, train_tokenizer
from tokenformer_jax.data.tokens import Corpus, TokenSplit, prepare
from tokenformer_jax.errors import UserError

WORDS = "one two three four five six seven eight nine ten".split()


def write_texts(folder: pathlib.Path, count: int = 60, words: int = 40) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    lines = [{"text": " ".join(rng.choices(WORDS, k=words))} for _ in range(count)]
    (folder / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_config(tmp_path: pathlib.Path, **overrides: Any) -> Config:
    """text_files in tmp_path/texts; keys are written with __ for the dot."""
    tree = base.get_config()
    values = {
        "data.dataset": "text_files",
        "data.path": str(tmp_path / "texts"),
        "data.cache_dir": str(tmp_path / "cache"),
        "model.vocab_size": 300,
        "model.context_length": 8,
        "batch_size": 4,
    }
    tree.update_from_flattened_dict(values | {k.replace("__", "."): v for k, v in overrides.items()})
    return read_config(tree.to_dict())


def texts_of(corpus: Corpus, split: TokenSplit) -> list[str]:
    ends = np.flatnonzero(split.tokens == split.end_of_text)
    assert ends[0] == 0 and ends[-1] == split.num_tokens - 1
    return [corpus.tokenizer.decode(split.tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]


def test_the_stream_is_the_documents_between_ends_of_text(tmp_path):
    lines = (write_texts(tmp_path / "texts") / "some.jsonl").read_text().splitlines()
    (tmp_path / "texts" / "a.txt").write_bytes("naïve <|endoftext|> text\r\n".encode())
    corpus = prepare(make_config(tmp_path))
    train, validation = texts_of(corpus, corpus.train), texts_of(corpus, corpus.validation)
    documents = [json.loads(line)["text"] for line in lines] + ["naïve <|endoftext|> text\r\n"]
    assert sorted(train + validation) == sorted(documents)
    assert validation and len(validation) < len(train)
    for split, texts in ((corpus.train, train), (corpus.validation, validation)):
        assert split.num_documents == len(texts)
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert not split.tokens.flags.writeable and split.tokens.dtype == np.uint16


def test_long_documents_are_encoded_in_pieces_that_join(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenformer_jax.data.encode._PIECE", 50)
    (tmp_path / "texts").mkdir()
    texts = ["\n".join(WORDS * 20), "x" * 333, "short"]
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    corpus = prepare(make_config(tmp_path, model__context_length=2))
    assert sorted(texts_of(corpus, corpus.train) + texts_of(corpus, corpus.validation)) == sorted(texts)


def test_what_is_no_text_is_counted_and_skipped(tmp_path, capfd):
    folder = write_texts(tmp_path / "texts", 20)
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "empty.txt").write_text("")
    bad = [b"{", b'{"other": "x"}', b'{"text": 3}', b"[1]", b'"text"', b'{"text": "\xff"}', b'{"text": "\\ud800"}']
    (folder / "bad.jsonl").write_bytes(b"\n".join([*bad, b'{"text": "  "}', b""]))
    corpus = prepare(make_config(tmp_path))
    assert corpus.train.num_documents + corpus.validation.num_documents == 20
    said = capfd.readouterr().err
    assert "skipped 8 unreadable" in said and "and 2 empty ones" in said


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_documents_give_both_splits_something(tmp_path, count):
    (tmp_path / "texts").mkdir()
    texts = [" ".join(f"{word}{i}" for word in WORDS * 20) for i in range(count)]
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    corpus = prepare(make_config(tmp_path))
    train, validation = texts_of(corpus, corpus.train), texts_of(corpus, corpus.validation)
    assert train and validation
    assert sorted(train + validation) == texts if count > 1 else train[0] + validation[0] == texts[0]


def test_equal_documents_never_straddle_the_splits(tmp_path):
    folder = write_texts(tmp_path / "texts", 50)
    shutil.copy(folder / "some.jsonl", folder / "copy.jsonl")
    corpus = prepare(make_config(tmp_path))
    train, validation = set(texts_of(corpus, corpus.train)), set(texts_of(corpus, corpus.validation))
    assert not train & validation and len(train | validation) == 50


def test_changed_files_give_a_new_set_and_equal_files_the_cached_one(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "texts")
    first = prepare(make_config(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("tokenformer_jax.data.tokens._make_corpus", None)  # calling it fails
        again = prepare(make_config(tmp_path))
        assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
        np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
    (folder / "more.txt").write_text("entirely new text " * 20)
    changed = prepare(make_config(tmp_path))
    documents = [corpus.train.num_documents + corpus.validation.num_documents for corpus in (first, changed)]
    assert documents == [60, 61]


def test_reopening_imports_no_tfds(tmp_path):
    write_texts(tmp_path / "texts")
    cfg = make_config(tmp_path)
    prepare(cfg)
    (tmp_path / "config.json").write_text(cfg.to_json())
    code = (
        "import pathlib, sys; from tokenformer_jax.storage.workdir import load_config; "
        "from tokenformer_jax.data.tokens import prepare; "
        "prepare(load_config(pathlib.Path(sys.argv[1]))); assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "config.json"], check=True)


def test_a_killed_preparation_is_redone(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts")
    cfg = make_config(tmp_path)

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg)
    assert len(list(tmp_path.glob("cache/*/tokens-*"))) == 1 and not list(tmp_path.glob("cache/*/tokens-*/meta.json"))
    whole = np.array(prepare(cfg).train.tokens)
    assert not list(tmp_path.glob("cache/*/tokens-*/job.json"))
    (file,) = tmp_path.glob("cache/*/tokens-*/train-*.bin")
    file.write_bytes(file.read_bytes()[:-2])  # cut short by a full disk
    np.testing.assert_array_equal(prepare(cfg).train.tokens, whole)
    (meta,) = tmp_path.glob("cache/*/tokens-*/meta.json")
    meta.write_text("{")
    np.testing.assert_array_equal(prepare(cfg).train.tokens, whole)


@pytest.mark.parametrize(
    "name", ["train-*.bin", "validation-*.bin", "train-*.crc32", "validation-*.crc32", "meta.json"]
)
def test_a_flipped_bit_in_prepared_tokens_is_named_or_they_are_prepared_anew(tmp_path, name):
    write_texts(tmp_path / "texts", 500)
    cfg = make_config(tmp_path)
    whole = [np.array(split.tokens) for split in read_all(prepare(cfg))]
    (file,) = tmp_path.glob(f"cache/*/tokens-*/{name}")
    raw = file.read_bytes()
    assert name == "meta.json" or "validation" in name or len(raw) > 4  # in several blocks
    rng = np.random.default_rng(0)
    for _ in range(20):
        changed = bytearray(raw)
        changed[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        if name == "meta.json":
            for split, tokens in zip(read_all(prepare(cfg)), whole, strict=True):
                np.testing.assert_array_equal(split.tokens, tokens)
        else:
            with pytest.raises(UserError, match=r"\.bin: bytes \d+ to \d+ have changed since they were prepared"):
                read_all(prepare(cfg))


def read_all(corpus: Corpus) -> list[TokenSplit]:
    """Reads every token as evaluation does."""
    for split in (corpus.train, corpus.validation):
        for batch in eval_batches(split, 4, 16):
            assert batch.tokens_BL.shape == (4, 16)
    return [corpus.train, corpus.validation]


def test_two_processes_prepare_at_once(tmp_path):
    write_texts(tmp_path / "texts", 500)
    (tmp_path / "config.json").write_text(make_config(tmp_path).to_json())
    code = (
        "import pathlib, sys; from tokenformer_jax.storage.workdir import load_config; "
        "from tokenformer_jax.data.tokens import prepare; "
        "print(prepare(load_config(pathlib.Path(sys.argv[1]))).train.num_tokens)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.json")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] and int(outputs[0]) > 0
    assert len(list(tmp_path.glob("cache/*/tokens-*"))) == 1


def test_a_given_tokenizer_and_a_tokenizer_file_make_the_same_tokens(tmp_path):
    write_texts(tmp_path / "texts")
    tokenizer = train_tokenizer(WORDS, 280)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    given = prepare(make_config(tmp_path), tokenizer)
    loaded = prepare(make_config(tmp_path, data__tokenizer=str(tmp_path / "tokenizer.json")))
    assert given.tokenizer.fingerprint == loaded.tokenizer.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(given.train.tokens, loaded.train.tokens)


def test_python_source_is_the_library_without_its_tests(tmp_path):
    cfg = make_config(tmp_path, data__dataset="python_source")
    one, two = (PythonSource(cfg.data) for _ in range(2))
    assert one.identity == two.identity and list(one.documents()) == list(two.documents())
    paths = [document.path for document in one.documents()]
    assert "argparse.py" in paths and not any("test" in pathlib.Path(p).parts for p in paths)
    assert not any("site-packages" in p or "__pycache__" in p for p in paths)
    validation = [name for d in one.documents() for name, _ in one.places().texts(d)].count("validation")
    assert 0.02 < validation / len(paths) < 0.1


def prepare_builder(name: str, folder: pathlib.Path, splits: dict[str, Iterator[tuple[int, dict[str, str]]]]) -> None:
    """Writes examples as the tfds set `name` into the folder."""
    tfds.disable_progress_bar()

    class Texts(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # there are no download checksums beside this file to look for

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"text": tfds.features.Text(), "path": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return splits

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # abstract in tfds; the splits are generators already

    Texts.name = name
    builder = Texts(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()


def prepared_tfds_set(folder: pathlib.Path, name: str) -> None:
    examples = [(i, {"text": f"{i} " + " ".join(WORDS), "path": "p"}) for i in range(40)]
    prepare_builder(name, folder, {"train": iter(examples[:30]), "test": iter(examples[30:])})


def test_a_tfds_set_by_name_with_split_syntax(tmp_path):
    prepared_tfds_set(tmp_path / "tfds", "lm_small")
    published = {"data__dataset": "lm_small", "data__path": str(tmp_path / "tfds")}
    splits = {"data__train_split": "train[:50%]", "data__validation_split": "test"}
    corpus = prepare(make_config(tmp_path, **published, **splits))
    assert (corpus.train.num_documents, corpus.validation.num_documents) == (15, 10)
    assert texts_of(corpus, corpus.validation)[0].endswith("nine ten")
    for key, value in (("text_key", "content"), ("train_split", "tran"), ("validation_split", "validation")):
        with pytest.raises(UserError, match=rf"^data\.{key} = '{value}'"):
            prepare(make_config(tmp_path, **published | splits | {f"data__{key}": value}))


# Wrong input.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__path": "no/such/folder"}, r"^data\.path = 'no/such/folder': matches no"),
        ({"data__path": ""}, r"^data\.path = ''"),
        ({"data__text_key": "content"}, r"^data\.path = .* holds no text"),
        ({"data__tokenizer": "no/tokenizer.json"}, r"^data\.tokenizer = 'no/tokenizer.json'"),
        ({"data__dataset": "no_such_set"}, r"^data\.dataset = 'no_such_set': .*not found"),
        ({"data__dataset": "gone", "data__path": "/no/place"}, r"there is no /no/place: .*--config\.data\.path=PLACE"),
        ({"data__train_split": "tran"}, r"^data\.train_split = 'tran': .*use train or validation"),
        ({"data__validation_split": "validation[:0%]"}, r"^data\.validation_split = "),
        ({"model__context_length": 10**6}, r"^data\.train_split = .*model\.context_length"),
        ({"model__vocab_size": 100}, r"^model\.vocab_size = 100"),
    ],
)
def test_wrong_input_names_its_key(tmp_path, overrides, message):
    write_texts(tmp_path / "texts")
    with pytest.raises(UserError, match=message) as error:
        prepare(make_config(tmp_path, **overrides))
    assert "\n" not in str(error.value)


def test_an_empty_corpus_names_the_path(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"^data\.path = .*holds no text"):
        prepare(make_config(tmp_path))


def test_a_vocabulary_that_is_too_large_says_what_would_do(tmp_path):
    write_texts(tmp_path / "texts")
    with pytest.raises(UserError, match=r"^model\.vocab_size = 264: the tokenizer has 2\d\d ids; use 384"):
        prepare(make_config(tmp_path, model__vocab_size=264), train_tokenizer(["one two three four"] * 9, 290))


@pytest.mark.parametrize("given", [True, False])
def test_a_cache_that_cannot_be_written_names_its_key(tmp_path, given):
    write_texts(tmp_path / "texts")
    (tmp_path / "file").write_text("in the way")
    cfg = make_config(tmp_path, data__cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"^data\.cache_dir = .*Not a directory"):
        prepare(cfg, train_tokenizer([], 257) if given else None)
