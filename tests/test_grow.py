"""Laws of growth: nothing changes, everything can learn, and nothing half-done is left."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import (
    after_steps,
    assert_trees_equal,
    corpus_overrides,
    random_batch,
    step_of,
    tiny_config,
    tiny_linear_config,
)
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow, grow_state
from tokenformer_jax.growth.recipes import check_growth
from tokenformer_jax.growth.verify import measure, verify
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.storage.workdir import load_config
from tokenformer_jax.training.schedule import learning_rate
from tokenformer_jax.training.step import put_batch

pytestmark = pytest.mark.usefixtures("steps_are_shared")

GROWN = {"model__qkv_tokens": 48, "model__out_tokens": 56, "model__ffn_tokens": 200, "steps": 16}


@functools.cache
def trained(cfg, steps=4):
    return after_steps(cfg, steps)[0]


@functools.cache
def growing(cfg, ramp_steps):
    abstract, key = step_of(cfg).abstract_state, jax.random.key(5)
    return jax.jit(lambda s: grow_state(s, abstract, cfg.model, key, cfg.grow.recipe, ramp_steps))


def grown(small_cfg, cfg, ramp_steps=4):
    state = trained(small_cfg)
    copy = jax.tree.map(jnp.copy, state)  # training on gives its arrays away
    return step_of(cfg), state, growing(cfg, ramp_steps)(copy)


@pytest.mark.parametrize("normalizer", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("counts", [GROWN, {"model__ffn_tokens": 97}, {"model__qkv_tokens": 25}])
def test_grown_model_equals_the_former_and_its_new_tokens_can_learn(normalizer, counts):
    small, large = (tiny_config(model__normalizer=normalizer, **sizes) for sizes in ({}, counts))
    step, before, after = grown(small, large)
    batches = [random_batch(small, 7), random_batch(small, 8)]
    figures = measure(before, after, small, large, step, batches)
    verify(figures, "zero_keys")
    assert figures["max_logit_difference"] <= 5e-6 * figures["max_logit"]
    assert figures["loss_after"] == pytest.approx(figures["loss_before"], abs=1e-6)
    assert figures["new_key_gradient_norm"] > 1e-4
    assert set(figures["gradient_norms"]) == {
        n for n in large.model.tokens if large.model.tokens[n] != small.model.tokens[n]
    }


def test_old_tokens_and_moments_are_carried_and_new_ones_are_as_said():
    small, large = tiny_config(), tiny_config(**GROWN)
    _, before, after = grown(small, large)
    assert int(after.step) == int(before.step) == 4
    for name, n in small.model.tokens.items():
        old, new = before.params["blocks"][name], after.params["blocks"][name]
        assert_trees_equal(jax.tree.map(lambda a, n=n: a[:, :n], new), old)
        assert not jnp.any(new["keys"][:, n:])
        drawn = new["values"][:, n:]
        assert float(jnp.std(drawn)) == pytest.approx(2 / 2 / 32**0.5, rel=0.1)  # the initializer's scale
        for moments in ("mu", "nu"):
            old, new = (getattr(state.opt_state[0], moments)["blocks"][name] for state in (before, after))
            assert_trees_equal(jax.tree.map(lambda a, n=n: a[:, :n], new), old)
            assert all(not jnp.any(leaf[:, n:]) for leaf in jax.tree.leaves(new))
    assert_trees_equal(after.params["embed"], before.params["embed"])
    assert_trees_equal(after.opt_state[0].count, before.opt_state[0].count)


def test_new_tokens_learn_and_tau_is_ramped_to_the_root_of_the_count():
    small, large = tiny_config(), tiny_config(**GROWN)
    step, _, state = grown(small, large, ramp_steps=4)
    taus = [float(state.tau_now()["ffn"])]
    for i in range(4):
        state, _ = step.train(state, put_batch(step, random_batch(large, i)))
        taus.append(float(state.tau_now()["ffn"]))
    np.testing.assert_allclose(taus, np.linspace(96**0.5, 200**0.5, 5), rtol=1e-6)
    for name, n in small.model.tokens.items():
        assert jnp.all(jnp.any(state.params["blocks"][name]["keys"][:, n:] != 0, axis=-1))


def test_zero_values_are_dead_for_ever():
    small, large = tiny_config(), tiny_config(**GROWN, grow__recipe="zero_padding")
    step, before, state = grown(small, large)
    figures = measure(before, state, small, large, step, [random_batch(small)])
    assert figures["new_key_gradient_norm"] == figures["new_value_gradient_norm"] == 0
    verify(figures, "zero_padding")
    with pytest.raises(UserError, match="no gradient reaches the new tokens of"):
        verify(figures, "zero_keys")
    state, _ = after_steps(large, 3, state)
    ffn = state.params["blocks"]["ffn"]
    assert not jnp.any(ffn["keys"][:, 96:]) and not jnp.any(ffn["values"][:, 96:])


def test_a_moved_function_is_refused():
    small, large = tiny_config(), tiny_config(**GROWN)
    step, before, after = grown(small, large)
    jumped = after._replace(tau={name: ramp._replace(start=1.1 * ramp.start) for name, ramp in after.tau.items()})
    with pytest.raises(UserError, match="logits differ by"):
        verify(measure(before, jumped, small, large, step, [random_batch(small)]), "zero_keys")


def test_what_moved_is_named():
    small, large = tiny_config(), tiny_config(**GROWN)
    step, before, after = grown(small, large)

    def refused(spoiled, name):
        params = spoiled(after.params)
        figures = measure(before, after._replace(params=params), small, large, step, [random_batch(small)])
        with pytest.raises(UserError, match=f"most of all {name} changed"):
            verify(figures, "zero_keys")

    blocks = after.params["blocks"]
    values_YNE = blocks["ffn"]["values"].at[1, 3].multiply(1.5)
    refused(lambda p: p | {"blocks": blocks | {"ffn": blocks["ffn"] | {"values": values_YNE}}}, "ffn in layer 1")
    refused(lambda p: p | {"norm_bias": p["norm_bias"] + 0.01}, "norm_bias")


def test_growing_twice_equals_the_first_model():
    small, middle, large = tiny_config(), tiny_config(**GROWN), tiny_config(model__ffn_tokens=300, **GROWN_QKV)
    step, first, second = grown(small, middle, ramp_steps=2)
    step = step_of(large)
    third = jax.jit(lambda s: grow_state(s, step.abstract_state, large.model, jax.random.key(6), "zero_keys", 2))(
        second
    )
    verify(measure(first, third, small, large, step, [random_batch(small)]), "zero_keys")


def test_growing_in_the_middle_of_a_ramp_holds_each_tau_where_it_is():
    """One kind grows again, the others' ramps go on."""
    small, middle = tiny_config(), tiny_config(**GROWN)
    large = tiny_config(**GROWN | {"model__ffn_tokens": 300})
    _, _, state = grown(small, middle, ramp_steps=4)
    state, _ = after_steps(middle, 2, state)
    now = {name: float(tau) for name, tau in state.tau_now().items()}
    assert 96**0.5 < now["ffn"] < 200**0.5
    step = step_of(large)
    key = jax.random.key(6)
    bigger = jax.jit(lambda s: grow_state(s, step.abstract_state, large.model, key, "zero_keys", 10))(state)
    assert {name: float(tau) for name, tau in bigger.tau_now().items()} == now
    verify(measure(state, bigger, middle, large, step, [random_batch(middle)]), "zero_keys")
    later = bigger._replace(step=bigger.step + 10).tau_now()
    assert float(later["ffn"]) == pytest.approx(300**0.5)
    assert float(later["query"]) == pytest.approx(48**0.5)


