"""Published models come in: from a folder and from a hub, whole or in parts, and one line for every mistake."""

import dataclasses
import json
import shutil
import socket
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from tests.commands import call, complaint
from tests.helpers import assert_trees_equal, corpus_overrides, tiny_config, write_config
from tests.hub_server import COMMIT, serving
from tokenformer_jax.api import TokenFormer
from tokenformer_jax.config import read_config
from tokenformer_jax.configs import ladder, pile, released
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.errors import UserError
from tokenformer_jax.nn.language import init_params
from tokenformer_jax.storage.hub import import_published, read_published
from tokenformer_jax.storage.official import from_official, name_table, to_official
from tokenformer_jax.storage.trained import load_trained

EMBED = "sequential.0.word_embeddings.weight"
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """What makes a config read a corpus."""
    return corpus_overrides(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def cfg(corpus):
    return tiny_config(**corpus)


@pytest.fixture(scope="module")
def arrays(cfg):
    return to_official(init_params(cfg.model, jax.random.key(0)))


@pytest.fixture(scope="module")
def published(tmp_path_factory, cfg, arrays):
    """A folder in the form of the authors' repositories: half precision, and no word on the heads."""
    folder = tmp_path_factory.mktemp("published")
    write_weights(folder, arrays, np.float16)
    (folder / "tokenizer.json").write_text(prepare(cfg).tokenizer.to_json())
    (folder / "config.json").write_text('{"num_attention_heads": 4, "seq_length": 16, "rotary_pct": 0.25}')
    (folder / "README.md").write_text("not needed")
    return folder


def write_weights(folder, arrays, dtype, ending=".safetensors", parts=1):
    """Writes weights whole or in parts, as others do."""
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[ending]
    names = [f"{stem}-{part + 1:05}-of-{parts:05}{ending}" for part in range(parts)] if parts > 1 else [stem + ending]
    where = {tensor: names[i % parts] for i, tensor in enumerate(arrays)}
    for name in names:
        tensors = {tensor: arrays[tensor] for tensor in arrays if where[tensor] == name}
        if ending == ".bin":
            torch = pytest.importorskip("torch")
            kind = getattr(torch, np.dtype(dtype).name)
            torch.save({tensor: torch.tensor(array).to(kind) for tensor, array in tensors.items()}, folder / name)
        else:
            save_file({tensor: array.astype(dtype) for tensor, array in tensors.items()}, folder / name)
    if parts > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index))


def line(name):
    """What is said of a mistake."""
    with pytest.raises(UserError) as error:
        read_published(str(name))
    assert "\n" not in str(error.value)
    return str(error.value)


# Folders.


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: np.dtype(dtype).name)
def test_weights_of_every_form_are_the_same_numbers(tmp_path, arrays, dtype, ending, parts):
    write_weights(tmp_path, arrays, dtype, ending, parts)
    found = from_official(read_published(str(tmp_path)).arrays)
    rounded = {name: array.astype(dtype).astype(np.float32) for name, array in arrays.items()}
    assert_trees_equal(to_official(found), rounded)


def test_a_folder_becomes_a_workdir_in_one_step(published, corpus, cfg, arrays, tmp_path):
    found = read_published(str(published))
    done = import_published(found, with_data(found.config(found.known), corpus), tmp_path / "W", None)
    run = load_trained(tmp_path / "W")
    assert run.cfg.model == dataclasses.replace(cfg.model, dropout=0.0, remat="none")
    assert run.tokenizer.to_json() == (published / "tokenizer.json").read_text()
    rounded = {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()}
    assert_trees_equal(to_official(run.state.params), rounded)
    assert "num_heads = 4, context_length = 16, rotary_fraction = 0.25 as its config.json says" in done


def test_python_takes_it_too(published, arrays, tmp_path):
    model = TokenFormer.from_hub(str(published))
    assert (model.cfg.num_heads, model.cfg.context_length) == (4, 16)
    assert_trees_equal(model.params, from_official(read_published(str(published)).arrays))
    assert model.tokenizer.to_json() == (published / "tokenizer.json").read_text()
    (copied(published, tmp_path) / "config.json").unlink()
    with pytest.raises(UserError, match=r"num_heads is missing: .*copy does not say it"):
        TokenFormer.from_hub(str(tmp_path / "copy"), context_length=16)
    assert TokenFormer.from_hub(str(tmp_path / "copy"), context_length=9, num_heads=2).cfg.num_heads == 2


def with_data(cfg, corpus):
    data = {key.removeprefix("data__"): value for key, value in corpus.items()}
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **data))


