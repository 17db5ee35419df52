"""Laws of the growth recipes: which keep the model as it is, what can learn, and what their parts promise."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import after_steps, assert_trees_equal, random_batch, step_of, tiny_config
from tokenformer_jax.config import RECIPE_NAMES
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.recipes import RECIPES, check_growth
from tokenformer_jax.growth.verify import measure, verify

DOUBLED = {"model__qkv_tokens": 48, "model__out_tokens": 80, "model__ffn_tokens": 192, "steps": 16}
UNEVEN = {"model__qkv_tokens": 48, "model__out_tokens": 100, "model__ffn_tokens": 128, "steps": 16}
ONLY_FFN = {"model__ffn_tokens": 288, "steps": 16}
ONLY_QKV = {"model__qkv_tokens": 96, "steps": 16}


@pytest.fixture(scope="module")
def trained():
    """A model of 32 dims with 24, 40 and 96 tokens: fewer than dims, and more."""
    cfg = tiny_config()
    return cfg, after_steps(cfg, 6)[0]


def grown(trained, recipe, sizes, **mesh):
    small, state = trained
    cfg = tiny_config(**sizes, **mesh, grow__recipe=recipe)
    check_growth(small.model, cfg.model, recipe)
    step = step_of(cfg)
    shardings = jax.tree.map(lambda a: a.sharding, step.abstract_state)

    @jax.jit
    def grow(state):
        return grow_state(state, step.abstract_state, cfg.model, jax.random.key(5), recipe, ramp_steps=4)

    with jax.set_mesh(step.mesh):
        return cfg, step, jax.jit(grow, out_shardings=shardings)(jax.tree.map(np.asarray, state))


def test_the_config_names_the_recipes():
    assert tuple(RECIPES) == RECIPE_NAMES


@pytest.mark.parametrize("sizes", [DOUBLED, UNEVEN, ONLY_FFN, ONLY_QKV], ids=["doubled", "uneven", "ffn", "qkv"])
@pytest.mark.parametrize("recipe", ["zero_keys", "isometric", "split"])
def test_lossless_recipes_keep_the_model_and_let_new_tokens_learn(trained, recipe, sizes):
    if recipe == "split" and sizes is UNEVEN:
        with pytest.raises(UserError, match="'split' takes a multiple"):
            grown(trained, recipe, sizes)
        return
    small, before = trained
    cfg, step, after = grown(trained, recipe, sizes)
    figures = measure(before, after, small, cfg, step, [random_batch(small, 7), random_batch(small, 8)])
    verify(figures, recipe)
    assert figures["max_logit_difference"] <= 5e-6 * figures["max_logit"]
    grew = {name for name, n in cfg.model.tokens.items() if n != small.model.tokens[name]}
    assert set(figures["gradient_norms"]) == grew
    now, in_the_end = after.tau_now(), after._replace(step=after.step + 4).tau_now()
    for name, n in cfg.model.tokens.items():
        assert float(in_the_end[name]) == pytest.approx(n**0.5)
        if recipe != "zero_keys":  # no ramp: a plain TokenFormer at once
            assert float(now[name]) == pytest.approx(n**0.5)


@pytest.mark.slow
def test_new_values_learn_at_once_where_keys_are_not_zero(trained):
    small, before = trained
    for recipe, kind in (("zero_keys", "keys"), ("isometric", "values"), ("random_keys", "values"), ("split", "keys")):
        cfg, step, after = grown(trained, recipe, DOUBLED)
        norms = measure(before, after, small, cfg, step, [random_batch(small)])["gradient_norms"]
        assert all(norm[kind] > 0 for norm in norms.values()), recipe


def test_isometric_keys_stretch_every_norm_alike(trained):
    small, before = trained
    for sizes in (DOUBLED, UNEVEN):
        cfg, _, after = grown(trained, "isometric", sizes)
        for name, n in small.model.tokens.items():
            old, new = (np.float64(state.params["blocks"][name]["keys"]) for state in (before, after))
            np.testing.assert_array_equal(new[:, :n], old)
            x_D = np.random.default_rng(0).normal(size=(32, 50))
            ratio = np.linalg.norm(new @ x_D, axis=1) / np.linalg.norm(old @ x_D, axis=1)
            np.testing.assert_allclose(ratio, (cfg.model.tokens[name] / n) ** 0.5, rtol=2e-5)
            assert not np.any(np.asarray(after.params["blocks"][name]["values"])[:, n:])


def test_isometric_in_the_middle_of_a_ramp_is_lossless_too(trained):
    small, _ = trained
    cfg, step, middle = grown(trained, "zero_keys", ONLY_FFN)
    middle = jax.tree.map(np.asarray, middle)._replace(step=middle.step + 2)
    larger, step, after = grown((cfg, middle), "isometric", ONLY_FFN | {"model__ffn_tokens": 400})
    figures = measure(middle, after, cfg, larger, step, [random_batch(small)])
    verify(figures, "isometric")
    assert float(after.tau_now()["ffn"]) == 20.0


def test_split_makes_copies_whose_values_add_up(trained):
    small, before = trained
    cfg, _, after = grown(trained, "split", DOUBLED)
    for name, n in small.model.tokens.items():
        old, new = (jax.tree.map(np.asarray, state.params["blocks"][name]) for state in (before, after))
        np.testing.assert_array_equal(new["keys"][:, n:], old["keys"])
        np.testing.assert_allclose(new["values"][:, :n] + new["values"][:, n:], old["values"], rtol=0, atol=2e-7)
        assert np.any(new["values"][:, :n] != new["values"][:, n:])
    assert cfg.model.tokens == {name: 2 * n for name, n in small.model.tokens.items()}


@pytest.mark.parametrize("recipe", ["random_keys", "released"])
def test_lossy_recipes_move_the_model_and_say_so(trained, recipe):
    small, before = trained
    cfg, step, after = grown(trained, recipe, DOUBLED)
    figures = measure(before, after, small, cfg, step, [random_batch(small)])
    verify(figures, recipe)
    assert figures["max_logit_difference"] > 1e-3 * figures["max_logit"]
    assert not RECIPES[recipe].lossless
    assert float(after.tau_now()["ffn"]) == pytest.approx(192**0.5)
    adam = after.opt_state[0]
    if recipe == "released":
        assert int(adam.count) == 0 and not any(jnp.any(leaf) for leaf in jax.tree.leaves((adam.mu, adam.nu)))
    else:
        assert int(adam.count) == 6
    keys = np.asarray(after.params["blocks"]["ffn"]["keys"])
    rms = [np.sqrt(np.mean(np.square(part))) for part in (keys[:, :96], keys[:, 96:])]
    assert rms[1] == pytest.approx(rms[0] if recipe == "random_keys" else 0.02, rel=0.05)
    assert int(after.opt_state[2].count) == 6  # the schedule goes on


@pytest.mark.parametrize("recipe", ["zero_keys", "isometric", "split"])
def test_growth_is_the_same_on_every_mesh(trained, recipe):
    alone = grown(trained, recipe, DOUBLED)[2]
    sharded = grown(trained, recipe, DOUBLED, mesh__data=1, mesh__fsdp=2, mesh__tensor=4)[2]
    if recipe == "isometric":  # sums in another order, and eigenvectors of either sign: the scores' norm is what counts
        keys = [np.float64(state.params["blocks"]["ffn"]["keys"]) for state in (alone, sharded)]
        np.testing.assert_allclose(*(k.swapaxes(1, 2) @ k for k in keys), rtol=0, atol=1e-5)
        alone, sharded = ({"tau": state.tau, "moments": state.opt_state} for state in (alone, sharded))
    tolerance = {"rtol": 0, "atol": 1e-7} if recipe == "split" else {}  # the others add nothing up
    assert_trees_equal(alone, sharded, **tolerance)


@pytest.mark.parametrize(
    "recipe, overrides, message",
    [
        (
            "isometric",
            {"model__normalizer": "gelu_l2_norm"},
            "needs model.normalizer = l2_norm_gelu, not",
        ),
        ("isometric", {"model__tau_tokens": 24}, "changes τ, which model.tau_tokens fixes"),
        ("isometric", {"model__ffn_tokens": 100}, "takes the source's 96 or at least 128"),
        ("split", {"model__ffn_tokens": 97}, "takes a multiple of the source's 96; use 96 or 192"),
    ],
)
def test_a_recipe_that_does_not_fit_is_named(recipe, overrides, message):
    fixed = {key: value for key, value in overrides.items() if "tokens" not in key or "tau" in key}
    small, large = tiny_config(**fixed), tiny_config(**{"model__ffn_tokens": 192} | overrides)
    with pytest.raises(UserError, match=message):
        check_growth(small.model, large.model, recipe)


@pytest.mark.slow
def test_isometric_growth_ends_on_a_single_device():
    """It hung there, on two threads: eight devices have more."""
    code = """
import os
import subprocess
import sys

import jax
from tests.helpers import tiny_config
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.training.step import make_step

small, large = tiny_config(), tiny_config(model__qkv_tokens=96, model__out_tokens=96, model__ffn_tokens=256)
before, after = (make_step(cfg, make_mesh(cfg.mesh)) for cfg in (small, large))
state = before.init(jax.random.key(0))
grow = jax.jit(lambda s, key: grow_state(s, after.abstract_state, large.model, key, "isometric", 0))
for i in range(5):
    jax.block_until_ready(grow(state, jax.random.key(i)))
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": ""}, check=True, timeout=300)