GROWN_QKV = {"model__qkv_tokens": 64, "model__out_tokens": 64}


@pytest.mark.parametrize(
    "key, cfg",
    [
        ("model.ffn_tokens = 95", tiny_config(model__ffn_tokens=95)),
        ("model.num_layers = 3", tiny_config(model__num_layers=3, **GROWN)),
        ("model.embed_dim = 64", tiny_config(model__embed_dim=64, **GROWN)),
        ("model.vocab_size = 400", tiny_config(model__vocab_size=400)),
    ],
)
def test_what_is_no_growth_is_named(key, cfg):
    with pytest.raises(UserError, match=key):
        check_growth(tiny_config().model, cfg.model, "zero_keys")


def test_softmax_and_plain_transformers_do_not_grow():
    with pytest.raises(UserError, match="softmax"):
        check_growth(
            tiny_config(model__normalizer="softmax").model,
            tiny_config(model__normalizer="softmax", **GROWN).model,
            "zero_keys",
        )
    with pytest.raises(UserError, match="plain Transformer"):
        check_growth(tiny_linear_config().model, tiny_linear_config(model__ffn_tokens=128).model, "zero_keys")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grow")
    cfg = tiny_config(**corpus_overrides(folder))
    train(cfg, folder / "small")
    return cfg, folder / "small"


