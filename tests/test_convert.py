"""Official weights in and out: the authors' numbers, bits that survive, and one line for every wrong file."""

import dataclasses
import io
import json
import pathlib
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests.commands import call, call_well, complaint
from tests.helpers import assert_trees_equal, golden_model, tiny_config, tiny_linear_config, write_corpus
from tokenformer_jax.config import MeshConfig
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage import state_dicts
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.official import (
    check_tau,
    export_official,
    from_official,
    import_official,
    model_config,
    to_official,
)
from tokenformer_jax.storage.state_dicts import read_state_dict, write_state_dict
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.storage.workdir import load_config

EMBED = "sequential.0.word_embeddings.weight"
KEYS = "sequential.3.attention.query.key_param_tokens"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz \n"


def official(name="lm_2layer.npz"):
    """The state dict of a golden file, and the arrays beside it."""
    *_, raw = golden_model(name)
    return {key.removeprefix("sd/"): value for key, value in raw.items() if key.startswith("sd/")}, raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and a tokenizer small enough for the golden models' vocabularies."""
    folder = tmp_path_factory.mktemp("convert")
    write_corpus(folder / "text")
    for name, characters in (("small", CHARACTERS), ("large", CHARACTERS + CHARACTERS.upper() + "0123456789")):
        vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(dict.fromkeys(characters))}
        tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
        (folder / f"{name}.json").write_text(json.dumps(tokenizer))
    return folder


def config(folder, name="lm_2layer.npz", **model):
    cfg, *_ = golden_model(name)
    data = {"dataset": "text_files", "path": str(folder / "text"), "cache_dir": str(folder / "cache")}
    return dataclasses.replace(
        cfg,
        steps=4,
        model=dataclasses.replace(cfg.model, **model),
        data=dataclasses.replace(cfg.data, **data, tokenizer=str(folder / "small.json")),
        optimizer=dataclasses.replace(cfg.optimizer, warmup_steps=1),
    )


@pytest.fixture(scope="module")
def imported(folder):
    """The 2-layer golden model as a workdir, written from four devices."""
    state_dict = read_state_dict(write(folder / "imported.safetensors", official()[0]))
    cfg = dataclasses.replace(config(folder), mesh=MeshConfig(1, 2, 2))
    import_official(state_dict, cfg, folder / "imported")
    return folder / "imported"


def write(path, state_dict):
    """A file as others write it, not through the code under test."""
    if path.suffix == ".npz":
        np.savez(path, **state_dict)
    elif path.suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(array) for name, array in state_dict.items()}, path)
    return path


def line(error):
    """The message of a UserError, which commands print as it is."""
    assert "\n" not in str(error.value)
    return str(error.value)


# What a converted model computes.


def check_logits(workdir, name):
    raw, run = official(name)[1], load_trained(workdir)
    graphdef, _, _ = abstract_model(run.cfg.model)
    logits, _ = nnx.merge(graphdef, run.state.params)(raw["tokens"], run.state.tau_now())
    np.testing.assert_allclose(logits, raw["logits"], atol=2e-5)


def test_a_converted_workdir_computes_the_authors_logits(imported):
    check_logits(imported, "lm_2layer.npz")


def test_a_converted_bin_computes_the_authors_logits(folder, tmp_path):
    name = "lm_rot8.npz"
    state_dict = read_state_dict(write(tmp_path / "pytorch_model.bin", official(name)[0]))
    import_official(state_dict, config(folder, name), tmp_path / "W")
    check_logits(tmp_path / "W", name)


def test_the_parameter_tree_is_the_authors_in_our_places():
    for name in ("lm_2layer.npz", "lm_rot8.npz"):
        cfg, params, _, _ = golden_model(name)
        state_dict, _ = official(name)
        assert_trees_equal(from_official(state_dict), params)
        assert model_config(state_dict, cfg.model.num_heads, context_length=cfg.model.context_length) == cfg.model


