"""Laws of mixtures: the sources' weights, one order whatever the processes, exact resumption, losses apart."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.commands import call, complaint
from tests.helpers import rows_of, tiny_config, tiny_tree, write_config
from tests.test_corpus import make_config, texts_of, write_texts
from tokenformer_jax.config import read_config
from tokenformer_jax.data.batches import data_identity, keep_position, train_batches, training_examples
from tokenformer_jax.data.mixture import joined, prepare, sources
from tokenformer_jax.data.tokens import InMemory, Part, TokenSplit
from tokenformer_jax.errors import UserError
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints

CFG = tiny_config(model__context_length=4, batch_size=8)


def make_mixture(*sizes_and_weights: tuple[int, float]) -> TokenSplit:
    """Sources whose tokens are 10^6, 10^6 + 1, … and 2·10^6, … and so on, each with a window for every 4 of them."""
    parts = []
    for i, (size, weight) in enumerate(sizes_and_weights, 1):
        tokens = np.arange(i * 10**6, i * 10**6 + size, dtype=np.uint32)
        split = TokenSplit([InMemory(tokens)], size, 1, end_of_text=0, fingerprint=f"print {i} {size}")
        parts.append(Part(f"source{i}", weight, split))
    return joined(parts)


def sources_of(batch) -> np.ndarray:
    return batch.tokens_BL[:, 0] // 10**6


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.9, 0.09, 0.01), (0.498, 0.502)])
def test_each_source_gives_its_weight_over_ten_thousand_batches(weights):
    split = make_mixture(*((4 * n + 1, weight) for n, weight in zip((9000, 3000, 1000), weights, strict=False)))
    batches = train_batches(split, dataclasses.replace(CFG, batch_size=2))
    counts = np.zeros(4)
    for _ in range(10_000):
        np.add.at(counts, sources_of(next(batches)), 1)
    np.testing.assert_allclose(counts[1 : 1 + len(weights)] / 20_000, weights, rtol=0.01)


def test_each_source_is_read_in_epochs_of_its_own_and_no_window_crosses_over():
    split = make_mixture((4 * 70 + 1, 0.75), (4 * 23 + 3, 0.25))
    batches = train_batches(split, CFG)
    read = [next(batches) for _ in range(140)]
    rows = np.concatenate([batch.tokens_BL for batch in read])
    targets = np.concatenate([batch.targets_BL for batch in read])
    assert (targets == rows + 1).all() and (rows // 10**6 == rows[:, :1] // 10**6).all()
    for source, windows in ((1, 70), (2, 23)):
        mine = rows[rows[:, 0] // 10**6 == source, 0] % 10**6 // 4
        epochs = mine[: len(mine) // windows * windows].reshape(-1, windows)
        assert len(epochs) > 9
        assert (np.sort(epochs, axis=1) == np.arange(windows)).all()
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_the_processes_rows_form_the_global_batches(process_count):
    split = make_mixture((383, 0.6), (243, 0.3), (121, 0.1))
    parts = [train_batches(split, CFG, process_index=i, process_count=process_count) for i in range(process_count)]
    whole = train_batches(split, CFG)
    for _ in range(12):
        for expected, *shards in zip(next(whole), *(next(part) for part in parts), strict=True):
            np.testing.assert_array_equal(np.concatenate(shards), expected)


def test_a_restored_iterator_goes_on_in_each_source():
    split = make_mixture((283, 0.6), (243, 0.4))
    batches = train_batches(split, CFG)
    for _ in range(7):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    assert len(json.dumps(state)) < 100
    expected = [next(batches) for _ in range(20)]
    fresh = train_batches(split, CFG)
    fresh.set_state(state)
    for batch in expected:
        for ours, theirs in zip(next(fresh), batch, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    larger = train_batches(split, dataclasses.replace(CFG, batch_size=16))
    larger.set_state(state)
    keep_position(larger, 8, 16)
    halves = [expected[i].tokens_BL for i in (1, 2)]  # 56 examples are 3.5 batches of 16: it goes on after the next 8
    np.testing.assert_array_equal(next(larger).tokens_BL, np.concatenate(halves))


def test_examples_can_be_shown():
    split = make_mixture((283, 0.6), (243, 0.4))
    batches = train_batches(split, CFG)
    rows = np.concatenate([next(batches).tokens_BL for _ in range(3)])
    for row, batch in zip(rows[5:20], training_examples(split, CFG, range(5, 20)), strict=True):
        np.testing.assert_array_equal(batch.tokens_BL[0], row)
        assert batch.weights_BL[1:].sum() == 0


def test_what_a_position_refers_to_depends_on_all_that_decides_the_order():
    identities = {
        data_identity(make_mixture(*mixture), CFG)
        for mixture in (
            ((83, 0.6), (43, 0.4)),
            ((83, 0.5), (43, 0.5)),
            ((83, 0.6), (47, 0.4)),
            ((83, 0.6), (43, 0.2), (43, 0.2)),
        )
    }
    assert len(identities) == 4


# Runs.


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two sources of different words."""
    folder = tmp_path_factory.mktemp("mixture")
    write_texts(folder / "web", 60)
    write_texts(folder / "code", 90)
    path = folder / "code" / "some.jsonl"
    path.write_text(path.read_text().replace("one", "def").replace("two", "return x"))
    return folder


