"""Laws of the kernels: each computes what the plain attention does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_trees_equal
from tokenformer_jax.attention import causal_attention, kernel, splash_attention

SHAPE = (2, 256, 2, 64)


@pytest.mark.parametrize("segmented", [False, True])
def test_splash_attention_equals_the_plain_one(segmented):
    *qkv, dy = (jax.random.normal(jax.random.key(i), SHAPE) for i in range(4))
    segments_BL = jnp.cumsum(jax.random.bernoulli(jax.random.key(9), 0.05, SHAPE[:2]), 1) + 1 if segmented else None

    def with_gradients(attend):
        y, backward = jax.vjp(attend, *qkv)
        return y, backward(dy)

    plain = with_gradients(lambda q, k, v: causal_attention(q, k, v, segments_BL))
    fast = with_gradients(lambda q, k, v: splash_attention(q, k, v, segments_BL, interpret=True))
    assert_trees_equal(plain, fast, rtol=2e-5, atol=2e-5)


def test_the_kernel_is_chosen_by_platform_shape_and_dtype():
    assert kernel("tpu", (8, 1024, 12, 64), jnp.bfloat16) == "splash"
    assert kernel("tpu", (8, 1000, 12, 64), jnp.bfloat16) == "xla"
    assert kernel("gpu", (8, 1024, 12, 64), np.dtype(jnp.bfloat16)) == "cudnn"
    assert kernel("gpu", (8, 1024, 12, 64), jnp.float32) == "xla"
    assert kernel("cpu", (8, 1024, 12, 64), jnp.bfloat16) == "xla"