def test_a_workdir_holds_all_that_a_run_needs(imported, folder):
    checkpoints = Checkpoints(imported / "checkpoints")
    assert checkpoints.steps == [0]
    record = checkpoints.record(0)
    assert (record.tokens, record.growth) == (0, [])
    assert checkpoints.assets(0)["tokenizer"] == load_trained(imported).tokenizer.to_json()
    assert load_config(imported / "config.json").data == config(folder).data


# Bits.


@pytest.mark.parametrize("ending", state_dicts.ENDINGS)
def test_import_export_import_keeps_every_bit(tmp_path, ending):
    if ending in state_dicts.TORCH_ENDINGS:
        pytest.importorskip("torch")
    state_dict, _ = official()
    first = from_official(read_state_dict(write(tmp_path / f"theirs{ending}", state_dict)))
    write_state_dict(tmp_path / f"ours{ending}", to_official(first))
    written = read_state_dict(tmp_path / f"ours{ending}")
    assert written.keys() == state_dict.keys()
    assert_trees_equal(written, state_dict)
    assert {array.dtype for array in written.values()} == {np.dtype(np.float32)}
    assert_trees_equal(from_official(written), first)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"ours{ending}", f"theirs{ending}"]


def test_a_workdir_is_exported_bit_for_bit(imported, tmp_path):
    assert export_official(imported, tmp_path / "new" / "model.npz") == (0, 28736)
    assert_trees_equal(read_state_dict(tmp_path / "new" / "model.npz"), official()[0])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_stored_as_the_same_numbers_in_float32(tmp_path, dtype):
    half = {name: array.astype(dtype) for name, array in official()[0].items()}
    params = from_official(read_state_dict(write(tmp_path / "model.safetensors", half)))
    assert_trees_equal(to_official(params), {name: array.astype(np.float32) for name, array in half.items()})
    torch = pytest.importorskip("torch")
    kind = torch.float16 if dtype == np.float16 else torch.bfloat16
    torch.save(
        {name: torch.tensor(array.astype(np.float32)).to(kind) for name, array in half.items()}, tmp_path / "m.pt"
    )
    assert_trees_equal(from_official(read_state_dict(tmp_path / "m.pt")), params)


# Names.


def pipeline(state_dict):
    """DeepSpeed's pipeline modules: no prefix, the tied embedding apart."""
    return {
        name.replace("sequential.0.", "tied_modules.embed.").removeprefix("sequential."): array
        for name, array in state_dict.items()
    }


def test_names_of_pipeline_modules_are_understood():
    state_dict, _ = official()
    assert "tied_modules.embed.word_embeddings.weight" in pipeline(state_dict)
    assert_trees_equal(from_official(pipeline(state_dict)), from_official(state_dict))