def mixture_of(folder, **others):
    return {
        "data__dataset": "text_files",
        "data__cache_dir": str(folder / "cache"),
        "data__sources": (
            {"name": "web", "weight": 3, "path": str(folder / "web")},
            {"name": "code", "weight": 1, "path": str(folder / "code"), "validation_split": "validation[:50%]"},
        ),
        **others,
    }


def test_a_mixture_has_the_documents_of_each_source_and_one_tokenizer(corpora):
    cfg = make_config(corpora, **mixture_of(corpora))
    corpus = prepare(cfg)
    web, code = (part.split for part in corpus.train.parts)
    assert [part.weight for part in corpus.train.parts] == [0.75, 0.25]
    assert any("def" in text for text in texts_of(corpus, code))
    assert not any("def" in text for text in texts_of(corpus, web))
    assert web.num_documents + corpus.validation.parts[0].split.num_documents == 60
    assert corpus.train.num_tokens == web.num_tokens + code.num_tokens
    again = prepare(cfg)
    assert again.train.fingerprint == corpus.train.fingerprint
    assert again.tokenizer.fingerprint == corpus.tokenizer.fingerprint
    for piece in ("def", "nine"):
        assert len(corpus.tokenizer.encode(f" {piece}")) == 1


def test_a_run_reports_each_source_and_is_resumed_to_the_same_bits(corpora, tmp_path, steps_are_shared, capfd):
    overrides = mixture_of(corpora, steps=8, checkpoint_every=4, eval_every=4, log_every=1)
    whole = tiny_config(**overrides)
    assert train(whole, tmp_path / "whole")
    assert "(web 0.75 of " in capfd.readouterr().err
    assert train(dataclasses.replace(whole, steps=4), tmp_path / "parts")
    assert train(whole, tmp_path / "parts")
    rows = {name: rows_of(tmp_path / name) for name in ("whole", "parts")}
    losses = {name: [row["loss"] for row in rows[name] if "loss" in row] for name in rows}
    assert len(losses["whole"]) == 8 and losses["whole"][:4] == losses["parts"][:4]
    last = [row for row in rows["whole"] if "eval_loss" in row][-1]
    assert last["eval_loss"] == pytest.approx(0.75 * last["eval_loss_web"] + 0.25 * last["eval_loss_code"])
    assert last["eval_loss_web"] != last["eval_loss_code"]
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert [source["name"] for source in config["data"]["sources"]] == ["web", "code"]
    other = dataclasses.replace(whole.data, sources=whole.data.sources[::-1])
    with pytest.raises(UserError, match=r"^config\.data or config\.seed: .* was trained on tokens "):
        train(dataclasses.replace(whole, data=other, steps=12), tmp_path / "parts")


