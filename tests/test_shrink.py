"""Laws of shrinking: a rung dropped right after a growth was never there, and what goes is what is least useful."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_trees_equal, corpus_overrides, step_of, tiny_config, tiny_linear_config
from tokenformer_jax.api import TokenFormer
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow, grow_state
from tokenformer_jax.growth.shrink import check_shrinking, most_useful, shrink, shrink_state
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.state import TauRamp, TrainState

pytestmark = pytest.mark.usefixtures("steps_are_shared")

SIZES = {"model__qkv_tokens": 64, "model__out_tokens": 80, "model__ffn_tokens": 192}


@functools.cache
def trained(normalizer="l2_norm_gelu"):
    """A state at step 3 whose moments are anything but zero."""
    cfg = tiny_config(model__normalizer=normalizer)
    state = step_of(cfg).init(jax.random.key(0))
    rng = np.random.default_rng(0)
    opt_state = jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype) if x.ndim else x, state.opt_state)
    return cfg, state._replace(step=jnp.int32(3), opt_state=opt_state)


def put(state, cfg):
    return jax.device_put(state, jax.tree.map(lambda a: a.sharding, step_of(cfg).abstract_state))


def grown(state, cfg):
    step = step_of(cfg)
    shardings = jax.tree.map(lambda a: a.sharding, step.abstract_state)

    def larger(s):
        return grow_state(s, step.abstract_state, cfg.model, jax.random.key(5), cfg.grow.recipe, ramp_steps=4)

    with jax.set_mesh(step.mesh):
        return jax.jit(larger, out_shardings=shardings)(state)


def shrunk(state, cfg, ramp_steps=4):
    step = step_of(cfg)
    shardings = jax.tree.map(lambda a: a.sharding, step.abstract_state)
    with jax.set_mesh(step.mesh):
        return jax.jit(lambda s: shrink_state(s, cfg.model, ramp_steps), out_shardings=shardings)(state)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("recipe", ["zero_keys", "isometric"])
def test_a_rung_dropped_right_after_a_lossless_growth_gives_back_the_former_model(recipe, mesh):
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    _, former = trained()
    small, large = tiny_config(**sizes), tiny_config(**SIZES, **sizes, grow__recipe=recipe)
    again = shrunk(grown(put(former, small), large), small)
    for later in (0, 2, 9):  # τ is what it was, now and ever after
        assert_trees_equal(*(s._replace(step=s.step + later).tau_now() for s in (again, former)))
    assert_trees_equal(again._replace(tau={}), former._replace(tau={}))


def test_that_holds_in_the_middle_of_a_ramp_and_for_the_other_norm():
    small, former = trained("gelu_l2_norm")
    former = former._replace(tau={n: TauRamp(r.start, 1.5 * r.target, 0, 10) for n, r in former.tau.items()})
    again = shrunk(grown(former, tiny_config(**SIZES, model__normalizer="gelu_l2_norm")), small)
    assert_trees_equal(again.tau_now(), former.tau_now(), rtol=1e-6)  # the ramp's own rounding
    assert_trees_equal(again._replace(tau={}), former._replace(tau={}))


def test_the_most_useful_tokens_stay_in_their_order_with_their_moments():
    cfg, state = trained()
    fewer = tiny_config(model__ffn_tokens=32)
    smaller = shrunk(state, fewer)
    keys_YND, values_YNE = (np.asarray(state.params["blocks"]["ffn"][name]) for name in ("keys", "values"))
    for layer in range(cfg.model.num_layers):
        useful_N = np.linalg.norm(keys_YND[layer], axis=-1) * np.linalg.norm(values_YNE[layer], axis=-1)
        kept = np.sort(np.argsort(useful_N)[-32:])
        assert kept[-1] > 32  # it is not just the first ones
        for before, after in ((s(state), s(smaller)) for s in (params, first_moments, second_moments)):
            for name in ("keys", "values"):
                assert_trees_equal(before["ffn"][name][layer][kept], after["ffn"][name][layer])
    assert_trees_equal(params(smaller)["query"], params(state)["query"])
    assert_trees_equal(smaller.tau["query"], state.tau["query"])  # nothing of it was dropped


def params(state: TrainState):
    return state.params["blocks"]


def first_moments(state: TrainState):
    return state.opt_state[0].mu["blocks"]


def second_moments(state: TrainState):
    return state.opt_state[0].nu["blocks"]


def test_of_equally_useful_tokens_the_latest_go():
    assert most_useful(jnp.ones((1, 5)).at[0, 1].set(0.0), 3).tolist() == [[0, 2, 3]]
    assert most_useful(jnp.zeros((1, 5)), 3).tolist() == [[0, 1, 2]]


def test_tau_falls_with_the_scores_norm_and_then_goes_to_the_root_of_the_count():
    _, state = trained()
    smaller = shrunk(state, tiny_config(model__ffn_tokens=24), ramp_steps=4)
    kept, whole = (float(jnp.sum(jnp.square(params(s)["ffn"]["keys"]))) for s in (smaller, state))
    assert float(smaller.tau_now()["ffn"]) == pytest.approx((96 * kept / whole) ** 0.5, rel=1e-5)
    assert float(smaller._replace(step=smaller.step + 4).tau_now()["ffn"]) == pytest.approx(24**0.5)
    fixed = tiny_config(model__ffn_tokens=24, model__tau_tokens=7)
    assert_trees_equal(shrunk(state, fixed).tau_now(), state.tau_now())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and its successor right after growth."""
    folder = tmp_path_factory.mktemp("shrink")
    small = tiny_config(**corpus_overrides(folder))
    train(small, folder / "small")
    grow(folder / "small", dataclasses.replace(tiny_config(**SIZES, steps=16), data=small.data), folder / "grown")
    return small, folder