@pytest.mark.parametrize("wrap", [("module",), ("model",), ("state_dict",), ("module", "model"), ("model", "module")])
@pytest.mark.parametrize("zipped", [True, False])
def test_wrapped_state_dicts_and_parameters_are_understood(tmp_path, wrap, zipped):
    torch = pytest.importorskip("torch")
    state_dict, _ = official()
    found = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in pipeline(state_dict).items()}
    for key in wrap:
        found = {key: found, "iteration": 3, "args": {"lr": 0.1}}
    torch.save(found, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert_trees_equal(from_official(read_state_dict(tmp_path / "model.pt")), from_official(state_dict))


def test_the_known_buffers_are_ignored():
    state_dict, _ = official()
    buffers = {
        "sequential.2.attention.rotary_emb.inv_freq": np.ones(1, np.float32),
        "sequential.3.attention.bias": np.ones((1, 1, 16, 16), bool),
        "3.attention.masked_bias": np.float32(-1e9),
    }
    assert_trees_equal(from_official(state_dict | buffers), from_official(state_dict))


# Growth.


def test_a_grown_model_is_exported_once_its_ramp_is_over(imported, folder, tmp_path):
    cfg = config(folder, qkv_tokens=32, out_tokens=48, ffn_tokens=128)
    cfg = dataclasses.replace(cfg, grow=dataclasses.replace(cfg.grow, tau_ramp=0.5))
    grow(imported, cfg, tmp_path / "grown")
    with pytest.raises(UserError) as error:
        export_official(tmp_path / "grown", tmp_path / "model.npz")
    assert "tau of query is 4.89898, " in line(error) and "sqrt(32) = 5.65685; " in line(error)
    assert not (tmp_path / "model.npz").exists()
    train(cfg, tmp_path / "grown")
    export_official(tmp_path / "grown", tmp_path / "model.npz")
    exported = read_state_dict(tmp_path / "model.npz")
    assert exported.keys() == official()[0].keys()
    assert exported[KEYS].shape == (32, 32)
    assert exported["sequential.2.attention.proj.value_param_tokens"].shape == (48, 32)
    assert exported["sequential.3.mlp.key_param_tokens"].shape == (128, 32)
    assert_trees_equal(from_official(exported), load_trained(tmp_path / "grown").state.params)


def test_a_tau_kept_for_good_cannot_be_exported(imported):
    run = load_trained(imported)
    tau = run.state.tau_now()
    check_tau(tau, run.cfg.model, "W")
    with pytest.raises(UserError) as error:
        check_tau(tau | {"ffn": 7.0}, run.cfg.model, "W")
    assert "W: tau of ffn is 7, " in line(error) and "grow.tau_ramp" in line(error)


# Mistakes.


def without(state_dict, *names):
    return {name: array for name, array in state_dict.items() if name not in names}


def three_layers(state_dict):
    """The names of a third layer, but the final norm of two."""
    third = {name.replace(".3.", ".4.", 1): array for name, array in state_dict.items() if ".3." in name}
    return state_dict | third


WRONG_TENSORS = {
    "missing": (lambda sd: without(sd, KEYS), f"lacks {KEYS}"),
    "several missing": (lambda sd: without(sd, *list(sd)[1:6]), "attention.key.key_param_tokens and 2 more"),
    "no embedding": (lambda sd: without(sd, EMBED), f"lacks {EMBED}"),
    "extra": (lambda sd: sd | {"sequential.2.mlp.bias": np.ones(3)}, "adds sequential.2.mlp.bias"),
    "a layer too many": (three_layers, "of 3 layers: it lacks sequential.6.norm.weight"),
    "a layer too few": (
        lambda sd: {name: array for name, array in sd.items() if ".3." not in name},
        "of 1 layers: it lacks sequential.4.norm.weight",
    ),
    "another model": (lambda sd: {"transformer.wte.weight": sd[EMBED]}, "adds transformer.wte.weight"),
    "under two names": (lambda sd: sd | {KEYS.removeprefix("sequential."): sd[KEYS]}, "twice"),
    "shape": (lambda sd: sd | {KEYS: sd[KEYS][:-1]}, f"{KEYS} has shape [23, 32], the other tensors ask for [24, 32]"),
    "width": (lambda sd: sd | {EMBED: sd[EMBED][:, :-1]}, "has shape [24, 32], the other tensors ask for [24, 31]"),
    "axes": (lambda sd: sd | {EMBED: sd[EMBED].ravel()}, f"{EMBED} has shape [2048]"),
    "dtype": (lambda sd: sd | {KEYS: sd[KEYS].astype(np.int8)}, f"{KEYS} is int8"),
    "double": (lambda sd: sd | {KEYS: sd[KEYS].astype(np.float64)}, f"{KEYS} is float64"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_named(case):
    change, names = WRONG_TENSORS[case]
    with pytest.raises(UserError) as error:
        from_official(change(official()[0]), "file.npz")
    assert names in line(error) and line(error).startswith("file.npz: ")


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def code_in_bin(path):
    pytest.importorskip("torch").save({EMBED: Evil(path.with_name("evil"))}, path)


def plain_code(path):
    path.write_bytes(pickle.dumps({EMBED: Evil(path.with_name("evil"))}, protocol=2))


def objects_in_npz(path):
    np.savez(path, **{EMBED: np.array([Evil(path.with_name("evil"))], object)})


def truncated(path):
    write(path, official()[0])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def torch_file(value):
    return lambda path: pytest.importorskip("torch").save(value(pytest.importorskip("torch")), path)


def itself(torch):
    found = {}
    found["module"] = found
    return found


WRONG_FILES = [
    ("code.bin", code_in_bin, "whose code is never run"),
    ("code.pt", plain_code, "whose code is never run"),
    ("objects.npz", objects_in_npz, "cannot be read"),
    ("cut.bin", truncated, "cannot be read"),
    ("cut.safetensors", truncated, "damaged"),
    ("cut.npz", truncated, "damaged"),
    ("empty.bin", lambda path: path.touch(), "cannot be read"),
    ("empty.safetensors", lambda path: path.touch(), "cannot be read"),
    ("empty.npz", lambda path: path.touch(), "cannot be read"),
    ("text.pth", lambda path: path.write_text("hello world"), "cannot be read"),
    ("text.safetensors", lambda path: path.write_text("hello world"), "cannot be read"),
    ("array.npz", lambda path: np.save(path.open("wb"), np.ones(3)), "cannot be read"),
    ("nothing.npz", lambda path: np.savez(path), "holds nothing"),
    ("list.pt", torch_file(lambda torch: [torch.ones(2)]), "holds list"),
    ("number.pt", torch_file(lambda torch: {EMBED: 3}), f"'{EMBED}' is a int"),
    ("sparse.pt", torch_file(lambda torch: {EMBED: torch.ones(2, 2).to_sparse()}), "not a dense tensor"),
    ("itself.pt", torch_file(itself), "not a state dict"),
    ("folder.npz", lambda path: path.mkdir(), "no such file"),
    ("none.safetensors", lambda path: None, "no such file"),
    ("model.onnx", lambda path: path.touch(), "must end in .bin, .pt, .pth, .safetensors or .npz"),
    ("model", lambda path: path.touch(), "must end in"),
]


@pytest.mark.parametrize("name, make, names", WRONG_FILES, ids=[name for name, *_ in WRONG_FILES])
def test_wrong_files_are_refused_in_one_line_and_run_no_code(tmp_path, name, make, names):
    if pathlib.Path(name).suffix in state_dicts.TORCH_ENDINGS:
        pytest.importorskip("torch")
    make(tmp_path / name)
    with pytest.raises(UserError) as error:
        read_state_dict(tmp_path / name)
    assert names in line(error) and name in line(error)
    assert not (tmp_path / "evil").exists()


def test_the_malicious_files_would_run_if_they_were_unpickled(tmp_path):
    pickle.Unpickler(io.BytesIO(pickle.dumps(Evil(tmp_path / "evil")))).load().close()
    assert (tmp_path / "evil").exists()


def test_torch_files_need_torch_and_the_others_do_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("model.bin", "model.pt", "model.pth"):
        (tmp_path / name).touch()
        for use in (lambda: read_state_dict(tmp_path / name), lambda: write_state_dict(tmp_path / name, {})):  # noqa: B023
            with pytest.raises(UserError) as error:
                use()
            assert "needs torch, which is not installed; use .safetensors or .npz" in line(error)
    for name in ("model.safetensors", "model.npz"):
        write_state_dict(tmp_path / name, official()[0])
        assert_trees_equal(read_state_dict(tmp_path / name), official()[0])


def test_an_export_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "taken").touch()
    for ending in (".npz", ".safetensors"):
        with pytest.raises(UserError) as error:
            write_state_dict(tmp_path / "taken" / f"model{ending}", official()[0])
        assert "cannot be written" in line(error)
        (tmp_path / f"folder{ending}" / "full").mkdir(parents=True)
        with pytest.raises(UserError) as error:
            write_state_dict(tmp_path / f"folder{ending}", official()[0])
        assert "cannot be written" in line(error)
    assert not list(tmp_path.glob("*partial*"))


def test_sizes_tokenizer_and_workdir_must_fit(folder, imported, tmp_path):
    def attempt(cfg, workdir=tmp_path / "W"):
        with pytest.raises(UserError) as error:
            import_official(official()[0], cfg, workdir, "file.npz")
        return line(error)

    message = attempt(config(folder, num_layers=3, ffn_tokens=64))
    assert "model.num_layers = 3 for the file's 2, model.ffn_tokens = 64 for the file's 96" in message
    linear = dataclasses.replace(config(folder), model=tiny_linear_config().model)
    assert "model.projection = 'linear' for the file's 'pattention'" in attempt(linear)
    large = config(folder)
    large = dataclasses.replace(large, data=dataclasses.replace(large.data, tokenizer=str(folder / "large.json")))
    assert "has 65 ids, but file.npz embeds 64" in attempt(large)
    assert "holds something already" in attempt(config(folder), imported)
    assert not (tmp_path / "W").exists()


def test_a_plain_transformer_cannot_be_exported(tmp_path):
    (tmp_path / "config.json").write_text(tiny_linear_config().to_json())
    with pytest.raises(UserError) as error:
        export_official(tmp_path, tmp_path / "model.npz")
    assert "model.projection = 'linear'" in line(error)


def test_a_tanh_gelu_cannot_be_exported(tmp_path):
    (tmp_path / "config.json").write_text(tiny_config(model__gelu="tanh").to_json())
    with pytest.raises(UserError) as error:
        export_official(tmp_path, tmp_path / "model.npz")
    assert "model.gelu = 'tanh'" in line(error)


# The command.


CONFIG = """
from configs import base

def get_config(variant="right"):
    config = base.get_config()
    config.model.update({model!r})
    config.data.update(dataset="text_files", path={text!r}, cache_dir={cache!r})
    config.model.num_heads = 4 if variant == "right" else 3
    return config
"""


@pytest.fixture(scope="module")
def files(folder):
    """A config file and the golden model in a file, for the command."""
    model = dataclasses.asdict(config(folder).model)
    (folder / "config.py").write_text(
        CONFIG.format(model=model, text=str(folder / "text"), cache=str(folder / "cache"))
    )
    write(folder / "model.npz", official()[0])
    return folder


def test_the_command_converts_both_ways(files):
    config, tokenizer = f"--config={files}/config.py", f"--tokenizer={files}/small.json"
    result = call("convert", f"--from_torch={files}/model.npz", f"--workdir={files}/W", config, tokenizer)
    assert result.returncode == 0, result.stderr
    assert "28,736 parameters" in result.stdout and "warning" not in result.stdout
    call_well("generate", f"--workdir={files}/W", "--prompt=key value", "--max_tokens=4")
    call_well("convert", f"--to_torch={files}/out.safetensors", f"--workdir={files}/W", "--step=0")
    assert_trees_equal(read_state_dict(files / "out.safetensors"), official()[0])


WRONG_FLAGS = [
    ("--from_torch={f}/model.npz --to_torch={f}/o.npz --workdir={f}/w", "give one of them"),
    ("--from_torch={f}/model.npz --workdir={f}/w --num_heads=4", "--context_length is missing"),
    ("--from_torch={f}/model.npz --workdir={f}/w --num_heads=3 --context_length=16", "use 2 or 4"),
    ("--from_torch={f}/model.npz --workdir={f}/w --config={f}/config.py --num_heads=4", "--config.model.num_heads"),
]


@pytest.mark.parametrize("args, names", WRONG_FLAGS, ids=[names for _, names in WRONG_FLAGS])
def test_a_mistake_gives_one_line_and_exit_code_2(files, args, names):
    assert names in complaint(call("convert", *args.format(f=files).split()))
    assert not (files / "w").exists()