def test_a_run_that_grows_keeps_its_place_in_each_source(corpora, tmp_path, steps_are_shared):
    """Stopped before its growth and after it, it ends with the same bits; grown or not, it reads the same examples."""
    overrides = mixture_of(corpora, steps=6, checkpoint_every=2, log_every=1)
    rungs = ({"step": 3, "model": {"ffn_tokens": 128}, "batch_size": 16},)
    whole = tiny_config(**overrides, rungs=rungs)
    assert train(whole, tmp_path / "whole")
    for last in (2, 4):
        shutil.copytree(tmp_path / "whole", tmp_path / "stopped", dirs_exist_ok=True)
        for step in Checkpoints(tmp_path / "stopped" / "checkpoints").steps:
            if step > last:
                shutil.rmtree(tmp_path / "stopped" / "checkpoints" / str(step))
        assert train(whole, tmp_path / "stopped")
        assert rows_of(tmp_path / "stopped")[-1] == rows_of(tmp_path / "whole")[-1]
        ours, theirs = (Checkpoints(tmp_path / name / "checkpoints")._saved(6) for name in ("stopped", "whole"))
        assert ours == theirs
    # 3 batches of 8, then 3 of 16: the examples 0 to 72 of the order, each once
    position = Checkpoints(tmp_path / "whole" / "checkpoints")._contents(6)["position"]["next_index"]
    assert position * 16 >= 3 * 8 + 3 * 16 > (position - 1) * 16


def test_wrong_sources_are_found_before_anything_is_paid_for(corpora, tmp_path):
    web, _ = mixture_of(corpora)["data__sources"]
    tree = tiny_tree(**mixture_of(corpora, data__sources=(web, {"name": "code", "weight": -1})))
    flag = write_config(tmp_path / "config.py", read_config(tree.to_dict()))
    line = complaint(call("train", flag, f"--workdir={tmp_path}/run", "--check_for=any"))
    assert "data.sources[1].weight = -1: must be a number above 0" in line and not (tmp_path / "run").exists()


def test_relative_paths_of_sources_are_absolute_in_a_written_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = make_config(tmp_path, data__sources=({"name": "a", "weight": 1, "path": "x"}, {"name": "b", "weight": 1}))
    written = json.loads(cfg.to_json())["data"]["sources"]
    assert [source.get("path") for source in written] == [str(tmp_path / "x"), None]
    tree = json.loads(cfg.to_json())
    tree.pop("checksum")
    assert [source.name for source in sources(read_config(tree).data)] == ["a", "b"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": 0}, r"^data\.sources\[1\]\.weight = 0: must be a number above 0"),
        ({"weight": "x"}, r"^data\.sources\[1\]\.weight = 'x'"),
        ({"name": "web"}, r"^data\.sources\[1\]\.name = 'web': names another source"),
        ({"name": "a b"}, r"^data\.sources\[1\]\.name = 'a b': must be a name"),
        ({"pth": "x"}, r"^data\.sources\[1\]: unknown key 'pth'; did you mean 'path'"),
        ({"path": 3}, r"^data\.sources\[1\]\.path = 3: must be text"),
        ({"path": "/no/place"}, r"^data\.path = '/no/place': matches no"),
        ({"text_key": "body"}, r"^data\.path = .*/code': holds no text"),
    ],
)
def test_a_wrong_source_is_named(corpora, tmp_path, wrong, message):
    web, code = mixture_of(corpora)["data__sources"]
    overrides = mixture_of(corpora, data__sources=(web, code | wrong), data__cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        prepare(make_config(corpora, **overrides))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="holds one source alone"):
        prepare(make_config(corpora, **mixture_of(corpora, data__sources=(web,))))
