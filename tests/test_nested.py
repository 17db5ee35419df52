"""Laws of nested models: each size is the model of its own tokens, in training, on meshes, in growth and in use."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.commands import call, call_well, complaint
from tests.helpers import assert_trees_equal, corpus_overrides, random_batch, step_of, tiny_config
from tokenformer_jax.api import TokenFormer
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.recipes import check_growth
from tokenformer_jax.growth.shrink import check_shrinking
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.adapters import Adapter, adapted_config
from tokenformer_jax.training.language import train_flops_per_token
from tokenformer_jax.training.nested import at, cut, sizes
from tokenformer_jax.training.step import put_batch

SIZES = {"model__nested": (0.25, 0.5, 1.0)}
MESH = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2}
pytestmark = pytest.mark.usefixtures("steps_are_shared")


@pytest.mark.parametrize("mesh", [pytest.param({}, marks=pytest.mark.slow), MESH], ids=["alone", "sharded"])
def test_sizes_learn_in_turn_as_models_of_their_own_would(mesh):
    cfg = tiny_config(**SIZES, **mesh)
    step = step_of(cfg)
    state = step.init(jax.random.key(0))
    assert step.flops_per_token == pytest.approx(
        np.mean([train_flops_per_token(size) for size in sizes(cfg.model)]), rel=1e-9
    )
    for turn, size in enumerate(sizes(cfg.model)):
        assert size.tokens == {name: n * (1, 2, 4)[turn] // 4 for name, n in cfg.model.tokens.items()}
        batch, params = random_batch(cfg, turn), jax.tree.map(np.asarray, state.params)
        counts = {f"model__{key}": getattr(size, key) for key in ("qkv_tokens", "out_tokens", "ffn_tokens")}
        alone = step_of(tiny_config(**counts))
        own = alone.init(jax.random.key(0))
        own = own._replace(params=jax.device_put(cut(params, size), jax.tree.map(lambda x: x.sharding, own.params)))
        _, expected = alone.train(own, put_batch(alone, batch))
        state, metrics = step.train(state, put_batch(step, batch))
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-5)
        if turn == 0:
            mu = state.opt_state[0].mu["blocks"]
            for name, n in size.tokens.items():
                assert all(np.any(np.asarray(x)[:, :n]) and not np.any(np.asarray(x)[:, n:]) for x in mu[name].values())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested")
    cfg = tiny_config(**SIZES, **MESH, **corpus_overrides(folder))
    train(cfg, folder / "W")
    return folder, cfg


@pytest.mark.slow
def test_growth_appends_to_the_largest_and_keeps_all_sizes(run, tmp_path):
    folder, cfg = run
    counts = {"qkv_tokens": 48, "out_tokens": 80, "ffn_tokens": 192}
    larger = dataclasses.replace(cfg.model, **counts, nested=(0.125, 0.25, 0.5, 1.0))
    new = dataclasses.replace(cfg, model=larger, steps=16)
    grow(folder / "W", new, tmp_path / "W2")
    before, after = TokenFormer.load(folder / "W"), TokenFormer.load(tmp_path / "W2")
    for old, now in ((0.25, 0.125), (0.5, 0.25), (1.0, 0.5)):
        assert_trees_equal(after.at(now).params, before.at(old).params)
        assert after.at(now).tau == pytest.approx(before.at(old).tau, rel=1e-6)
    for wrong in ((0.25, 0.5, 1.0), ()):
        with pytest.raises(UserError, match=r"sizes must stay.*use \(0\.125, 0\.25, 0\.5, 1\.0\)"):
            check_growth(cfg.model, dataclasses.replace(larger, nested=wrong), "zero_keys")
    train(new, tmp_path / "W2")


@pytest.mark.slow
def test_a_size_is_used_by_its_part_of_the_tokens(run):
    folder, cfg = run
    model = TokenFormer.load(folder / "W")
    half = model.at(0.5)
    assert half.cfg == at(cfg.model, 0.5) and half.tau["ffn"] == pytest.approx(48**0.5)
    ids = np.arange(12).reshape(1, 12)
    assert np.any(np.asarray(half.logits(ids)) != np.asarray(model.logits(ids)))
    losses = [
        call_well("evaluate", f"--workdir={folder}/W", "--mesh=1,1,1", *flags).split("loss ")[1].split()[0]
        for flags in ([], ["--tokens=1.0"], ["--tokens=0.5"])
    ]
    assert losses[0] == losses[1] != losses[2]
    call_well("generate", f"--workdir={folder}/W", "--mesh=1,1,1", "--tokens=0.25", "--prompt=key", "--max_tokens=3")
    line = complaint(call("generate", f"--workdir={folder}/W", "--tokens=0.3"))
    assert "--tokens=0.3: the model's sizes are 0.25, 0.5, 1" in line


def test_python_grows_and_shrinks_them():
    model = TokenFormer.init(tiny_config(**SIZES).model)
    counts = {size: getattr(model.cfg, size) for size in ("qkv_tokens", "out_tokens", "ffn_tokens")}
    larger = model.grow(**{size: 3 * count // 2 for size, count in counts.items()})
    assert larger.cfg.nested == pytest.approx((1 / 6, 1 / 3, 2 / 3, 1.0), rel=1e-6)
    assert_trees_equal(larger.at(0.333333).params, model.at(0.5).params)  # as many digits as a message has
    with pytest.raises(UserError, match="counts that grow alike"):
        model.grow(ffn_tokens=2 * model.cfg.ffn_tokens)
    for fewer in (0, model.cfg.ffn_tokens // 2):
        with pytest.raises(UserError, match=r"model\.ffn_tokens = \d+: the source has \d+ already"):
            model.grow(ffn_tokens=fewer)
    assert model.shrink(ffn_tokens=model.cfg.ffn_tokens // 2).cfg.nested == ()
    half = {size: count // 2 for size, count in counts.items()}
    with pytest.raises(UserError, match=r"model\.nested = .*--shrink drops tokens of every size.*set it to \(\)"):
        check_shrinking(model.cfg, dataclasses.replace(model.cfg, **half))


def test_with_an_adapter_a_model_has_no_smaller_sizes():
    cfg = tiny_config(**SIZES).model
    tokens = {"ffn": {"keys": np.zeros((1, 3, 1)), "values": np.zeros((1, 3, 1))}}
    assert adapted_config(cfg, [Adapter("a", tokens, "", {}, {}, {})]).nested == ()
    assert adapted_config(cfg, []) == cfg


def test_mistakes_are_named():
    for parts in ((0.5,), (0.5, 0.25, 1.0), (0.0, 1.0), (0.5, 0.9)):
        with pytest.raises(UserError, match=r"model\.nested = .*must rise from above 0 to 1\.0"):
            tiny_config(model__nested=parts)
    with pytest.raises(UserError, match=r"0\.25 of the tokens of query are 6, which mesh\.tensor = 4"):
        step_of(tiny_config(**SIZES, mesh__tensor=4))
    with pytest.raises(UserError, match=r"--tokens=0.5: the model has one size"):
        at(tiny_config().model, 0.5)
