"""Laws of the options that reproduce the authors' TPU code: tanh gelu, a fixed τ, dropout, stochastic depth."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import after_steps, assert_trees_equal, random_batch, step_of, tiny_config, tiny_linear_config
from tokenformer_jax.api import TokenFormer
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.layers import GELUS, dropout, dropout_scale
from tokenformer_jax.nn.pattention import pattention
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.official import check_tau
from tokenformer_jax.training.state import TauRamp, TrainState
from tokenformer_jax.training.step import masks_key, put_batch

DROPPED = {"model__dropout": 0.2, "model__stochastic_depth": 0.3}
SMALL = {"model__vocab_size": 64, "model__context_length": 8, "steps": 4}


@functools.partial(jax.jit, static_argnums=0)
def logits(model_cfg, tokens, key):
    """With large random parameters."""
    params = jax.tree.map(lambda x: 5 * x, init_params(model_cfg, jax.random.key(1)))
    return nnx.merge(abstract_model(model_cfg)[0], params)(tokens, initial_tau(model_cfg), key=key)[0]


def apply(cfg, key=None, tokens=None):
    return logits(cfg.model, random_batch(cfg).tokens_BL if tokens is None else tokens, key)


# gelu


def test_tanh_gelu_is_jaxs_approximate_one():
    x = jnp.linspace(-5, 5, 101)
    np.testing.assert_array_equal(GELUS["tanh"](x), jax.nn.gelu(x, approximate=True))
    assert 1e-4 < np.max(np.abs(GELUS["tanh"](x) - GELUS["erf"](x))) < 1e-3


@pytest.mark.parametrize("normalizer", ["l2_norm_gelu", "gelu_l2_norm"])
def test_every_normaliser_takes_either_gelu(normalizer):
    x, keys, values = (jax.random.normal(jax.random.key(i), (6, 4)) for i in range(3))
    scores = x @ keys.T
    unit = lambda s: s / jnp.linalg.norm(s, axis=-1, keepdims=True)  # noqa: E731
    gelu = lambda s: jax.nn.gelu(s, approximate=True)  # noqa: E731
    weights = gelu(3 * unit(scores)) if normalizer == "l2_norm_gelu" else 3 * unit(gelu(scores))
    np.testing.assert_allclose(pattention(x, keys, values, 3.0, normalizer, "tanh"), weights @ values, atol=1e-5)
    assert np.max(np.abs(pattention(x, keys, values, 3.0, normalizer) - weights @ values)) > 1e-4


@pytest.mark.parametrize("make", [tiny_config, tiny_linear_config])
def test_the_models_gelu_is_the_configs(make):
    erf, tanh = (apply(make(**SMALL, model__gelu=gelu)) for gelu in ("erf", "tanh"))
    assert 1e-5 < np.max(np.abs(erf - tanh)) < 0.1


# τ


def test_tau_tokens_fixes_tau_whatever_the_tokens():
    cfg = tiny_config(model__tau_tokens=9)
    expected = dict.fromkeys(("query", "key", "value", "out"), 3.0) | {"ffn": 6.0}  # the authors': 4 x zoom_dim
    assert initial_tau(cfg.model) == expected
    assert initial_tau(tiny_config(model__tau_tokens=9, model__ffn_tokens=200).model) == expected
    state = step_of(cfg).init(jax.random.key(0))
    assert {name: float(tau) for name, tau in state.tau_now().items()} == expected


def test_tau_tokens_at_birth_is_the_plain_model_where_the_ffn_has_four_times_as_many():
    sizes = {"model__qkv_tokens": 24, "model__out_tokens": 24, "model__ffn_tokens": 96}
    assert initial_tau(tiny_config(**sizes, model__tau_tokens=24).model) == initial_tau(tiny_config(**sizes).model)


def test_growth_with_tau_tokens_is_lossless_and_needs_no_ramp():
    counts = {"qkv_tokens": 48, "ffn_tokens": 200}
    model = TokenFormer.init(tiny_config(**SMALL, model__tau_tokens=9).model)
    larger, tokens = model.grow(**counts), random_batch(tiny_config(**SMALL)).tokens_BL
    assert larger.tau == initial_tau(larger.cfg) == model.tau
    before, after = model.logits(tokens), larger.logits(tokens)
    np.testing.assert_allclose(after, before, atol=5e-6 * float(jnp.max(jnp.abs(before))))
    state = TrainState(jnp.int32(3), model.params, (), {n: TauRamp.constant(tau) for n, tau in model.tau.items()})
    abstract = state._replace(params=larger.params)
    grown = grow_state(state, abstract, larger.cfg, jax.random.key(5), "zero_keys", ramp_steps=4)
    for step in (3, 5, 7, 99):
        assert {n: float(ramp.at(jnp.int32(step))) for n, ramp in grown.tau.items()} == model.tau


def test_the_official_format_is_refused_for_another_tau():
    model = TokenFormer.init(tiny_config(**SMALL, model__tau_tokens=9).model)
    with pytest.raises(UserError, match=r"tau of query is 3, but the official format takes it to be sqrt\(24\)"):
        model.to_official()
    check_tau(initial_tau(tiny_config().model), model.cfg, "model")


# Dropout and stochastic depth


@pytest.mark.parametrize("shared", [(), (1,), (1, 2)])
def test_dropout_keeps_the_mean_and_shares_draws_along_axes(shared):
    x = 1 + jax.random.uniform(jax.random.key(0), (3, 4, 5))
    masked = jax.vmap(lambda key: dropout(x, 0.3, key, shared))(jax.random.split(jax.random.key(1), 4000))
    np.testing.assert_allclose(masked.mean(0), x, rtol=0.06)
    kept = np.asarray(masked) != 0
    np.testing.assert_allclose(masked[kept], np.broadcast_to(x / 0.7, masked.shape)[kept], rtol=1e-6)
    for axis in range(3):
        assert (kept == np.take(kept, [0], axis + 1)).all() == (axis in shared)


def test_dropped_weights_of_pattention_have_the_plain_output_as_their_mean_and_their_own_gradient():
    x, keys, values = (jax.random.normal(jax.random.key(i), (4, 6, 8)[i > 0 :]) for i in range(3))

    @jax.jit
    def dropped(x, keys, values, key):
        return pattention(x, keys, values, 2.0, scale_B1N=dropout_scale(0.5, key, (4, 1, 6)))

    outputs = jax.vmap(lambda key: dropped(x, keys, values, key))(jax.random.split(jax.random.key(3), 2000))
    plain = pattention(x, keys, values, 2.0)
    assert np.max(np.abs(outputs.mean(0) - plain)) < 0.1 * np.max(np.abs(plain))
    key, direction = jax.random.key(4), jax.random.normal(jax.random.key(5), (3, 1)) * 1e-2
    gradients = jax.grad(lambda *a: dropped(*a, key).sum(), argnums=(0, 1, 2))(x, keys, values)
    for i, gradient in enumerate(gradients):  # against finite differences of the same mask
        step = direction[i] * jax.random.normal(jax.random.key(6), gradient.shape)
        moved = [[a + sign * step if j == i else a for j, a in enumerate((x, keys, values))] for sign in (1, -1)]
        up, down = (dropped(*a, key).sum() for a in moved)
        assert float((up - down) / 2) == pytest.approx(float((gradient * step).sum()), rel=2e-2, abs=1e-4)


def test_without_rates_nothing_is_drawn():
    plain, dropped = tiny_config(**SMALL), tiny_config(**SMALL, **DROPPED)
    assert masks_key(plain, 3) is None

    def program(cfg, key=None):
        return str(jax.make_jaxpr(lambda tokens: apply(cfg, key, tokens))(random_batch(cfg).tokens_BL))

    assert program(dropped).count("random_bits") == program(plain).count("random_bits")  # of the parameters
    assert program(dropped, masks_key(dropped, 3)).count("random_bits") > program(plain).count("random_bits")


def test_a_steps_key_is_a_function_of_seed_and_step():
    cfg = tiny_config(**DROPPED)
    keys = [masks_key(dataclasses.replace(cfg, seed=seed), step) for seed in (0, 1) for step in (0, 1, 10**6)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 6
    assert masks_key(cfg, jnp.int32(1)) == masks_key(cfg, 1)


@pytest.mark.parametrize(
    "make, rates",
    [(tiny_config, {rate: 0.3}) for rate in DROPPED] + [(tiny_linear_config, DROPPED)],
)
def test_evaluation_is_that_of_the_plain_model_and_training_is_not(make, rates):
    plain, dropped = make(**SMALL), make(**SMALL, **rates)
    np.testing.assert_array_equal(apply(plain), apply(dropped))
    one, same, other = (apply(dropped, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.max(np.abs(one - other)) > 1e-2 < np.max(np.abs(one - apply(plain)))


@pytest.mark.parametrize("rate", DROPPED)
def test_examples_of_a_batch_get_different_masks(rate):
    cfg = tiny_config(**SMALL, **{rate: 0.3})
    tokens = random_batch(cfg).tokens_BL
    same = apply(cfg, jax.random.key(0), np.broadcast_to(tokens[:1], tokens.shape))
    assert np.max(np.abs(same[1:] - same[:1])) > 1e-2


TRAINED = tiny_config(**SMALL, **DROPPED, accumulation=2)


def test_training_twice_gives_the_same_bits():
    whole, metrics = after_steps(TRAINED, 2)
    again, metrics_again = after_steps(TRAINED, 2)
    assert_trees_equal(whole, again)
    assert_trees_equal(metrics, metrics_again)


def test_every_step_and_every_microbatch_has_its_own_masks():
    """Rows 2i and 2i + 1 are the same and fall into different microbatches; weights choose one of them."""
    batch, step = random_batch(TRAINED), step_of(TRAINED)
    even = np.broadcast_to(np.arange(TRAINED.batch_size)[:, None] % 2 == 0, batch.tokens_BL.shape)
    twins = jax.tree.map(lambda x: np.repeat(x[::2], 2, axis=0), batch)
    losses = []
    for number, chosen in ((0, even), (0, ~even), (1, even)):
        state = step.init(jax.random.key(0))
        state = state._replace(step=state.step + number)
        _, metrics = step.train(state, put_batch(step, twins._replace(weights_BL=chosen.astype(np.float32))))
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def test_masks_are_the_same_on_a_mesh_and_rematerialized():
    """A single device that keeps its activations against eight that compute each layer, and its masks, again."""
    alone, expected = after_steps(TRAINED, 2)
    mesh = dataclasses.replace(TRAINED.mesh, data=2, fsdp=2, tensor=2)
    remat = dataclasses.replace(TRAINED.model, remat="full")
    sharded, metrics = after_steps(dataclasses.replace(TRAINED, mesh=mesh, model=remat), 2)
    assert_trees_equal(metrics, expected, rtol=1e-4, atol=1e-6)
    assert_trees_equal(sharded.params, alone.params, atol=2e-4)


# The config


@pytest.mark.parametrize(
    "key, value, need",
    [
        ("model.gelu", "relu", "must be one of erf, tanh"),
        ("model.tau_tokens", -1, "must be 0 or above"),
        ("model.dropout", 1.0, "must be 0 or above, and below 1"),
        ("model.dropout", -0.1, "must be 0 or above, and below 1"),
        ("model.stochastic_depth", float("nan"), "must be 0 or above, and below 1"),
    ],
)
def test_what_an_option_cannot_be_is_named(key, value, need):
    with pytest.raises(UserError, match=f"^{key} = {value!r}: {need}"):
        tiny_config(**{key.replace(".", "__"): value})


def test_a_plain_transformer_has_no_tau_to_fix():
    with pytest.raises(UserError, match=r"model.tau_tokens = 9: .*set it to 0"):
        tiny_linear_config(model__tau_tokens=9)
