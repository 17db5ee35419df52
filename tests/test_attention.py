"""Laws of the kernels: each computes what JAX's plain attention does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_trees_equal
from tokenformer_jax.nn.attention import blockwise_attention, fused_attention, splash_attention
from tokenformer_jax.nn.backends import attention_kernel

KERNELS = {
    "splash": functools.partial(splash_attention, interpret=True),
    "blockwise": lambda q, k, v, segments_BL, causal=True: blockwise_attention(q, k, v, segments_BL, causal),
    "fused": functools.partial(fused_attention, implementation="xla"),  # what surrounds cuDNN's kernel
}


def plain_attention(q_BLHK, k_BLHK, v_BLHK, segments_BL, causal=True):
    mask = None if segments_BL is None else (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    out_BLHK = jax.nn.dot_product_attention(q_BLHK, k_BLHK, v_BLHK, mask=mask, is_causal=causal)
    return out_BLHK.reshape(*q_BLHK.shape[:2], -1)


@pytest.mark.parametrize(("segmented", "causal"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize(
    ("name", "length"),
    [
        *(("splash", length) for length in (197, 256)),
        *(("blockwise", length) for length in (1, 64, 200, 256, 1000)),
        *(("fused", length) for length in (196, 197)),
    ],
)
def test_a_kernel_and_its_gradient_equal_the_plain_attention(name, length, segmented, causal):
    if (name, length, segmented) == ("splash", 197, True):
        pytest.skip("padding and segments: nothing has both")
    shape = (2, length, 2, 64)
    *qkv, dy = (jax.random.normal(jax.random.key(i), shape) for i in range(4))
    segments_BL = jnp.cumsum(jax.random.bernoulli(jax.random.key(9), 0.05, shape[:2]), 1) + 1 if segmented else None

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(attend, *qkv):
        y, backward = jax.vjp(lambda q, k, v: attend(q, k, v, segments_BL, causal=causal), *qkv)
        return y, backward(dy.reshape(y.shape))

    plain, fast = (with_gradients(attend, *qkv) for attend in (plain_attention, KERNELS[name]))
    assert_trees_equal(plain, fast, rtol=2e-5, atol=2e-5)


def test_blockwise_attention_in_bfloat16_is_as_close_to_float32_as_the_plain_one():
    qkv = [jax.random.normal(jax.random.key(i), (2, 200, 2, 64)) for i in range(3)]
    exact = plain_attention(*qkv, None)
    plain, blockwise = (
        attend(*(x.astype(jnp.bfloat16) for x in qkv), None) for attend in (plain_attention, blockwise_attention)
    )
    assert plain.dtype == blockwise.dtype == jnp.bfloat16
    error = lambda y: float(jnp.abs(y.astype(jnp.float32) - exact).max())  # noqa: E731
    assert error(blockwise) <= 1.1 * error(plain)


def test_the_kernel_is_chosen_by_platform_shape_and_dtype():
    assert attention_kernel("tpu", (8, 1024, 12, 64), jnp.bfloat16) == "splash"
    assert attention_kernel("tpu", (8, 1000, 12, 64), jnp.bfloat16) == "blockwise"
    assert attention_kernel("tpu", (8, 197, 12, 64), jnp.bfloat16, causal=False) == "splash"
    assert attention_kernel("gpu", (8, 1024, 12, 64), np.dtype(jnp.bfloat16)) == "cudnn"
    assert attention_kernel("gpu", (8, 1024, 12, 64), jnp.float32) == "blockwise"
    assert attention_kernel("cpu", (8, 1024, 12, 64), jnp.bfloat16) == "blockwise"
