"""The loss in chunks is the loss over all logits, and so is its gradient."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.helpers import assert_trees_equal
from tokenformer_jax.nn import loss
from tokenformer_jax.nn.loss import cross_entropy

BATCH, DIM, VOCAB, CHUNK = 3, 16, 50, 48


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", CHUNK * VOCAB)


@pytest.mark.parametrize("length", [2 * CHUNK, CHUNK + 1, 7])
def test_chunks_change_nothing(length):
    h_BLD = jax.random.normal(jax.random.key(0), (BATCH, length, DIM))
    table_VD = jax.random.normal(jax.random.key(1), (VOCAB, DIM))
    targets_BL = jax.random.randint(jax.random.key(2), (BATCH, length), 0, VOCAB)
    weights_BL = jax.random.bernoulli(jax.random.key(3), 0.8, (BATCH, length)).astype(jnp.float32)

    def plain(h_BLD, table_VD):
        losses_BL = optax.softmax_cross_entropy_with_integer_labels(h_BLD @ table_VD.T, targets_BL)
        return jnp.sum(losses_BL * weights_BL) / 7

    def chunked(h_BLD, table_VD):
        return cross_entropy(h_BLD, table_VD, targets_BL, weights_BL) / 7

    both = [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(h_BLD, table_VD) for f in (plain, chunked)]
    assert_trees_equal(*both, rtol=2e-5, atol=2e-5)
    assert_trees_equal(jax.jit(chunked)(h_BLD, table_VD), both[0][0], rtol=1e-6)


def test_logits_of_all_positions_never_exist():
    shapes = [(BATCH, 4 * CHUNK, DIM), (VOCAB, DIM)]
    arguments = [jnp.zeros(shape) for shape in shapes]
    targets_BL, weights_BL = jnp.zeros(shapes[0][:2], jnp.int32), jnp.ones(shapes[0][:2])
    gradients = jax.jit(jax.grad(lambda h, table: cross_entropy(h, table, targets_BL, weights_BL), argnums=(0, 1)))
    sizes = re.findall(rf"tensor<([\dx]*){VOCAB}xf32>", gradients.lower(*arguments).as_text())
    assert max(math.prod(int(n) for n in size.split("x") if n) for size in sizes) == CHUNK
