"""Laws of adapting: new tokens learn for good, and nothing else moves by a bit."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import after_steps, assert_trees_equal, corpus_overrides, random_batch, rows_of, step_of, tiny_config
from tokenformer_jax.config import MeshConfig
from tokenformer_jax.devices.hardware import CHIPS
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow, grow_state
from tokenformer_jax.growth.shrink import shrink
from tokenformer_jax.planning.whole_run import beginning, bill, run_stages
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.language import train_flops_per_token
from tokenformer_jax.training.learned import learned
from tokenformer_jax.training.schedule import NewTokens
from tokenformer_jax.training.step import make_step, put_batch

GROWN = {"model__qkv_tokens": 32, "model__ffn_tokens": 112, "steps": 16}  # "out" does not grow
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
pytestmark = pytest.mark.usefixtures("steps_are_shared")
NEW = NewTokens({"query": 24, "key": 24, "value": 24, "ffn": 96}, step=0, alone=True)


@functools.cache
def adapting(**overrides):
    """A trained model with new tokens, the step that trains those alone, and the one that trains all."""
    small, cfg = tiny_config(), tiny_config(**GROWN | overrides)
    state, _ = after_steps(small, 3)
    alone, both = make_step(cfg, make_mesh(cfg.mesh), new_tokens=NEW), step_of(cfg)
    grown = grow_state(
        state._replace(opt_state=()), both.abstract_state, cfg.model, jax.random.key(5), "random_keys", ramp_steps=4
    )
    values = {
        name: 0.1 * jax.random.normal(jax.random.key(6), part["values"].shape)
        for name, part in grown.params["blocks"].items()
    }
    blocks = {
        name: {"keys": part["keys"], "values": part["values"] + values[name]}
        for name, part in grown.params["blocks"].items()
    }
    return cfg, alone, both, grown._replace(params=grown.params | {"blocks": blocks})


def placed(step, state, opt_state=()):
    state = state._replace(opt_state=opt_state)
    abstract = step.abstract_state if opt_state else step.abstract_state._replace(opt_state=())
    return jax.device_put(jax.tree.map(np.array, state), jax.tree.map(lambda a: a.sharding, abstract))


def fresh(step, state):
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), step.abstract_state.opt_state)
    return placed(step, state, zeros)


@pytest.mark.parametrize(
    "how",
    [
        MESH | {"model__remat": "full"},
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in (
                {},
                MESH,
                {"model__dropout": 0.3, "accumulation": 2},
                {"model__normalizer": "gelu_l2_norm"},
                {"mesh__fsdp": 2, "mesh__tensor": 4},
            )
        ),
    ],
    ids=str,
)
def test_new_tokens_get_the_gradient_of_the_whole_model_and_nothing_else_moves(how):
    cfg, alone, both, state = adapting(**how)
    assert count(alone.learned) == 2 * 32 * 2 * (3 * 8 + 16) == count(alone.abstract_state.opt_state[0].mu)
    # After one step from no moments, Adam's first moment is a tenth of the clipped gradient.
    after, metrics = alone.train(fresh(alone, state), put_batch(alone, random_batch(cfg, 7)))
    full, whole = both.train(fresh(both, state), put_batch(both, random_batch(cfg, 7)))
    np.testing.assert_allclose(metrics["loss"], whole["loss"], rtol=1e-6)
    scale = [max(1.0, float(m["grad_norm"])) for m in (metrics, whole)]
    ours = jax.tree.map(lambda x: x * scale[0], after.opt_state[0].mu)
    theirs = jax.tree.map(lambda x: x * scale[1], learned(full.opt_state[0].mu, NEW))
    assert_trees_equal(ours, theirs, rtol=1e-4, atol=2e-6)
    for i in range(3):
        after, _ = alone.train(after, put_batch(alone, random_batch(cfg, i)))
    for name, n in cfg.model.tokens.items():
        n = NEW.tokens.get(name, n)
        old, new = state.params["blocks"][name], after.params["blocks"][name]
        assert_trees_equal(jax.tree.map(lambda x, n=n: x[:, :n], new), jax.tree.map(lambda x, n=n: x[:, :n], old))
        assert all(
            np.all(np.any((np.asarray(x) != np.asarray(y))[:, n:], -1))
            for x, y in zip(new.values(), old.values(), strict=True)
        )
    for name in ("embed", "norm_scale", "norm_bias"):
        assert_trees_equal(after.params[name], state.params[name])


# ---- From a workdir to its successor.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A trained run, and its successor whose new tokens alone have learnt, on 8 devices."""
    folder = tmp_path_factory.mktemp("adapt")
    text = corpus_overrides(folder)
    small = tiny_config(**text)
    train(small, folder / "base")
    cfg = tiny_config(**GROWN, **MESH, **text, grow__train="new", checkpoint_every=2, checkpoints_kept=9)
    grow(folder / "base", cfg, folder / "new")
    train(cfg, folder / "new")
    return folder, cfg


