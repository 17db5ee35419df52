"""Laws of padding tokens: a model padded to a multiple computes what it computes without, and they can learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import assert_trees_equal, random_batch, tiny_config, tiny_linear_config
from tokenformer_jax import TokenFormer
from tokenformer_jax.config import SIZES
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.recipes import check_growth
from tokenformer_jax.growth.shrink import check_shrinking, shrink_state
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.nn.pattention import pattention
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.official import check_tau

ODD = {"model__qkv_tokens": 21, "model__out_tokens": 37, "model__ffn_tokens": 93, "model__vocab_size": 304}
PLAIN = tiny_config(**ODD)
PADDED = tiny_config(**ODD, model__pad_tokens_to=8)
TOKENS = random_batch(PLAIN).tokens_BL


def shapes(cfg):
    return {name: (cfg.model.unpadded_tokens[name], cfg.model.tokens[name]) for name in ("query", "out", "ffn")}


@pytest.fixture(scope="module")
def plain():
    return TokenFormer.init(PLAIN.model)


@pytest.fixture(scope="module")
def padded():
    return TokenFormer.init(PADDED.model)


def test_counts_are_rounded_up_and_the_scale_is_that_of_the_unpadded_count():
    assert shapes(PADDED) == {"query": (21, 24), "out": (37, 40), "ffn": (93, 96)}
    assert initial_tau(PADDED.model) == initial_tau(PLAIN.model)
    assert dataclasses.replace(PADDED.model, pad_tokens_to=1).tokens == PLAIN.model.tokens


def test_a_padded_model_is_drawn_as_the_unpadded_one_with_zero_keys_after_it(plain, padded):
    for name, (tokens, _) in shapes(PADDED).items():
        ours, theirs = padded.params["blocks"][name], plain.params["blocks"][name]
        for kind in ("keys", "values"):
            np.testing.assert_array_equal(ours[kind][:, :tokens], theirs[kind])
        assert not np.any(ours["keys"][:, tokens:])
        assert np.all(np.any(ours["values"][:, tokens:], axis=-1))
    assert_trees_equal(padded.params["embed"], plain.params["embed"])


def test_padding_changes_neither_loss_nor_gradient_and_its_own_keys_get_one(plain, padded):
    losses, gradients = [], []
    for cfg, model in ((PLAIN, plain), (PADDED, padded)):
        batch = random_batch(cfg)
        mean = lambda params, cfg=cfg, tau=model.tau, batch=batch: mean_loss(cfg, params, tau, batch)  # noqa: E731
        loss, gradient = jax.jit(jax.value_and_grad(mean))(model.params)
        losses.append(float(loss))
        gradients.append(gradient["blocks"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    theirs, ours = gradients
    for name, (tokens, _) in shapes(PADDED).items():
        assert np.all(np.linalg.norm(ours[name]["keys"][:, tokens:], axis=-1) > 0)
        assert not np.any(ours[name]["values"][:, tokens:])  # until the keys move
        for kind in ("keys", "values"):
            np.testing.assert_allclose(ours[name][kind][:, :tokens], theirs[name][kind], atol=1e-6)


def mean_loss(cfg, params, tau, batch):
    nll, weights = nnx.merge(abstract_model(cfg.model)[0], params).loss_sums(batch, tau, cfg)
    return nll / weights


@pytest.mark.parametrize("normalizer", ["l2_norm_gelu", "gelu_l2_norm"])
def test_tokens_with_zero_keys_are_inert(normalizer):
    x, keys, values = (jax.random.normal(jax.random.key(i), (n, 8)) for i, n in enumerate((5, 13, 16)))
    expected = pattention(x, keys, values[:13], 3.0, normalizer)
    got = pattention(x, jnp.pad(keys, ((0, 3), (0, 0))), values, 3.0, normalizer)
    np.testing.assert_allclose(got, expected, atol=2e-6)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "recipe, pads, counts",
    [
        pytest.param("zero_keys", (0, 16), (21, 37, 93), marks=SLOW),
        ("zero_keys", (8, 16), (60, 37, 180)),
        pytest.param("zero_keys", (8, 0), (60, 40 + 1, 180), marks=SLOW),
        pytest.param("isometric", (8, 8), (60, 100, 180), marks=SLOW),
        pytest.param("split", (8, 8), (47, 79, 190), marks=SLOW),  # padded: 48, 80, 192
    ],
)
def test_growing_from_and_to_padded_models_is_lossless(recipe, pads, counts):
    """Also when the padding has learnt: it is drawn as any other token here."""
    old, new = (dataclasses.replace(PLAIN.model, pad_tokens_to=pad) for pad in pads)
    new = dataclasses.replace(new, **dict(zip(SIZES, counts, strict=True)))
    check_growth(old, new, recipe)
    model = TokenFormer(old, TokenFormer.init(old.padding_counted()).params, initial_tau(old))
    state = model.state()
    abstract = state._replace(params=abstract_model(new)[1])
    grown = grow_state(state, abstract, new, jax.random.key(1), recipe, ramp_steps=0)
    after = TokenFormer(new, grown.params, grown.tau_now())
    logits = model.logits(TOKENS)
    np.testing.assert_allclose(after.logits(TOKENS), logits, atol=5e-6 * float(jnp.max(jnp.abs(logits))))


def test_shrinking_a_padded_model_to_its_counts_gives_the_unpadded_one(plain, padded):
    new = PLAIN.model
    check_shrinking(PADDED.model, new)
    state = shrink_state(padded.state(), new, ramp_steps=0)
    assert_trees_equal(state.params, plain.params)
    assert {name: float(tau) for name, tau in state.tau_now().items()} == pytest.approx(plain.tau)


EIGHT = {"mesh__tensor": 8, "model__vocab_size": 304}


def changed(**values):
    return dataclasses.replace(PADDED.model, **values)


@pytest.mark.parametrize(
    "check, message",
    [
        (lambda: tiny_config(model__pad_tokens_to=8, model__normalizer="softmax"), "pad_tokens_to = 8: .*'softmax'"),
        (lambda: tiny_linear_config(model__pad_tokens_to=8), "model.pad_tokens_to = 8: .* model.projection = 'linear'"),
        (lambda: tiny_config(model__pad_tokens_to=-1), "model.pad_tokens_to = -1: must be 0 or above"),
        (lambda: check_growth(PADDED.model, changed(ffn_tokens=95), "zero_keys"), "ffn_tokens = 95: .* padded to 96"),
        (lambda: check_growth(PADDED.model, changed(pad_tokens_to=0), "zero_keys"), "qkv_tokens = 21: .* has 24"),
        (lambda: check_shrinking(PADDED.model, changed(pad_tokens_to=16)), "model.qkv_tokens = 32: the source has 24"),
        (lambda: check_tau(initial_tau(PADDED.model), PADDED.model, "W"), r"sqrt\(24\)"),
    ],
)
def test_what_padding_cannot_be_is_refused_by_name(check, message):
    with pytest.raises(UserError, match=message):
        check()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model__ffn_tokens": 93, "mesh__tensor": 4},
            "model.ffn_tokens = 93: .* use 92 or 96, or .*pad_tokens_to = 4",
        ),
        ({"model__qkv_tokens": 3, "mesh__tensor": 4}, "model.qkv_tokens = 3: .* mesh.tensor = 4; use 4"),
        (
            {"model__pad_tokens_to": 9, "mesh__tensor": 4},
            "model.pad_tokens_to = 9: .* mesh.tensor = 4; use 8 or 12",
        ),
        ({"model__vocab_size": 301, "mesh__tensor": 2}, "model.vocab_size = 301: .* use 300 or 302$"),
        (
            {"model__embed_dim": 48, "model__num_heads": 12, "model__rotary_fraction": 0.5} | EIGHT,
            "model.num_heads = 12: .* use 8 or 16",
        ),
        ({"model__num_heads": 2, "mesh__tensor": 4}, "model.num_heads = 2: .* use 4"),
        (
            {"model__embed_dim": 36, "model__rotary_fraction": 0.0, "mesh__fsdp": 8},
            "embed_dim = 36: .* use 32 or 40",
        ),
        (
            {"batch_size": 6, "mesh__slice": 2, "mesh__data": 2},
            r"config.batch_size = 6: .*slice.* use config.batch_size = 4 or 8",
        ),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_by_the_mesh_are_refused_with_the_nearest_that_would_do(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)
