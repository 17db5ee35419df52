"""Laws of the Pattention layer, and the authors' numbers."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import DATA
from tokenformer_jax.nn.layers import GELUS, dropout_scale
from tokenformer_jax.nn.pattention import NORMALIZERS, pattention, plain_pattention


@pytest.mark.parametrize("normalizer", sorted(NORMALIZERS))
def test_output_and_gradients_match_the_authors(normalizer):
    raw = np.load(DATA / f"pattention_{normalizer}.npz", allow_pickle=False)
    arguments = raw["inputs"], raw["key_param_tokens"], raw["value_param_tokens"]
    tau = np.sqrt(raw["key_param_tokens"].shape[0])
    output, gradients = jax.vjp(lambda x, k, v: pattention(x, k, v, tau, normalizer), *map(jnp.asarray, arguments))
    np.testing.assert_allclose(output, raw["output"], atol=1e-5)
    for ours, name in zip(
        gradients(raw["cotangent"]), ("inputs", "key_param_tokens", "value_param_tokens"), strict=True
    ):
        np.testing.assert_allclose(ours, raw[f"grad_{name}"], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("normalizer", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_input_gives_zeros_and_tiny_inputs_finite_gradients(normalizer, dtype):
    keys, values = jnp.ones((6, 4)), jnp.ones((6, 5))
    f = lambda x, k, v: pattention(x.astype(dtype), k, v, 2.0, normalizer).astype(jnp.float32).sum()  # noqa: E731
    for scale in [0.0, *10.0 ** -np.arange(1, 40)]:
        output, gradients = jax.value_and_grad(f, argnums=(0, 1, 2))(jnp.full((3, 4), scale), keys, values)
        assert all(bool(jnp.isfinite(g).all()) for g in gradients), scale
        assert jnp.isfinite(output) and (scale or output == 0)


@pytest.mark.parametrize("normalizer", ["l2_norm_gelu", "gelu_l2_norm"])
def test_zero_keys_appended_change_nothing_while_tau_is_kept(normalizer):
    x, keys, values, new = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 4), [(7, 16), (24, 16), (24, 8), (30, 8)], strict=True
        )
    )
    before = pattention(x, keys, values, 24**0.5, normalizer)
    grown_keys, grown_values = jnp.concatenate([keys, jnp.zeros((30, 16))]), jnp.concatenate([values, new])
    np.testing.assert_allclose(
        pattention(x, grown_keys, grown_values, 24**0.5, normalizer), before, rtol=5e-6, atol=5e-6
    )
    moved = pattention(x, grown_keys, grown_values, 54**0.5, normalizer)
    assert jnp.abs(moved - before).max() > 1e-2  # tau read from the shape would change the function


def test_l2_norm_gelu_ignores_the_scale_of_its_input():
    x, keys, values = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(7, 16), (24, 16), (24, 8)]))
    np.testing.assert_allclose(
        pattention(1e-3 * x, keys, values, 5.0), pattention(1e3 * x, keys, values, 5.0), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("normalizer", sorted(NORMALIZERS))
@pytest.mark.parametrize("num_tokens", [7, 10, 12])  # which a CPU works on in one, two and four groups
def test_a_position_alone_gives_what_it_gives_among_others(normalizer, num_tokens):
    x, keys, values = (jax.random.normal(jax.random.key(i), (n, 16)) for i, n in enumerate((3, num_tokens, num_tokens)))
    attend = lambda x: pattention(x, keys, values, 2.0, normalizer)  # noqa: E731
    together, gradient = jax.vjp(attend, x)
    for i in range(3):
        alone, gradient_alone = jax.vjp(attend, x[None, i : i + 1])
        np.testing.assert_allclose(alone[0, 0], together[i], rtol=1e-5, atol=1e-5)
        dy = jnp.zeros_like(together).at[i].set(1.0)
        np.testing.assert_allclose(
            gradient_alone(dy[None, i : i + 1])[0][0, 0], gradient(dy)[0][i], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("gelu", sorted(GELUS))
@pytest.mark.parametrize("normalizer", sorted(NORMALIZERS))
def test_the_written_out_gradient_is_that_of_the_plain_equation(normalizer, gelu, recompute):
    shapes = (4, 6, 16), (24, 16), (24, 8), (4, 6, 8)
    x, keys, values, dy = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    scale = dropout_scale(0.3, jax.random.key(9), (4, 1, 24))
    fast = lambda *a: pattention(*a, 5.0, normalizer, gelu, scale_B1N=scale, recompute=recompute)  # noqa: E731
    plain = lambda *a: plain_pattention(*a, 5.0, normalizer, gelu, scale)  # noqa: E731
    (y, gradient), (expected, expected_gradient) = (jax.vjp(f, x, keys, values) for f in (fast, plain))
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(gradient(dy), expected_gradient(dy), rtol=1e-4, atol=1e-4)


def test_arrays_that_do_not_fit_each_other_are_named_by_their_shapes():
    with pytest.raises(AssertionError, match=r"\(6, 5\)"):
        pattention(jnp.ones((2, 4)), jnp.ones((6, 5)), jnp.ones((6, 3)), 1.0)


def test_pattention_fits_into_the_readmes_flax_model():
    blocks = (pathlib.Path(__file__).parents[1] / "README.md").read_text().split("```python\n")
    code = next(block for block in blocks if "class Head" in block).split("```")[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    head = names["Head"](nnx.Rngs(0))
    gradients = nnx.grad(lambda head, x: jnp.sum(head(x) ** 2))(head, jnp.ones((2, 64)))
    assert all(bool(jnp.any(gradient != 0)) for gradient in jax.tree.leaves(gradients))
