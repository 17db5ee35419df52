"""Laws of the language model, and the authors' numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.helpers import DATA, golden_model, tiny_config, tiny_linear_config
from tokenformer_jax.nn.attention import KVCache
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.layers import layer_norm, rotary
from tokenformer_jax.nn.pattention import pattention
from tokenformer_jax.nn.transformer import initial_tau


@functools.partial(jax.jit, static_argnums=0)
def apply(cfg, params, tokens, **kwargs):
    graphdef, _, _ = abstract_model(cfg.model)
    return nnx.merge(graphdef, params)(tokens, initial_tau(cfg.model), **kwargs)


@functools.cache
def example(linear: bool = False, **overrides):
    cfg = (tiny_linear_config if linear else tiny_config)(**overrides)
    params = init_params(cfg.model, jax.random.key(1))
    params = jax.tree.map(lambda x: 5 * x, params)  # larger weights: the laws bite
    tokens = jax.random.randint(jax.random.key(2), (2, cfg.model.context_length), 0, cfg.model.vocab_size)
    return cfg, params, tokens


@pytest.mark.parametrize("name", ["lm_2layer.npz", "lm_rot8.npz"])
def test_logits_loss_and_every_gradient_match_the_authors(name):
    cfg, params, expected, raw = golden_model(name)

    def loss(params):
        logits, _ = apply(cfg, params, raw["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, raw["labels"]).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, params))
    np.testing.assert_allclose(logits, raw["logits"], atol=2e-5)
    np.testing.assert_allclose(value, raw["loss"], atol=1e-5)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=5e-6), gradients, expected)


def test_layer_norms_match_the_authors():
    raw = np.load(DATA / "layernorm.npz", allow_pickle=False)
    ours = layer_norm(jnp.asarray(raw["x"]))
    np.testing.assert_allclose(ours, raw["block_norm_out"], atol=2e-5)
    np.testing.assert_allclose(ours * raw["weight"] + raw["bias"], raw["final_norm_out"], atol=2e-5)
    x = raw["x"].astype(np.float64)
    exact = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(ours, exact, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 4])
def test_rotary_matches_the_authors(offset):
    raw = np.load(DATA / "rotary.npz", allow_pickle=False)
    for name in ("q", "k"):
        x_BLHK = jnp.asarray(raw[name]).transpose(1, 0, 2, 3)
        B, L, H, K = x_BLHK.shape
        turned_BLD = rotary(x_BLHK.reshape(B, L, H * K), offset + jnp.arange(L), K, K)
        ours = turned_BLD.reshape(x_BLHK.shape).transpose(1, 0, 2, 3)
        np.testing.assert_allclose(ours, raw[f"{name}_out" + (f"_offset{offset}" if offset else "")], atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_causality(linear):
    cfg, params, tokens = example(linear)
    changed = tokens.at[:, 9].add(1)
    before, after = apply(cfg, params, tokens)[0], apply(cfg, params, changed)[0]
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (jnp.abs(before[:, 9:] - after[:, 9:]).max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize("linear", [False, True])
def test_cached_decode_equals_full_forward(linear):
    cfg, params, tokens = example(linear)
    full, _ = apply(cfg, params, tokens)
    cache = KVCache.empty(cfg.model, 2, 20)
    pieces = []
    for piece in jnp.split(tokens, [7, 8, 9, 13], axis=1):
        logits, cache = apply(cfg, params, piece, cache=cache)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, atol=2e-5)
    assert cache.length == tokens.shape[1]


def test_scanned_layers_equal_a_loop_over_them():
    cfg, params, tokens = example()
    graphdef, _, _ = abstract_model(cfg.model)
    model, tau = nnx.merge(graphdef, params), initial_tau(cfg.model)
    x = params["embed"][tokens]

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True), None  # no cache

    for i in range(cfg.model.num_layers):
        block = nnx.merge(nnx.graphdef(model.blocks), jax.tree.map(lambda a, i=i: a[i], params["blocks"]))
        x, _ = block(x, tau, attend, jnp.arange(tokens.shape[1]))
    np.testing.assert_allclose(model.logits(x), model(tokens, tau)[0], atol=2e-5)


@pytest.mark.parametrize("remat", ["dots", "projections", "full"])
def test_rematerialization_changes_no_gradient(remat):
    cfg, params, tokens = example()
    loss = lambda cfg: lambda p: jnp.square(apply(cfg, p, tokens)[0]).mean()  # noqa: E731
    plain = jax.jit(jax.grad(loss(cfg)))(params)
    again = jax.jit(jax.grad(loss(tiny_config(model__remat=remat))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_segments_keep_documents_apart():
    cfg, params, tokens = example()
    segments = jnp.where(jnp.arange(tokens.shape[1]) < 6, 1, 2)[None].repeat(2, axis=0)
    together, _ = apply(cfg, params, tokens, segments_BL=segments)
    alone, _ = apply(cfg, params, tokens[:, 6:])
    np.testing.assert_allclose(together[:, 6:], alone, atol=2e-5)  # rotary is relative: the offset does not matter


def test_bfloat16_loss_is_near_float32_and_parameters_stay_float32():
    cfg, params, tokens = example()
    half = tiny_config(model__dtype="bfloat16")
    loss = lambda cfg: float(  # noqa: E731
        optax.softmax_cross_entropy_with_integer_labels(apply(cfg, params, tokens)[0], tokens).mean()
    )
    assert loss(half) == pytest.approx(loss(cfg), rel=0.02)
    assert loss(half) != loss(cfg)
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_model(half.model)[1])} == {jnp.dtype("float32")}


def test_initialisation_has_the_authors_moments():
    cfg = tiny_config(model__embed_dim=64, model__ffn_tokens=512, model__num_layers=4)
    params = init_params(cfg.model, jax.random.key(0))
    ffn = params["blocks"]["ffn"]
    assert float(jnp.std(params["embed"])) == pytest.approx(0.02, rel=0.03)
    assert float(jnp.std(ffn["keys"])) == pytest.approx(0.02, rel=0.03)
    assert float(jnp.std(ffn["values"])) == pytest.approx(2 / 4 / 64**0.5, rel=0.03)
    assert float(jnp.abs(jnp.mean(ffn["keys"]))) < 1e-3
    assert float(jnp.abs(ffn["keys"][0] - ffn["keys"][1]).max()) > 0.01  # layers are drawn independently


def test_linear_projections_can_match_a_tokenformer_parameter_for_parameter():
    token = tiny_config(model__embed_dim=64, model__qkv_tokens=48, model__out_tokens=48, model__ffn_tokens=192)
    plain = tiny_linear_config(model__embed_dim=64, model__ffn_tokens=256)
    count = lambda cfg: sum(a.size for a in jax.tree.leaves(abstract_model(cfg.model)[1]))  # noqa: E731
    assert count(token) == count(plain)


def test_the_layer_uses_the_tau_it_is_given():
    cfg, params, tokens = example()
    graphdef, _, _ = abstract_model(cfg.model)
    model, tau = nnx.merge(graphdef, params), initial_tau(cfg.model)
    base = model(tokens, tau)[0]
    for name in tau:
        assert jnp.abs(model(tokens, tau | {name: 2 * tau[name]})[0] - base).max() > 1e-3, name
    assert pattention(jnp.ones(4), jnp.ones((3, 4)), jnp.ones((3, 2)), 2.0).shape == (2,)