def test_command_gives_back_the_former_rung_and_train_goes_on_with_it(runs, tmp_path):
    small, folder = runs
    cfg = dataclasses.replace(small, steps=12)
    before = {path: path.read_bytes() for path in (folder / "grown").rglob("*") if path.is_file()}
    figures = shrink(folder / "grown", cfg, tmp_path / "again")
    assert before == {path: path.read_bytes() for path in (folder / "grown").rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert figures == json.loads((tmp_path / "again" / "shrink.json").read_text())
    assert figures["params_before"] > figures["params_after"] == load_trained(folder / "small").num_params
    assert figures["loss_after"] == pytest.approx(figures["loss_before"], abs=2e-6)
    assert_trees_equal(load_trained(tmp_path / "again").state.params, load_trained(folder / "small").state.params)
    growth = Checkpoints(tmp_path / "again" / "checkpoints").record(8).growth
    assert [(g["recipe"], g["from"]["ffn"], g["to"]["ffn"]) for g in growth] == [
        ("zero_keys", 96, 192),
        ("shrink", 192, 96),
    ]
    train(cfg, tmp_path / "again")
    grow(folder / "small", cfg, tmp_path / "never")  # to as many tokens: it goes on, with the same schedule
    train(cfg, tmp_path / "never")
    assert_trees_equal(*(load_trained(tmp_path / name).state.params for name in ("again", "never")))


def test_command_runs_sharded_and_drops_less_than_a_rung(runs, tmp_path):
    small, folder = runs
    sharded = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    cfg = tiny_config(model__qkv_tokens=24, model__out_tokens=80, model__ffn_tokens=100, steps=12, **sharded)
    figures = shrink(folder / "grown", dataclasses.replace(cfg, data=small.data), tmp_path / "less")
    assert figures["tokens_after"] == {"query": 24, "key": 24, "value": 24, "out": 80, "ffn": 100}
    assert figures["loss_after"] == pytest.approx(figures["loss_before"], abs=2e-6)  # all it drops is new


def test_a_taken_target_and_an_earlier_end_are_refused(runs, tmp_path):
    small, folder = runs
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="--workdir="):
        shrink(folder / "grown", dataclasses.replace(small, steps=12), tmp_path)
    with pytest.raises(UserError, match="steps = 8: the source was trained for 8"):
        shrink(folder / "grown", small, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "message, old, new",
    [
        ("model.ffn_tokens = 97: the source has 96", tiny_config(), tiny_config(model__ffn_tokens=97)),
        ("model.ffn_tokens = 96: --shrink drops none", tiny_config(), tiny_config()),
        ("model.num_layers = 3: .*which shrinking keeps", tiny_config(), tiny_config(model__num_layers=3)),
        ("plain Transformer", tiny_linear_config(), tiny_linear_config(model__ffn_tokens=32)),
        (
            "softmax",
            tiny_config(model__normalizer="softmax"),
            tiny_config(model__normalizer="softmax", model__ffn_tokens=32),
        ),
    ],
)
def test_what_is_no_shrinking_is_named(message, old, new):
    with pytest.raises(UserError, match=message):
        check_shrinking(old.model, new.model)


def test_python_face_grows_and_shrinks_back():
    cfg, state = trained()
    model = TokenFormer(cfg.model, state.params, {name: float(tau) for name, tau in state.tau_now().items()})
    again = model.grow(ffn_tokens=200).shrink(ffn_tokens=96)
    assert (again.cfg, again.tau) == (model.cfg, model.tau)
    assert_trees_equal(again.params, model.params)
    with pytest.raises(UserError, match=r"model\.out_tokens = 0"):
        model.shrink(out_tokens=0)
