"""The parts that layers are made of: norm, rotary, dropout, linear projections."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.devices.sharding import constrain
from tokenformer_jax.nn.backends import rotary_width

Gelu = Callable[[jax.Array], jax.Array]


def erf_gelu(x: jax.Array) -> jax.Array:
    """x Φ(x) as PyTorch computes it; jax.nn.gelu's erfc costs a TPU several times as many operations."""
    return x * 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


# The exact gelu of the authors' PyTorch code, and the tanh approximation (JAX's default) of their TPU code.
GELUS: dict[str, Gelu] = {"erf": erf_gelu, "tanh": functools.partial(jax.nn.gelu, approximate=True)}


def inverse_norm(squares_BL1: jax.Array) -> jax.Array:
    """1 / ‖x‖₂ from ‖x‖₂²; of rows shorter than 1e-12 zero, with a gradient of zero."""
    nonzero = squares_BL1 > 1e-24
    return jnp.where(nonzero, jax.lax.rsqrt(jnp.where(nonzero, squares_BL1, 1.0)), 0.0)


def dropout(x: jax.Array, rate: jax.Array | float, key: jax.Array | None, shared: tuple[int, ...] = ()) -> jax.Array:
    """x with its entries zeroed at `rate` and the others scaled by 1 / (1 - rate); x itself without key or rate.

    Args:
      x: any shape; computed in float32, returned in its dtype.
      rate: the probability of a zero, in [0, 1).
      key: PRNG key. The mask is a function of it and of the shape alone, on every mesh.
      shared: axes along which one draw serves all entries.
    """
    if key is None or (isinstance(rate, float) and rate == 0):
        return x
    shape = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
    return (x.astype(jnp.float32) * dropout_scale(rate, key, shape)).astype(x.dtype)


def dropout_scale(rate: jax.Array | float, key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """float32 factors: 0 at `rate`, else 1 / (1 - rate)."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, shape), 1 / (1 - rate), 0.0)


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, axes: tuple[str, ...], zero_rows: int = 0
) -> nnx.Param:
    """A float32 parameter from N(0, scale²), its last `zero_rows` rows zero, that knows its logical axes."""
    value = scale * jax.random.normal(rngs.params(), shape, jnp.float32)
    if zero_rows:
        value = jnp.where(jnp.arange(shape[0])[:, None] < shape[0] - zero_rows, value, 0.0)
    return nnx.Param(value, axes=axes)


NORM_EPSILON = 1e-5
ROTARY_BASE = 10000.0
Params = dict[str, Any]  # nested; arrays of a block are stacked over layers
Key = jax.Array | None  # a PRNG key in training with dropout or stochastic depth; None computes without them


@jax.custom_vjp
def layer_norm(x_BLD: jax.Array) -> jax.Array:
    """Layer norm without parameters, computed in float32."""
    return _layer_norm_forward(x_BLD)[0]


def _layer_norm_forward(x_BLD):
    x = x_BLD.astype(jnp.float32)
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    if x_BLD.dtype == jnp.float32:
        centered -= jnp.mean(centered, axis=-1, keepdims=True)  # takes out the first mean's rounding
    scale_BL1 = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + NORM_EPSILON)
    y_BLD = (centered * scale_BL1).astype(x_BLD.dtype)
    return y_BLD, (y_BLD, scale_BL1)


def _layer_norm_backward(kept, dy_BLD):
    """Two reductions over a row, where the forward's own derivative takes five."""
    y_BLD, scale_BL1 = kept
    y, dy = y_BLD.astype(jnp.float32), dy_BLD.astype(jnp.float32)
    dx = dy - jnp.mean(dy, axis=-1, keepdims=True) - y * jnp.mean(dy * y, axis=-1, keepdims=True)
    return ((scale_BL1 * dx).astype(dy_BLD.dtype),)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rotary(x_BLD: jax.Array, positions_L: jax.Array, head_dim: int, dims: int) -> jax.Array:
    """Turns the first `dims` dims of each head by their position, pairing dim i with i + dims/2 (GPT-NeoX)."""
    if dims == 0:
        return x_BLD
    half = dims // 2
    width = rotary_width(head_dim, x_BLD.shape[-1])
    # A product with ±1 gives each dim its partner exactly.
    partner_KK = np.zeros((head_dim, head_dim), np.float32)
    partner_KK[range(half, dims), range(half)] = -1
    partner_KK[range(half), range(half, dims)] = 1
    partner_WW = np.kron(np.eye(width // head_dim, dtype=np.float32), partner_KK)
    frequencies = ROTARY_BASE ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims)
    frequencies_W = jnp.tile(jnp.pad(jnp.tile(frequencies, 2), (0, head_dim - dims)), width // head_dim)
    angles_LW = (positions_L[:, None].astype(jnp.float32) * frequencies_W)[:, None]
    x_BLGW = x_BLD.reshape(*x_BLD.shape[:2], -1, width)
    partner_BLGW = jnp.einsum("blgw,wv->blgv", x_BLGW, partner_WW.astype(x_BLD.dtype), precision="highest")
    turned_BLGW = x_BLGW * jnp.cos(angles_LW) + partner_BLGW * jnp.sin(angles_LW)
    return turned_BLGW.astype(x_BLD.dtype).reshape(x_BLD.shape)


def _rotary_forward(x_BLD, positions_L, head_dim, dims):
    return rotary(x_BLD, positions_L, head_dim, dims), positions_L


def _rotary_backward(head_dim, dims, positions_L, dy_BLD):
    return rotary(dy_BLD, -positions_L, head_dim, dims), None


rotary.defvjp(_rotary_forward, _rotary_backward)


def subkey(key: Key, index: jax.Array | int) -> Key:
    """Key number `index` of those that a key gives; None gives None."""
    return None if key is None else jax.random.fold_in(key, index)


class Linear(nnx.Module):
    """x W, the plain Transformer's projection."""

    def __init__(self, in_dim: int, out_dim: int, axes: tuple[str, str], *, scale: float, dtype, rngs: nnx.Rngs):
        self.dtype = dtype
        self.weight = parameter(rngs, (in_dim, out_dim), scale, axes)

    def __call__(self, x_BLD: jax.Array, tau: None = None, key: Key = None) -> jax.Array:
        axes = (axis if axis == "tokens" else None for axis in self.weight.axes)
        return jnp.einsum("...d,de->...e", x_BLD, constrain(self.weight[...].astype(self.dtype), *axes))


class MLP(nnx.Module):
    """gelu(x W₁) W₂, the plain Transformer's feed-forward."""

    def __init__(self, dim: int, hidden: int, *, gelu: str, dropout: float, scale: float, dtype, rngs: nnx.Rngs):
        self.gelu, self.dropout = gelu, dropout
        self.up = Linear(dim, hidden, ("embed", "tokens"), scale=0.02, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, dim, ("tokens", "embed"), scale=scale, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, tau: None = None, key: Key = None) -> jax.Array:
        hidden_BLN = GELUS[self.gelu](self.up(x_BLD))
        return self.down(dropout(hidden_BLN, self.dropout, key, shared=(1,)))


def count_params(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
