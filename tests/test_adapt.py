"""Laws of adapting: new tokens learn for good, and nothing else moves by a bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_trees_equal, random_batch, step_of, tiny_config
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.training.learned import learned
from tokenformer_jax.training.schedule import NewTokens
from tokenformer_jax.training.step import make_step, put_batch

GROWN = {"model__qkv_tokens": 32, "model__ffn_tokens": 112, "steps": 16}  # "out" does not grow
NEW = NewTokens({"query": 24, "key": 24, "value": 24, "ffn": 96}, step=0, alone=True)


@functools.cache
def adapting(**overrides):
    """A trained model with new tokens, the step that trains those alone, and the one that trains all."""
    small, cfg = tiny_config(), tiny_config(**GROWN | overrides)
    step = step_of(small)
    state = step.init(jax.random.key(0))
    for i in range(3):
        state, _ = step.train(state, put_batch(step, random_batch(small, i)))
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
        {},
        {"model__remat": "full"},
        {"model__dropout": 0.3, "accumulation": 2},
        {"model__normalizer": "gelu_l2_norm"},
        {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
        {"mesh__fsdp": 2, "mesh__tensor": 4},
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


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
