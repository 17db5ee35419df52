"""Whatever values a config holds and whatever bytes a file: it is read, or refused by a UserError; nothing else."""

import dataclasses
import io
import json
import math
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tests.helpers import corpus_overrides, tiny_config
from tests.test_data_files import texts as documents
from tokenformer_jax.config import read_config
from tokenformer_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.sampling import Sampling, sample
from tokenformer_jax.growth.ladder import stages
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.metrics_file import read_metrics
from tokenformer_jax.storage.official import from_official, model_config, to_official
from tokenformer_jax.storage.state_dicts import read_state_dict
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.storage.workdir import load_config

TREE = dataclasses.asdict(tiny_config())
KEYS = [(key,) for key in TREE] + [
    (group, key) for group in TREE if isinstance(TREE[group], dict) for key in TREE[group]
]
VALUES = st.one_of(
    st.integers(-3, 5),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        ["pattention", "linear", "softmax", "gelu_l2_norm", "isometric", "split", "rollback", "skip", "tanh"]
    ),
    st.booleans(),
    st.none(),
    st.lists(
        st.dictionaries(st.sampled_from(["step", "model", "mesh", "seed"]), st.integers(-1, 9), max_size=2), max_size=2
    ),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
QUICK = settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
FILES = settings(QUICK, max_examples=60)


@QUICK
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_config_values_are_read_or_refused(changes):
    tree = json.loads(json.dumps(TREE))
    for (*group, key), value in changes:
        place = tree[group[0]] if group else tree
        if isinstance(place, dict):
            place[key] = value
    try:
        cfg = read_config(tree)
        stages(cfg)
    except UserError as error:
        assert "\n" not in str(error)
        return
    sizes = (cfg.model.vocab_size, cfg.model.embed_dim, cfg.model.num_layers, *cfg.model.tokens.values())
    if max(sizes) < 2**20:  # what is no mistake can be built, if not held
        abstract_model(cfg.model)
    assert read_config(json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


@st.composite
def damages(draw):
    """What becomes of some bytes: a byte changed, a part cut out or doubled, the end cut off, or something else."""
    kind = draw(st.sampled_from(["flip", "cut", "double", "end", "replace"]))
    place, length, byte = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40)), draw(st.integers(1, 255))
    other = draw(st.sampled_from([b"", b"\0", b"null", b"[]", b"{}", b'"', b"\xff\xfe", b"1e999", b"[" * 5000]))

    def damage(raw: bytes) -> bytes:
        at = int(place * max(len(raw), 1))
        if kind == "flip" and raw:
            return raw[:at] + bytes([raw[at] ^ byte]) + raw[at + 1 :]
        if kind == "cut":
            return raw[:at] + raw[at + length :]
        if kind == "double":
            return raw[:at] + raw[at : at + length] + raw[at:]
        return raw[:at] if kind == "end" else other

    return damage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    cfg = tiny_config(
        **corpus_overrides(folder),
        steps=2,
        optimizer__warmup_steps=1,
        model__num_layers=1,
    )
    train(cfg, folder / "run")
    (folder / "tokenizer.json").write_text(train_tokenizer(["some text", "and more"], 280).to_json())
    arrays = to_official(load_trained(folder / "run").state.params)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (folder / "model.npz").write_bytes(buffer.getvalue())
    return folder


def read_or_refuse(path: pathlib.Path, damage, read):
    """Reads a file with damaged bytes; what is refused is refused in one line."""
    whole = path.read_bytes()
    try:
        path.write_bytes(damage(whole))
        read(path)
    except UserError as error:
        assert "\n" not in str(error).strip()
    finally:
        path.write_bytes(whole)


@FILES
@given(damages())
def test_configs_of_workdirs(folder, damage):
    read_or_refuse(folder / "run" / "config.json", damage, load_config)


@FILES
@given(damages())
def test_records_of_checkpoints(folder, damage):
    checkpoints = Checkpoints(folder / "run" / "checkpoints")
    good = checkpoints.record(2)

    def read(_):
        assert checkpoints.record(2) == good  # what is read is what was written

    read_or_refuse(folder / "run" / "checkpoints" / "2" / "record" / "record.json", damage, read)


@FILES
@given(damages())
def test_tokenizers(folder, damage):
    read_or_refuse(folder / "tokenizer.json", damage, lambda path: load_tokenizer(path).encode("some text, and λ"))


@FILES
@given(damages())
def test_metrics(folder, damage):
    read_or_refuse(folder / "run" / "metrics.jsonl", damage, lambda path: read_metrics(path.parent))


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz"])
def test_state_dicts(folder, name):
    @FILES
    @given(damages())
    def law(damage):
        def read(path):
            state_dict = read_state_dict(path)
            model_config(state_dict, 4, context_length=16)
            from_official(state_dict)

        read_or_refuse(folder / name, damage, read)

    law()


