"""The GPU's kernels, interpreted, against the plain versions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokenformer_jax.nn import row_kernels
from tokenformer_jax.nn.layers import GELUS
from tokenformer_jax.nn.pattention import NORMALIZERS


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def relative(ours: jax.Array, theirs: jax.Array) -> float:
    return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))


# Tokens that fill their pieces, that do not, that are few, that are read in chunks, and in long chunks.
@pytest.mark.parametrize(("rows", "tokens"), [(8, 64), (6, 100), (5, 7), (2, 2048), (3, 2500), (2, 5000), (1, 17000)])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_weights_and_their_gradient_are_those_of_equation_5(rows, tokens, gelu):
    scores, dweights = random(0, rows, tokens).at[-1].mul(1e3), random(1, rows, tokens)
    tau = jnp.float32(tokens**0.5)
    expected, backward = jax.vjp(lambda s: NORMALIZERS["l2_norm_gelu"](s, tau, GELUS[gelu]), scores)
    weights, squares = row_kernels.weights(scores, tau, gelu, interpret=True)
    again, dscores = row_kernels.weights_gradient(scores, dweights, squares, tau, gelu, interpret=True)
    assert relative(weights, expected) < 1e-6
    assert relative(again, expected) < 1e-6
    assert relative(squares, jnp.sum(jnp.square(scores), axis=-1)) < 1e-6
    assert relative(dscores, backward(dweights)[0]) < 1e-5


def test_a_row_of_zeros_has_weights_and_gradients_of_zero():
    scores = jnp.zeros((2, 96))
    weights, squares = row_kernels.weights(scores, jnp.float32(9.8), "erf", interpret=True)
    _, dscores = row_kernels.weights_gradient(
        scores, random(1, 2, 96), squares, jnp.float32(9.8), "erf", interpret=True
    )
    assert not weights.any() and not dscores.any()


def test_a_row_that_is_not_finite_stays_so():
    scores = random(0, 2, 96).at[1, 3].set(jnp.nan)
    weights, squares = row_kernels.weights(scores, jnp.float32(9.8), "erf", interpret=True)
    assert jnp.isnan(squares[1]) and jnp.isnan(weights[1, 3]) and jnp.isfinite(weights[0]).all()


@pytest.mark.parametrize(("rows", "vocabulary"), [(4, 50), (3, 1000), (2, 16384), (2, 20001)])
def test_losses_and_their_gradient_are_those_of_optax(rows, vocabulary):
    logits, weights = 5 * random(0, rows, vocabulary), jnp.abs(random(1, rows))
    targets = jnp.asarray(np.random.default_rng(2).integers(0, vocabulary, rows), jnp.int32)

    def plain(logits: jax.Array) -> jax.Array:
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    losses, dlogits = row_kernels.softmax_loss(logits, targets, weights, jnp.float32, interpret=True)
    expected, dexpected = jax.value_and_grad(plain)(logits)
    assert relative(jnp.sum(losses * weights), expected) < 1e-6
    assert relative(dlogits, dexpected) < 1e-5


def test_bfloat16_rounds_what_is_stored_and_nothing_else():
    scores = random(0, 4, 300).astype(jnp.bfloat16)
    exact, _ = row_kernels.weights(scores.astype(jnp.float32), jnp.float32(17.0), "erf", interpret=True)
    weights, _ = row_kernels.weights(scores, jnp.float32(17.0), "erf", interpret=True)
    assert weights.dtype == jnp.bfloat16
    assert (weights == exact.astype(jnp.bfloat16)).all()
