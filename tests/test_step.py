"""Laws of the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.helpers import after_steps, assert_trees_equal, random_batch, step_of, tiny_config, tiny_linear_config
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.training.schedule import decayed, learning_rate
from tokenformer_jax.training.state import TauRamp
from tokenformer_jax.training.step import put_batch


def test_parameters_and_moments_are_sharded_as_the_table_says():
    cfg = tiny_config(mesh__fsdp=2, mesh__tensor=4)
    state = step_of(cfg).init(jax.random.key(0))
    adam = state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        keys = tree["blocks"]["ffn"]["keys"]
        assert keys.addressable_shards[0].data.shape == (2, 96 // 4, 32 // 2)
        assert tree["embed"].addressable_shards[0].data.shape == (300 // 4, 32 // 2)


def test_plain_transformer_shards_as_well():
    alone, _ = after_steps(tiny_linear_config(), 3)
    sharded, _ = after_steps(tiny_linear_config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2), 3)
    assert_trees_equal(sharded.params, alone.params, atol=2e-4)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 1)])
def test_accumulated_step_equals_the_full_batch(mesh):
    meshes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    whole, expected = after_steps(tiny_config(**meshes), 3)
    parts, metrics = after_steps(tiny_config(**meshes, accumulation=2), 3)
    assert_trees_equal(metrics, expected, rtol=1e-5)
    assert_trees_equal(parts.params, whole.params, atol=1e-4)


def test_padding_has_no_weight():
    cfg = tiny_config()
    step = step_of(cfg)
    state = step.init(jax.random.key(0))
    batch = random_batch(cfg)
    real = batch.weights_BL > 0
    changed = batch._replace(targets_BL=np.where(real, batch.targets_BL, 7))
    before, after = (jax.device_get(step.evaluate(state, put_batch(step, b))) for b in (batch, changed))
    assert before == after
    assert before["weights"] == real.sum()


def test_loss_at_birth_is_that_of_a_uniform_guess():
    _, metrics = after_steps(tiny_config(), 1)
    assert metrics[0]["loss"] == pytest.approx(np.log(300), rel=0.02)


def test_schedule_at_named_steps():
    rates = {"optimizer__peak_learning_rate": 6e-4, "optimizer__final_learning_rate": 6e-5}
    cfg = tiny_config(steps=1000, optimizer__warmup_steps=10, **rates).optimizer
    schedule = learning_rate(cfg, 1000)
    assert schedule(0) == 0  # the authors' first step uses rate 0
    assert schedule(5) == pytest.approx(3e-4)
    assert schedule(10) == pytest.approx(6e-4)
    assert schedule(505) == pytest.approx((6e-4 + 6e-5) / 2)  # half way down the cosine
    assert schedule(1000) == pytest.approx(6e-5)
    later = learning_rate(cfg, 1000, start=600)
    assert later(600) == 0
    assert later(610) == pytest.approx(6e-4)
    assert later(1000) == pytest.approx(6e-5)


def test_weight_decay_spares_the_final_norm_only():
    cfg = tiny_config()
    state = step_of(cfg).init(jax.random.key(0))
    mask = decayed(state.params)
    assert mask["norm_scale"] is mask["norm_bias"] is False
    assert all(jax.tree.leaves({name: mask[name] for name in ("embed", "blocks")}))


def test_optimizer_is_clipped_adamw():
    """Two steps against Adam written out by hand."""
    cfg = tiny_config(optimizer__clip_norm=0.1)
    step = step_of(cfg)
    state = step.init(jax.random.key(0))
    embed, moment1, moment2 = np.asarray(state.params["embed"], np.float64), 0.0, 0.0
    for t in (1, 2):
        batch = put_batch(step, random_batch(cfg, t))
        gradients = jax.grad(lambda params, b=batch: mean_loss(cfg, params, b))(state.params)
        norm = float(optax.tree.norm(gradients))
        assert norm > 0.1
        gradient = np.asarray(gradients["embed"], np.float64) * 0.1 / norm
        moment1, moment2 = 0.9 * moment1 + 0.1 * gradient, 0.95 * moment2 + 0.05 * gradient**2
        direction = (moment1 / (1 - 0.9**t)) / (np.sqrt(moment2 / (1 - 0.95**t)) + 1e-8) + 0.1 * embed
        embed = embed - float(learning_rate(cfg.optimizer, cfg.steps)(t - 1)) * direction
        state, _ = step.train(state, batch)
    np.testing.assert_allclose(state.params["embed"], embed, atol=2e-6)


def mean_loss(cfg, params, batch):
    model = nnx.merge(abstract_model(cfg.model)[0], params)
    nll, weights = model.loss_sums(batch, initial_tau(cfg.model), cfg)
    return nll / weights


def test_tau_ramp():
    ramp = TauRamp(jnp.float32(2), jnp.float32(4), jnp.int32(10), jnp.int32(20))
    assert [float(ramp.at(jnp.int32(step))) for step in (0, 10, 15, 20, 99)] == [2, 2, 3, 4, 4]
    assert float(TauRamp.constant(3.0).at(jnp.int32(5))) == 3