@pytest.mark.parametrize("mesh", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_command_writes_a_whole_workdir_that_train_goes_on_with(source, tmp_path, mesh):
    small, workdir = source
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    cfg = tiny_config(**GROWN, **sizes)
    cfg = dataclasses.replace(cfg, data=small.data)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    figures = grow(workdir, cfg, tmp_path / "grown")
    assert figures == json.loads((tmp_path / "grown" / "grow.json").read_text())
    names = (
        "max_logit_difference max_logit loss_before loss_after new_key_gradient_norm params_before params_after".split()
    )
    assert set(names) <= set(figures)
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}  # only read
    assert [path.name for path in tmp_path.iterdir()] == ["grown"]
    record = Checkpoints(tmp_path / "grown" / "checkpoints").record(8)
    (growth,) = record.growth
    assert (growth["step"], growth["from"], growth["to"]) == (8, small.model.tokens, cfg.model.tokens)
    assert record.schedule_start == 8 and record.tokens == 8 * 8 * 16 and record.train_flops > 0
    train(cfg, tmp_path / "grown")
    rows = [json.loads(line) for line in (tmp_path / "grown" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [8, 16]  # right after growth, and at the end
    assert load_config(tmp_path / "grown" / "config.json") == cfg
    assert int(load_trained(tmp_path / "grown").state.step) == 16


def test_schedule_may_be_carried_on_and_other_data_begin_anew(source, tmp_path):
    small, workdir = source
    cfg = tiny_config(**GROWN, grow__restart_schedule=False, seed=3)
    cfg = dataclasses.replace(cfg, data=small.data)
    grow(workdir, cfg, tmp_path / "grown")
    assert Checkpoints(tmp_path / "grown" / "checkpoints").record(8).schedule_start == 0
    train(cfg, tmp_path / "grown")
    rows = [json.loads(line) for line in (tmp_path / "grown" / "metrics.jsonl").read_text().splitlines()]
    rate = next(row["learning_rate"] for row in rows if row["step"] == 16)
    assert rate == pytest.approx(float(learning_rate(cfg.optimizer, 16)(15)), rel=1e-5)


def test_a_warm_up_longer_than_what_is_left_is_refused(source, tmp_path):
    small, workdir = source
    cfg = dataclasses.replace(tiny_config(**GROWN | {"steps": 10}), data=small.data)
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps = 2: must be below the 2 steps"):
        grow(workdir, cfg, tmp_path / "grown")


def test_a_source_that_does_not_divide_by_the_mesh_is_named(source, tmp_path):
    small, _ = source
    odd = tiny_config(model__ffn_tokens=97, steps=1, optimizer__warmup_steps=0)
    train(dataclasses.replace(odd, data=small.data), tmp_path / "odd")
    cfg = dataclasses.replace(tiny_config(**GROWN, mesh__tensor=4), data=small.data)
    with pytest.raises(UserError, match=r"model\.ffn_tokens = 97: must divide by mesh\.tensor = 4"):
        grow(tmp_path / "odd", cfg, tmp_path / "grown")


def test_a_failed_check_writes_nothing(source, tmp_path, monkeypatch):
    small, workdir = source
    cfg = dataclasses.replace(tiny_config(**GROWN), data=small.data)
    monkeypatch.setattr("tokenformer_jax.growth.verify.LOGIT_BOUND", -1.0)
    with pytest.raises(UserError, match="nothing was written"):
        grow(workdir, cfg, tmp_path / "grown")
    assert not list(tmp_path.iterdir())


def test_a_taken_target_is_left_alone(source, tmp_path):
    small, workdir = source
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="--workdir="):
        grow(workdir, dataclasses.replace(tiny_config(**GROWN), data=small.data), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