@pytest.mark.parametrize("preset, variant", [(pile, "450m"), (pile, "1b5"), (released, "757m")])
def test_heads_of_the_authors_models_are_those_of_the_preset(tmp_path, preset, variant):
    torch = pytest.importorskip("torch")
    model = read_config(preset.get_config(variant).to_dict()).model
    zero = torch.zeros((), dtype=torch.float16)  # a file holds it once, whatever the shape
    torch.save({name: zero.expand(shape) for name, shape in shapes(model).items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox", "num_attention_heads": 64}')
    found = read_published(str(tmp_path))
    keys = ("num_heads", "context_length", "rotary_fraction")
    assert [found.known[key] for key in keys] == [getattr(model, key) for key in keys]
    assert found.by == f"the preset {preset.__name__.rpartition('.')[2]}:{variant}"


def shapes(model):
    """Of the official tensors."""
    counts = {"query": model.qkv_tokens, "out": model.out_tokens, "ffn": model.ffn_tokens}
    found = {}
    for name, slot in name_table(model.num_layers).items():
        if slot.path[0] == "blocks":
            found[name] = (counts.get(slot.path[1], model.qkv_tokens), model.embed_dim)
        else:
            found[name] = (model.vocab_size, model.embed_dim) if slot.path == ("embed",) else (model.embed_dim,)
    return found


def test_no_two_presets_of_published_models_have_the_same_sizes():
    keys = ("vocab_size", "num_layers", "embed_dim", "qkv_tokens", "out_tokens", "ffn_tokens")
    models = {(preset, v): preset.get_config(v).model for preset in (pile, released) for v in preset.VARIANTS}
    sizes = {name: tuple(model[key] for key in keys) for name, model in models.items()}
    same = [name for name in sizes if list(sizes.values()).count(sizes[name]) > 1]
    assert [variant for _, variant in same] == ["757m", "757m_120k"]  # one model
    assert ladder.get_config("124m").model.qkv_tokens == 576  # which nobody published


# A hub.


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """A server with the published folder, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    with serving({"owner/model": published}, gated="owner/gated") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join([server.url, *template[1:]]))
        yield server


def test_what_is_needed_is_loaded_once_and_then_without_a_network(hub, published, monkeypatch):
    expected = read_published(str(published))
    for name in ("owner/model", f"owner/model@{COMMIT}", "owner/model@main"):
        found = read_published(name)
        assert_trees_equal(found.arrays, expected.arrays)
        assert found.known == expected.known and found.tokenizer.endswith("tokenizer.json")
        assert sorted(hub.loads) == [("config.json", ""), ("model.safetensors", ""), ("tokenizer.json", "")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_trees_equal(read_published("owner/model").arrays, expected.arrays)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    assert_trees_equal(read_published("owner/model").arrays, expected.arrays)
    assert f"{nobody} cannot be reached, and the cache" in line("owner/other")


def test_a_download_that_breaks_goes_on_where_it_broke(hub, published):
    size = (published / "model.safetensors").stat().st_size
    hub.cut["model.safetensors"] = [size // 2]
    assert_trees_equal(read_published("owner/model").arrays, read_published(str(published)).arrays)
    asked = [int(asked.removeprefix("bytes=")[:-1]) for name, asked in hub.loads if name[0] == "m" and asked]
    assert len(asked) == 1 and 0 < asked[0] <= size // 2


def test_parts_that_are_there_are_not_loaded_again(hub, arrays, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    write_weights(folder, arrays, np.float32, ".safetensors", 3)
    hub.repositories["owner/parts"] = folder
    part = "model-00003-of-00003.safetensors"
    hub.refused = {("GET", part)}
    assert "the download ended early (403 Forbidden" in line("owner/parts")
    hub.refused = {("HEAD", part)}
    assert f"{hub.url} answers 403, and the cache {tmp_path}/cache does not hold all" in line("owner/parts")
    hub.refused = set()
    hub.loads.clear()
    assert_trees_equal(read_published("owner/parts").arrays, arrays)
    assert hub.loads == [(part, "")]


def test_safetensors_are_taken_where_there_are_both(hub, arrays, tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    for ending in (".safetensors", ".bin"):
        write_weights(folder, arrays, np.float32, ending)
    hub.repositories["owner/both"] = folder
    assert_trees_equal(read_published("owner/both").arrays, arrays)
    assert hub.loads == [("model.safetensors", "")]
    (folder / "model.safetensors").unlink()
    (folder / "modeling_other.py").touch()
    hub.repositories["owner/bin"] = folder
    assert_trees_equal(read_published("owner/bin").arrays, arrays)
    assert {name for name, _ in hub.loads} == {"model.safetensors", "pytorch_model.bin"}


@pytest.mark.slow
def test_the_command_takes_the_hub_that_the_environment_names(published, corpus, tmp_path):
    cfg = write_config(tmp_path / "config.py", tiny_config(**corpus))
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with serving({"owner/model": published}) as server:
        args = ("convert", "--from_hub=owner/model", f"--workdir={tmp_path}/W", cfg)
        result = call(*args, HF_ENDPOINT=server.url, **environment)
        loads = list(server.loads)
        again = call(*args, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "other"))
        assert "W: holds something already" in complaint(again) and server.loads == loads  # before any download
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{tmp_path}/W: 36,288 parameters of owner/model" in result.stdout and "warning" not in result.stdout
    call_args = ("convert", "--from_hub=owner/model", f"--workdir={tmp_path}/W2", cfg)
    assert call(*call_args, HF_ENDPOINT=server.url, **environment, **OFFLINE).returncode == 0


# Mistakes.


def test_what_the_hub_refuses_is_said_in_a_line(hub, monkeypatch):
    assert f"no such folder here, and no such repository on {hub.url}" in line("owner/none")
    assert "is gated: ask for access" in line("owner/gated")
    assert "has no revision 'other'" in line("owner/model@other")
    assert "has no revision 'refs/pr/1'" in line("owner/model@refs/pr/1")
    assert "is no name of a repository" in line("owner/-x..")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and the cache" in line("owner/model")


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "needs huggingface_hub, which is not installed; use `pip install huggingface_hub`" in line("owner/model")


@pytest.mark.parametrize(
    "name, said",
    [
        ("https://huggingface.co/owner/model", "is a URL; use OWNER/NAME"),
        ("{f}/README.md", "is a file; use --from_torch"),
        ("./none", "no such folder"),
        ("{f}/none", "no such folder"),
        ("none", "no such folder; use a folder, or OWNER/NAME"),
    ],
)
def test_names_of_nothing_are_refused(published, name, said):
    assert said in line(name.format(f=published))


def test_what_nothing_says_is_asked_for(published, tmp_path):
    folder = copied(published, tmp_path)
    (folder / "config.json").unlink()
    ended = call("convert", f"--from_hub={folder}", f"--workdir={tmp_path}/W")
    assert f"--num_heads is missing: {folder} does not say it" in complaint(ended)
    ended = call("convert", f"--from_hub={folder}", f"--workdir={tmp_path}/W", "--num_heads=3", "--context_length=16")
    assert "model.num_heads = 3: must divide model.embed_dim = 32; use 2 or 4" in complaint(ended)
    assert not (tmp_path / "W").exists()


def copied(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def change_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def in_parts(change):
    """Weights in parts, with a change of their index."""

    def make(folder):
        arrays = {name: array.astype(np.float32) for name, array in read_published(str(folder)).arrays.items()}
        (folder / "model.safetensors").unlink()
        write_weights(folder, arrays, np.float32, ".safetensors", 3)
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return make


def missing_part(folder):
    in_parts(lambda index: index)(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def in_the_first(tensor, before=""):
    return lambda index: {"weight_map": index["weight_map"] | {tensor: f"{before}model-00001-of-00003.safetensors"}}


WRONG_FOLDERS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights (model.safetensors, "),
    "broken config": (change_config("{"), "config.json: not readable JSON"),
    "config of a list": (change_config("[]"), "config.json: holds list"),
    "τ of a text": (change_config('{"model_type": "tokenformer", "tau": 3}'), "tau = 3: must be a number for each of"),
    "τ of none": (change_config('{"model_type": "tokenformer", "tau": {"query": 1}}'), "must be a number for each of"),
    "missing part": (missing_part, "lacks model-00002-of-00003.safetensors, 1 of the 3 files"),
    "part elsewhere": (
        in_parts(in_the_first(EMBED, "../")),
        "has no weight_map from tensors to .safetensors files",
    ),
    "no map": (in_parts(lambda index: {}), "has no weight_map"),
    "tensor of no part": (in_parts(in_the_first("x")), "model-00001-of-00003.safetensors lacks x, which"),
    "another model": (lambda folder: save_file({"wte": np.ones((2, 2))}, folder / "model.safetensors"), "adds wte"),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_wrong_folders_are_refused_in_one_line(published, tmp_path, case):
    change, said = WRONG_FOLDERS[case]
    folder = copied(published, tmp_path)
    change(folder)
    assert said in line(folder) and str(folder) in line(folder)


def test_a_wrong_shape_is_named(published, cfg, tmp_path):
    folder = copied(published, tmp_path)
    found = read_published(str(folder))
    bias = "sequential.5.norm.bias"
    save_file(dict(found.arrays) | {bias: np.ones(31, np.float16)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"{bias} has shape \[31\], the other tensors ask for \[32\]"):
        import_published(read_published(str(folder)), cfg, tmp_path / "W", None)
    assert not (tmp_path / "W").exists()