@settings(FILES, max_examples=25)
@given(damages(), st.sampled_from(["text", "jsonl"]))
def test_corpora(folder, damage, kind):
    """A text file or lines of JSON; damage to a text's bytes is another text, or none."""
    place = folder / f"one_{kind}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    words = "key value query token norm grow " * 40
    lines = "".join(json.dumps({"text": words + str(i)}) + "\n" for i in range(30)) if kind == "jsonl" else words * 30
    (place / ("0.jsonl" if kind == "jsonl" else "0.txt")).write_bytes(damage(lines.encode()))
    for i in range(1, 12):
        (place / f"{i}.txt").write_text(words + str(i))
    shutil.rmtree(folder / "cache2", ignore_errors=True)
    cfg = tiny_config(data__dataset="text_files", data__path=str(place), data__cache_dir=str(folder / "cache2"))
    try:
        prepare(cfg)
    except UserError as error:
        assert "\n" not in str(error)


# Of a folder of data: what an entry is named and is, and how many documents it adds.
ENTRIES = {
    "text": ("{i}.txt", 1),
    "text, in capitals": ("{i}.TXT", 1),
    "text behind a byte-order mark": ("bom{i}.txt", 1),
    "a name that is no UTF-8": ("\udcff{i}.txt", 1),
    "a name like a glob": ("[{i}]*.txt", 1),
    "lines of JSON": ("{i}.jsonl", 2),
    "another ending": ("{i}.md", 0),
    "hidden": (".{i}.txt", 0),
    "in a hidden folder": (".git{i}/x.txt", 0),
    "in a folder": ("sub{i}/x.txt", 1),
    "a link to a file that is there": ("link{i}.txt", 0),
    "a link to a file elsewhere": ("far{i}.txt", 1),
    "a link to a folder elsewhere": ("farther{i}", 1),
    "a link to the folder itself": ("circle{i}", 0),
    "a link to nothing": ("dangling{i}.txt", 0),
    "a run": ("run{i}/checkpoints/3/assets/a.txt", 0),
}


@settings(FILES, max_examples=100)
@given(st.lists(st.sampled_from(sorted(ENTRIES)), max_size=8))
def test_a_folder_holds_the_documents_that_people_put_there(kinds):
    with tempfile.TemporaryDirectory() as name:
        place, elsewhere = pathlib.Path(name) / "data", pathlib.Path(name) / "elsewhere"
        place.mkdir()
        (place / "first.txt").write_text("the first")
        expected = ["the first"]
        for i, kind in enumerate(kinds):
            path, count = place / ENTRIES[kind][0].format(i=i), ENTRIES[kind][1]
            texts = [f"text {i} {j}" for j in range(max(count, 1))]
            target = elsewhere / str(i) / "x.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True)
            target.write_text(texts[0])
            if kind.startswith("a link"):
                ends = {"there": place / "first.txt", "elsewhere": target, "itself": place, "nothing": place / "none"}
                end = ends[kind.rpartition(" ")[2]] if "folder elsewhere" not in kind else target.parent
                path.symlink_to(ends["there"] if "that is there" in kind else end)
            elif path.suffix == ".jsonl":
                path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            else:
                path.write_bytes(("\ufeff" if "mark" in kind else "").encode() + texts[0].encode())
            if kind == "a run":
                (path.parents[3] / "config.json").write_text("{}")
            expected += texts[:count]
        assert documents(place) == sorted(expected)
        assert documents(place / "**") == sorted(expected)  # the same as a glob


@settings(QUICK, max_examples=100)
@given(
    st.lists(
        st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from([0.0, 1e-45, -math.inf]), min_size=1, max_size=6
    ),
    st.floats() | st.sampled_from([0, 1e-39, 5e-324, 1e-45, 1e38]),
    st.integers(-1, 8),
    st.floats(-0.1, 1.1) | st.sampled_from([5e-324, 1e-45, 1.0]),
)
def test_a_token_is_drawn_from_those_that_are_left(logits, temperature, top_k, top_p):
    how = Sampling(temperature, top_k, top_p)
    try:
        how.check()
    except UserError as error:
        assert "\n" not in str(error)
        return
    if not any(map(math.isfinite, logits)):
        return
    drawn = int(sample(jnp.asarray([logits], jnp.float32), jax.random.key(0), how)[0])
    assert math.isfinite(logits[drawn])
    if temperature < 1e-37 or top_k == 1 or top_p < 1e-37:
        assert logits[drawn] == pytest.approx(max(logits), rel=1e-6)
