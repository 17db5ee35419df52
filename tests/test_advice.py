"""What a run's messages advise works: each advice is taken from the message and tried."""

import dataclasses
import re
import shutil

import pytest

from tests.helpers import corpus_overrides, tiny_tree, write_corpus
from tokenformer_jax.config import read_config
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.shrink import shrink
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("steps_are_shared")

RUNG = {"step": 2, "model": {"ffn_tokens": 128}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Makes a config that reads a small corpus, with overrides of keys."""
    data = corpus_overrides(tmp_path_factory.mktemp("advice"))
    small = {"steps": 4, "optimizer__warmup_steps": 1, "model__num_layers": 1, "eval_every": 0, "checkpoint_every": 0}
    return lambda **overrides: read_config(tiny_tree(**data | small | overrides).to_dict())


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(config(), workdir)
    return workdir


def refusal(cfg, workdir):
    with pytest.raises(UserError) as error:
        train(cfg, workdir)
    assert "\n" not in str(error.value)
    return str(error.value)


def follow(config, said, overrides):
    """The config with the flags that a message names."""
    flags = re.findall(r"--config\.([\w.]+)=(\w+)", said)
    types = {key: type(value) for key, value in dataclasses.asdict(config().model).items()}
    values = {key.replace(".", "__"): types[key.removeprefix("model.")](value) for key, value in flags}
    return config(**overrides | values)


OTHER = [
    {"model__num_layers": 2},
    {"model__vocab_size": 304},
    {"model__normalizer": "gelu_l2_norm"},
    {"model__gelu": "tanh", "model__context_length": 8},
    {"model__num_layers": 2, "model__num_heads": 2, "model__embed_dim": 16},
    {"model__tau_tokens": 9, "model__ffn_tokens": 128},
    {"model__projection": "linear", "model__qkv_tokens": 0, "model__out_tokens": 0},
]


@pytest.mark.parametrize("other", OTHER)
def test_another_model_is_told_what_to_use_in_flags_and_no_growth_that_cannot_be(config, run, tmp_path, other):
    shutil.copytree(run, tmp_path / "run")
    said = refusal(config(steps=5, **other), tmp_path / "run")
    assert all(f"model.{key.removeprefix('model__')} = {value!r}" in said for key, value in other.items())
    assert "another --workdir" in said and "grow" not in said
    train(follow(config, said, {"steps": 5} | other), tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps[-1] == 5
    if other is OTHER[-1]:  # compiled for one of them
        assert train(config(steps=2, **other), tmp_path / "another")


@pytest.mark.parametrize(
    "other, change",
    [
        ({"model__ffn_tokens": 128}, grow),
        ({"model__qkv_tokens": 32, "model__out_tokens": 48}, grow),
        ({"model__out_tokens": 80, "grow__recipe": "split"}, grow),
        ({"model__ffn_tokens": 48}, shrink),
        ({"model__qkv_tokens": 8, "model__out_tokens": 8}, shrink),
    ],
)
def test_other_token_counts_are_told_how_to_get_there(config, run, tmp_path, other, change):
    cfg = config(steps=7, **other)
    said = refusal(cfg, run)
    assert f"tokenformer_jax.grow{' --shrink' * (change is shrink)} --source={run} --workdir=NEW" in said
    change(run, cfg, tmp_path / "new")
    train(cfg, tmp_path / "new")
    assert Checkpoints(tmp_path / "new" / "checkpoints").steps[-1] == 7


@pytest.mark.parametrize(
    "other",
    [
        {"model__ffn_tokens": 128, "model__qkv_tokens": 8},  # neither larger nor smaller
        {"model__out_tokens": 81, "grow__recipe": "split"},
    ],
)
def test_token_counts_that_neither_way_leads_to_are_told_none(config, run, other):
    assert "grow" not in refusal(config(steps=7, **other), run)


@pytest.mark.parametrize("other", [{"seed": 1}, {"data__path": "other"}, {"data__path": "other", "seed": 2}])
def test_other_data_are_told_how_to_go_on_with_them(config, run, tmp_path, other):
    if "data__path" in other:
        other = other | {"data__path": str(write_corpus(tmp_path / "other", seed=1))}
    cfg = config(steps=7, **other)
    said = refusal(cfg, run)
    assert f"tokenformer_jax.grow --source={run} --workdir=NEW" in said
    grow(run, cfg, tmp_path / "new")
    train(cfg, tmp_path / "new")
    assert Checkpoints(tmp_path / "new" / "checkpoints").steps[-1] == 7


def test_a_ladder_that_changed_is_told_what_it_was(config, tmp_path):
    cfg = config(rungs=(RUNG,))
    train(cfg, tmp_path)
    for count in (112, 160):
        said = refusal(config(rungs=({**RUNG, "model": {"ffn_tokens": count}},)), tmp_path)
        assert f"rungs[0].model.ffn_tokens = {count}" in said and said.endswith("use 128")
    assert "use the rungs of its config.json" in refusal(config(), tmp_path)
    assert train(cfg, tmp_path)


@pytest.mark.parametrize(
    "overrides, settings",
    [
        ({}, {"mesh.data": "8"}),
        pytest.param({"mesh__tensor": 2}, {"mesh.data": "4"}, marks=pytest.mark.slow),
        pytest.param({"mesh__fsdp": 2, "mesh__data": 2}, {"mesh.data": "4"}, marks=pytest.mark.slow),
        pytest.param({"batch_size": 6}, {"mesh.data": "8", "batch_size": "8"}, marks=pytest.mark.slow),
        ({"batch_size": 20, "accumulation": 2, "mesh__tensor": 2}, {"mesh.data": "4", "batch_size": "24"}),
    ],
)
def test_devices_that_are_not_used_are_told_with_what_uses_them(config, tmp_path, capsys, overrides, settings):
    assert train(config(steps=2, **overrides), tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "8 devices" in line]
    assert len(said) == 1 and said[0].startswith("only ")
    assert dict(re.findall(r"--config\.([\w.]+)=(\w+)", said[0])) == settings
    more = {key.replace(".", "__"): int(value) for key, value in settings.items()}
    assert train(config(steps=3, **overrides | more), tmp_path)  # a new mesh on the same workdir
    assert ", on 8 devices" in (said := capsys.readouterr().err) and "only" not in said


def test_a_mesh_that_leaves_devices_over_is_told_what_would_not(config, tmp_path, capsys):
    train(config(steps=2, mesh__fsdp=3, batch_size=9, model__embed_dim=96), tmp_path)
    assert "only 3 of 8 devices are used; use a config.mesh whose sizes multiply to 8" in capsys.readouterr().err


def test_a_rung_that_leaves_devices_unused_says_so(config, tmp_path, capsys):
    train(config(mesh__data=8, rungs=({**RUNG, "mesh": {"data": 4}},)), tmp_path)
    said = capsys.readouterr().err
    assert (
        said.count("devices are used") == 1 and "only 4 of 8 devices are used; use mesh.data = 8 on this rung" in said
    )
