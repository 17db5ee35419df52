"""Laws of adapters as files: the base with one is the adapted run, without it itself, and no other takes it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.commands import call, call_well, complaint
from tests.helpers import assert_trees_equal, corpus_overrides, tiny_config, write_corpus
from tokenformer_jax.api import TokenFormer
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.inspection import inspect_run
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.adapters import export_adapter, load_part, read_adapter
from tokenformer_jax.storage.trained import load_trained

pytestmark = pytest.mark.usefixtures("steps_are_shared")
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two runs that adapt it to texts of their own, and the adapters' files."""
    folder = tmp_path_factory.mktemp("adapters")
    text = corpus_overrides(folder)
    base = tiny_config(**text)
    train(base, folder / "base")
    for number, (name, sizes) in enumerate({"a": {"model__ffn_tokens": 112}, "b": {"model__qkv_tokens": 32}}.items()):
        cfg = tiny_config(**sizes, **MESH, **text, grow__train="new", steps=16, optimizer__peak_learning_rate=0.05)
        path = write_corpus(folder / f"text_{name}", seed=number + 1)
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=str(path)))
        grow(folder / "base", cfg, folder / name)
        train(cfg, folder / name)
        export_adapter(folder / name, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 2, 2, 2)])
def test_the_base_with_an_adapter_is_the_adapted_run_to_the_bit(folder, mesh):
    for name in ("a", "b"):
        run, put_on = (
            load_trained(folder / name, mesh=mesh),
            load_part(folder / "base", mesh=mesh, paths=[file(folder, name)]),
        )
        assert put_on.fingerprint == run.fingerprint
        assert put_on.cfg.model == run.cfg.model and put_on.num_params == run.num_params
        assert_trees_equal(put_on.state.params, run.state.params)
        assert [a.sharding for a in jax.tree.leaves(put_on.state)] == [a.sharding for a in jax.tree.leaves(run.state)]


def test_a_file_holds_new_tokens_alone(folder):
    arrays = load_file(file(folder, "a"))
    assert {name: x.shape for name, x in arrays.items()} == {"ffn.keys": (2, 16, 32), "ffn.values": (2, 16, 32)}
    assert file(folder, "a").stat().st_size < 4 * 2 * 2 * 16 * 32 + 4000
    adapter, base = read_adapter(file(folder, "a")), load_trained(folder / "base")
    assert adapter.base == base.fingerprint and adapter.base_tau["ffn"] == float(base.state.tau_now()["ffn"])
    assert adapter.tau["ffn"] == pytest.approx(112**0.5) and adapter.history["step"] == 16


def test_several_are_appended_and_tau_adds_up(folder):
    both = load_part(folder / "base", mesh=(1, 2, 2, 2), paths=[file(folder, "a"), file(folder, "b")])
    a, b = (load_trained(folder / name) for name in ("a", "b"))
    assert both.cfg.model.tokens == {"query": 32, "key": 32, "value": 32, "out": 40, "ffn": 112}
    for run, name in ((a, "ffn"), (b, "query"), (b, "value")):
        assert_trees_equal(both.state.params["blocks"][name], run.state.params["blocks"][name])
    twice = load_part(folder / "base", mesh=(1, 1, 1, 4), paths=[file(folder, "a")] * 2)
    assert twice.cfg.model.ffn_tokens == 128
    assert float(twice.state.tau_now()["ffn"]) == pytest.approx(128**0.5)


def test_python_puts_them_on_and_takes_them_off(folder):
    base, run = TokenFormer.load(folder / "base"), TokenFormer.load(folder / "a")
    ids = np.arange(12).reshape(1, 12)
    before = np.asarray(base.logits(ids))
    put_on = base.adapted(file(folder, "a"))
    assert put_on.tau == run.tau
    assert_trees_equal(put_on.params, run.params)
    assert np.any(np.asarray(put_on.logits(ids)) != before)
    np.testing.assert_array_equal(base.logits(ids), before)
    with pytest.raises(UserError, match="was trained on the model"):
        put_on.adapted(file(folder, "b"))


def file(folder, name):
    return folder / f"{name}.safetensors"


def test_mistakes_are_named(folder, tmp_path):
    data = file(folder, "a").read_bytes()
    (tmp_path / "flipped.safetensors").write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    (tmp_path / "cut.safetensors").write_bytes(data[:-9])
    save_file({"ffn.keys": np.zeros((2, 16, 32), np.float32)}, tmp_path / "plain.safetensors")
    for name, why in {
        "flipped": "damaged: its checksum differs",
        "cut": "cannot be read: damaged, or no .safetensors",
        "plain": "holds tensors, but no adapter",
        "none": "there is no such file",
    }.items():
        with pytest.raises(UserError, match=rf"{name}\.safetensors: {why}"):
            load_part(folder / "base", paths=[tmp_path / f"{name}.safetensors"])
    with pytest.raises(UserError, match=r"a\.safetensors: was trained on the model .* but step 16 of .*/b is .*; use"):
        load_part(folder / "b", paths=[file(folder, "a")])
    with pytest.raises(UserError, match=r"base: has no tokens that learnt alone; grow --train=new"):
        export_adapter(folder / "base", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export_adapter(folder / "a", tmp_path / "x.npz")


@pytest.mark.slow
def test_the_commands_take_them(folder, tmp_path):
    out = call_well("convert", f"--workdir={folder}/a", f"--to_adapter={tmp_path}/a.safetensors")
    assert "2,048 parameters that learnt alone" in out and "--adapter=" in out
    assert (tmp_path / "a.safetensors").read_bytes() == file(folder, "a").read_bytes()
    same = f"--adapter={tmp_path}/a.safetensors"
    figures = {}
    for name, flags in (("base", [same]), ("a", ["--config.data.path=" + str(folder / "text")]), ("base", [])):
        call_well("evaluate", f"--workdir={folder}/{name}", "--mesh=1,1,1", f"--out={tmp_path}/eval.json", *flags)
        figures[name + " on" * bool(flags)] = json.loads((tmp_path / "eval.json").read_text())
    assert figures["base on"]["loss"] == figures["a on"]["loss"] != figures["base"]["loss"]
    assert figures["base on"]["adapters"] == [str(tmp_path / "a.safetensors")] and "adapters" not in figures["base"]
    text = call_well("generate", f"--workdir={folder}/base", same, "--prompt=key", "--max_tokens=4", "--seed=1")
    assert text == call_well(
        "generate", f"--workdir={folder}/a", "--mesh=1,1,1", "--prompt=key", "--max_tokens=4", "--seed=1"
    )
    assert "was trained on the model" in complaint(call("generate", f"--workdir={folder}/b", same))


def test_inspect_tells_what_each_adapter_does(folder):
    run = load_part(folder / "base", mesh=(1, 2, 2, 2), paths=[file(folder, "a"), file(folder, "b")])
    found = inspect_run(run, "validation", {})
    assert found["adapters"] == [str(file(folder, name)) for name in "ab"]
    cohorts = {name: of["cohorts"] for name, of in found["projections"].items()}
    assert cohorts["ffn"] == {"start": [0, 96], "a": [96, 112]}
    assert cohorts["query"] == {"start": [0, 24], "b": [24, 32]}
    assert cohorts["out"] == {"start": [0, 40]}
    for of in (found["projections"]["ffn"], found["projections"]["query"]):
        for layer in of["layers"]:
            assert sum(layer["cohort_shares"].values()) == pytest.approx(1)
            assert min(layer["cohort_shares"].values()) > 0