def test_an_adapted_run_leaves_its_base_as_it_was(runs):
    folder, cfg = runs
    base, new = (load_trained(folder / name, mesh=(1, 1, 1, 1)) for name in ("base", "new"))
    for name, n in base.cfg.model.tokens.items():
        assert_trees_equal(
            jax.tree.map(lambda x, n=n: x[:, :n], new.state.params["blocks"][name]), base.state.params["blocks"][name]
        )
    for name in ("embed", "norm_scale", "norm_bias"):
        assert_trees_equal(new.state.params[name], base.state.params[name])
    (growth,) = new.record.growth
    assert growth["train"] == "new" and growth["base"] == base.fingerprint != new.fingerprint
    assert growth["base_tau"] == {name: float(tau) for name, tau in base.state.tau_now().items()}
    losses = [row["eval_loss"] for row in rows_of(folder / "new") if "eval_loss" in row]
    assert losses[-1] < losses[0]
    spent = [record.train_flops for record in (base.record, new.record)]
    assert spent[1] - spent[0] < 0.9 * 8 * 8 * 16 * train_flops_per_token(cfg.model)


def test_a_checkpoint_holds_moments_of_new_tokens_alone_and_training_goes_on_exactly(runs, tmp_path):
    folder, cfg = runs
    checkpoints = Checkpoints(folder / "new" / "checkpoints")
    moments = [saved.shape for name, saved in checkpoints._saved(12).items() if ".mu." in name]
    assert sorted(moments) == [(2, 8, 32)] * 6 + [(2, 16, 32)] * 2
    shutil.copytree(folder / "new", tmp_path / "resumed")
    for step in checkpoints.steps:
        if step > 12:
            shutil.rmtree(tmp_path / "resumed" / "checkpoints" / str(step))
    train(cfg, tmp_path / "resumed")
    assert Checkpoints(tmp_path / "resumed" / "checkpoints")._saved(16) == checkpoints._saved(16)
    other = dataclasses.replace(cfg, mesh=MeshConfig(data=1, fsdp=1, tensor=16), steps=18)
    with pytest.raises(UserError, match=r"mesh\.tensor = 16"):
        train(other, folder / "new")


@pytest.mark.slow
def test_it_may_grow_again_with_all_learning_or_drop_tokens(runs, tmp_path):
    folder, cfg = runs
    for name, change, sizes in (
        ("all", grow, {}),
        ("more", grow, {"model__ffn_tokens": 128}),
        ("fewer", shrink, {"model__ffn_tokens": 96}),
    ):
        train_key = "new" if name == "more" else "all"
        larger = tiny_config(**GROWN | sizes | {"steps": 18}, grow__train=train_key, optimizer__warmup_steps=1)
        larger = dataclasses.replace(larger, data=cfg.data)
        change(folder / "new", larger, tmp_path / name)
        train(larger, tmp_path / name)
        sizes_of_moments = {
            path: saved.shape[1]
            for path, saved in Checkpoints(tmp_path / name / "checkpoints")._saved(18).items()
            if ".mu." in path and path.endswith("ffn.keys")
        }
        assert list(sizes_of_moments.values()) == [{"all": 112, "more": 16, "fewer": 96}[name]]


def test_mistakes_are_named(runs, tmp_path):
    folder, cfg = runs
    same = tiny_config(steps=16, grow__train="new")
    with pytest.raises(UserError, match=r"grow\.train = 'new': the source has as many tokens"):
        grow(folder / "base", dataclasses.replace(same, data=cfg.data), tmp_path / "same")
    with pytest.raises(UserError, match="must be one of all, new"):
        tiny_config(grow__train="old")
    with pytest.raises(UserError, match=r"train_flops = 1e\+15: .*use steps or train_tokens"):
        grow(folder / "base", dataclasses.replace(cfg, train_flops=1e15), tmp_path / "budget")
    assert not list(tmp_path.iterdir())


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_a_plan_begins_where_the_source_is(runs):
    folder, cfg = runs
    since, new = beginning(f"{folder}/base", 0, cfg), load_trained(folder / "new", mesh=(1, 1, 1, 1))
    base = load_trained(folder / "base", mesh=(1, 1, 1, 1))
    assert (since.step, since.tokens, since.flops) == (8, base.record.tokens, base.record.train_flops)
    (row,) = bill(run_stages(cfg, since), 1, 1, CHIPS["v5e"], 0.4, since=since)["stages"]
    assert row["steps"] == 8 and row["parameters"] == new.num_params
    assert row["train_flops"] == pytest.approx(new.record.train_flops - base.record.train_flops)
    with pytest.raises(UserError, match=r"^--from_step=3: goes without --source"):
        beginning(f"{folder}/base", 3, cfg)
