"""What is computed in another way on another platform: each with its reason, and what it gained where it was measured.

The figures are of a training step or of decoding on two CPU cores (docs/performance.md) or an H100
(docs/accelerator.md); TPU ones are from the compiler's plan. All ways compute the same, up to rounding.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tokenformer_jax.devices.sharding import platform

GROUPS = 4  # of tokens, at most, that a CPU's cores work on at once for a single position
SPLASH_BLOCKS = (512, 256, 128)  # positions that splash attention takes at once


def attention_kernel(
    platform: str, shape: tuple[int, ...], dtype: jnp.dtype, causal: bool = True
) -> Literal["splash", "cudnn", "blockwise"]:
    """The attention for queries of this [B, L, H, K], none of which keeps scores for the gradient.

    JAX's Pallas kernel on a TPU and cuDNN's on a GPU, where they apply. In blocks elsewhere: half of attention's time
    on a CPU. The TPU's takes multiples of 128 positions; to images, whose attention is a small part, padding is added.
    """
    _, length, _, head_dim = shape
    if platform == "tpu" and (length % SPLASH_BLOCKS[-1] == 0 or (not causal and length > SPLASH_BLOCKS[-1])):
        return "splash"
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "blockwise"


def rotary_width(head_dim: int, dim: int) -> int:
    """How many dims rotary turns in one product: a TPU's whole row, since splitting it into heads costs more."""
    return dim if platform() == "tpu" else head_dim


def stacks_layers_to_decode() -> bool:
    """Whether the next token is computed from stacked layers.

    A CPU and a GPU get parameters and KV cache of each layer as arrays of their own. Slicing a stack for every token
    costs a CPU more than computing with the slices; this, `product_with_keys` and keys that are multiplied as they lie
    made 1.5 × as many tokens a second. On a GPU, by the compiled program, it saves 12 to 28 % of a token's kernels, and
    all of them are launched at once, as one graph, where a loop launches one for each layer.
    """
    return platform() == "tpu"


def turn_values(layers: Any) -> Any:
    """Layers with value tokens [E, N] instead of [N, E] on a GPU, or back: so they lie in memory while it decodes.

    Its product of a single position with values as they are trained sums over rows: XLA writes all products, and sums
    them up on 6 of 132 processors. This way it sums along rows, in one kernel: 0.6 of a token's bytes at 124M.
    """
    if platform() != "gpu":
        return layers
    return jax.tree.map_with_path(lambda path, x: x.T if path[-1].key == "values" else x, layers)


def unrolls_layers(remat: str) -> bool:
    """Whether training compiles every layer anew instead of one in a loop.

    A GPU's loop copies what its products leave for the gradient into arrays of all layers, and zeroes those before. In
    a row an H100's step takes 0.86 of the time (124M) and 0.89 (1.4B), and twice as long to compile. Where remat keeps
    little there is little to copy.
    """
    return platform() == "gpu" and remat in ("none", "dots")


def sums_in_float32(contraction: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum(contraction, a, b) whose sums, and result, are float32.

    A CPU gets float32 inputs, which hold the same numbers: XLA has no product of bfloat16 matrices into float32 for it,
    and where it doesn't rewrite one (several examples' new positions against a KV cache) the program fails as it runs.
    """
    if platform() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(contraction, a, b, preferred_element_type=jnp.float32)


def product_with_keys(x_BLD: jax.Array, keys_ND: jax.Array) -> jax.Array:
    """x Kᵀ, [..., N].

    For a single position a CPU gives the product of a small matrix with a vector one core, and several of them several;
    so there the tokens are worked through in groups.
    """
    keys_GMD = _in_groups(x_BLD, keys_ND)
    if keys_GMD is None:
        return jnp.einsum("...d,nd->...n", x_BLD, keys_ND)
    x_GD = jnp.broadcast_to(x_BLD.reshape(1, -1), (len(keys_GMD), x_BLD.size))
    return jnp.einsum("gmd,gd->gm", keys_GMD, x_GD).reshape(*x_BLD.shape[:-1], -1)


def product_with_values(weights_BLN: jax.Array, values_NE: jax.Array) -> jax.Array:
    """W V, [..., E]; in groups as `product_with_keys`."""
    values_GME = _in_groups(weights_BLN, values_NE)
    if values_GME is None:
        return jnp.einsum("...n,ne->...e", weights_BLN, values_NE)
    y_GE = jnp.einsum("gm,gme->ge", weights_BLN.reshape(values_GME.shape[:2]), values_GME)
    return jnp.sum(y_GE, axis=0).reshape(*weights_BLN.shape[:-1], -1)


def _in_groups(x_BLD: jax.Array, tokens_ND: jax.Array) -> jax.Array | None:
    """Tokens [G, N/G, D] where x is a single position on a CPU, else None."""
    if platform() != "cpu" or x_BLD.size != x_BLD.shape[-1]:
        return None
    return tokens_ND.reshape(math.gcd(len(tokens_ND), GROUPS), -1, tokens_ND.shape[-1])


def sum_outer(a_BLD: jax.Array, b_BLN: jax.Array) -> jax.Array:
    """The sum over positions of outer products, float32 [D, N].

    In this order since fsdp scatters D, which a GPU wants in front. A CPU transposes nothing where it contracts over
    one axis of positions and has the wide axis in front. This, `positions_in_a_row` and less memory took the step of
    the 124M model to 0.87 of its time.
    """
    if platform() != "cpu":
        return sums_in_float32("...d,...n->dn", a_BLD, b_BLN)
    a_PD, b_PN = (x.reshape(-1, x.shape[-1]) for x in (a_BLD, b_BLN))
    sums_ND = sums_in_float32("pn,pd->nd", b_PN, a_PD)
    return jax.lax.optimization_barrier(sums_ND).T


def positions_in_a_row(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays [B, C, …] as [B C, …] on a CPU, which then computes the loss in place; elsewhere as they are."""
    if platform() != "cpu":
        return list(arrays)
    return [x.reshape(-1, *x.shape[2:]) for x in arrays]


def choose(condition: jax.Array, then: Callable[..., Any], otherwise: Callable[..., Any], *args: Any) -> Any:
    """then(*args) where the condition holds, else otherwise(*args), which is cheap.

    A CPU branches: selecting between all old and new arrays cost it as much as AdamW.
    """
    if platform() == "cpu":
        return jax.lax.cond(condition, then, otherwise, *args)
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), then(*args), otherwise(*args))
