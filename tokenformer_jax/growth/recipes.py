"""Growth recipes: what appended parameter tokens hold at first, and what τ is then.

Each recipe is a function of one projection's tokens. Arrays come sharded over their columns, so that each device has
all tokens of its own; none makes a device gather what is sharded.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokenformer_jax.config import FREE_MODEL_KEYS, SIZES, ModelConfig
from tokenformer_jax.devices.sharding import constrain
from tokenformer_jax.errors import UserError
from tokenformer_jax.training import nested


class Growth(NamedTuple):
    """One projection that grows from n to N parameter tokens, in Y layers."""

    keys_YND: jax.Array  # the trained keys, then N - n rows of zeros
    values_YNE: jax.Array  # the trained values, then zeros
    drawn_keys_YND: jax.Array  # N keys and N values from the initializer
    drawn_values_YNE: jax.Array
    is_new_N1: jax.Array  # True from row n on
    tokens: int  # n
    tau: jax.Array  # τ now
    target: jax.Array  # τ that a model of N tokens is born with
    key: jax.Array  # PRNG key


class Grown(NamedTuple):
    keys_YND: jax.Array
    values_YNE: jax.Array
    tau: jax.Array  # from which it then goes to the target


class Recipe(NamedTuple):
    apply: Callable[[Growth], Grown]
    lossless: bool = True  # the model computes what it computed before
    learns: bool = True  # the new tokens have a gradient
    resets_optimizer: bool = False
    ramps: bool = False  # τ is held, then goes to the target over grow.tau_ramp of the phase; others set it at once
    normalizers: tuple[str, ...] = ("l2_norm_gelu", "gelu_l2_norm")  # with which it keeps its promise
    needs: Callable[[int, int, int], str] = lambda before, after, dim: ""  # what counts it takes, if not those


def zero_keys(g: Growth) -> Grown:
    """Zero keys, values from the initializer, τ held.

    Zero scores change neither the norm nor, as gelu(0) = 0, the output. The keys have a gradient, and once they move so
    have the values.
    """
    return Grown(g.keys_YND, jnp.where(g.is_new_N1, g.drawn_values_YNE, g.values_YNE), g.tau)


def zero_padding(g: Growth) -> Grown:
    """Zero keys and zero values: neither ever gets a gradient. The released TPU code's; here to show it."""
    return Grown(g.keys_YND, g.values_YNE, g.tau)


def isometric(g: Growth) -> Grown:
    """Keys c·U·C with CᵀC = KᵀK and UᵀU = I, zero values, τ at its target at once.

    Then ‖K_new x‖ = c ‖K x‖ for every x, so the norm of all scores grows by √(1 + c²), which is target / τ: the old
    weights stay as they are, and zero values add nothing. The values have a gradient at once. Needs N - n ≥ min(n, D).
    """
    rank = min(g.tokens, g.keys_YND.shape[-1])
    keys_YND = _by_rows(g.keys_YND)
    power_YD, axes_YDD = _eigh(_gram(keys_YND))
    root_YRD = jnp.sqrt(jnp.maximum(power_YD, 0))[:, -rank:, None] * axes_YDD.swapaxes(1, 2)[:, -rank:]
    basis_YNR = _by_rows(jax.random.normal(g.key, (*keys_YND.shape[:2], rank)) * g.is_new_N1)
    for _ in range(2):  # a second pass takes out the first one's rounding
        power_YR, axes_YRR = _eigh(_gram(basis_YNR))
        basis_YNR = _by_rows(_product(basis_YNR, axes_YRR)) * jax.lax.rsqrt(power_YR)[:, None]
    stretch = jnp.sqrt(jnp.square(g.target / g.tau) - 1)
    return Grown(keys_YND + stretch * _by_rows(_product(basis_YNR, root_YRD)), g.values_YNE, g.target)


def split(g: Growth) -> Grown:
    """r = N / n copies of each key, values V / r with noise that sums to zero over the copies, τ·√r.

    Every score comes r times, so the norm grows by √r and the copies' weights add up to the former one.
    """
    copies = g.keys_YND.shape[1] // g.tokens

    def tile(x_YND: jax.Array) -> jax.Array:
        return jnp.tile(x_YND[:, : g.tokens], (1, copies, 1))

    noise_YRNE = g.drawn_values_YNE.reshape(len(g.values_YNE), copies, g.tokens, -1)
    noise_YRNE -= jnp.mean(noise_YRNE, axis=1, keepdims=True)
    values_YNE = tile(g.values_YNE) / copies + noise_YRNE.reshape(g.values_YNE.shape)
    return Grown(tile(g.keys_YND), values_YNE, g.tau * jnp.sqrt(jnp.float32(copies)))


def split_needs(before: int, after: int, dim: int) -> str:
    if after % before == 0:
        return ""
    near = after // before * before
    return f"a multiple of the source's {before}; use {near} or {near + before}"


def isometric_needs(before: int, after: int, dim: int) -> str:
    least = before + min(before, dim)
    return "" if after >= least else f"the source's {before} or at least {least}"


def random_keys(g: Growth) -> Grown:
    """Random keys as long as the trained ones, zero values, τ at its target at once: close, but not lossless."""
    trained = jnp.sum(jnp.square(g.keys_YND), axis=(1, 2), keepdims=True) / g.tokens
    drawn = jnp.mean(jnp.sum(jnp.square(g.drawn_keys_YND), axis=2, keepdims=True), axis=1, keepdims=True)
    new_YND = g.drawn_keys_YND * jnp.sqrt(trained / drawn)
    return Grown(jnp.where(g.is_new_N1, new_YND, g.keys_YND), g.values_YNE, g.target)


def released(g: Growth) -> Grown:
    """As the authors' PyTorch code: all from the initializer, τ = √N at once, no optimizer state. Not lossless."""
    keys_YND = jnp.where(g.is_new_N1, g.drawn_keys_YND, g.keys_YND)
    return Grown(keys_YND, jnp.where(g.is_new_N1, g.drawn_values_YNE, g.values_YNE), g.target)


def _by_rows(x_YND: jax.Array) -> jax.Array:
    """Shards over tokens alone: products of columns with each other then need one sum over devices."""
    return constrain(x_YND, None, "rows", None)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _eigh(x_YDD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and vectors, a layer at a time: on CPUs, batches of decompositions side by side can lock up."""
    return jax.lax.map(jnp.linalg.eigh, x_YDD)


def _gram(x_YND: jax.Array) -> jax.Array:
    """XᵀX of each layer."""
    return _product(x_YND.swapaxes(1, 2), x_YND)


RECIPES = {
    "zero_keys": Recipe(zero_keys, ramps=True),
    "isometric": Recipe(isometric, normalizers=("l2_norm_gelu",), needs=isometric_needs),
    "split": Recipe(split, needs=split_needs),
    "random_keys": Recipe(random_keys, lossless=False),
    "released": Recipe(released, lossless=False, resets_optimizer=True),
    "zero_padding": Recipe(zero_padding, learns=False, ramps=True),
}


def check_growth(old: ModelConfig, new: ModelConfig, recipe: str) -> None:
    """Raises a UserError unless `new` is `old` with more parameter tokens (or as many), which the recipe can append."""
    check_same_but_sizes(old, new, "growth")
    old_padded, new_padded = old.padding_counted(), new.padding_counted()
    for size in SIZES:
        named, count = getattr(old, size), getattr(new, size)
        before, after = getattr(old_padded, size), getattr(new_padded, size)
        if count < named or after < before:
            raise UserError(f"model.{size} = {count}: the source has {before} already; growing takes that or more")
        if count != named and after == before:
            raise UserError(f"model.{size} = {count}: the source's {named} are padded to {before}; use more")
    nested.check_growth(old, new)
    if all(getattr(old_padded, size) == getattr(new_padded, size) for size in SIZES):
        return
    if new.projection == "linear":
        raise UserError("model.projection = 'linear': a plain Transformer has no parameter tokens to grow")
    if new.normalizer == "softmax":
        raise UserError("model.normalizer = 'softmax': growth is not lossless with it; use l2_norm_gelu")
    if new.normalizer not in RECIPES[recipe].normalizers:
        raise UserError(
            f"grow.recipe = {recipe!r}: needs model.normalizer = {' or '.join(RECIPES[recipe].normalizers)}, "
            f"not {new.normalizer!r}; use zero_keys"
        )
    if new.tau_tokens and not RECIPES[recipe].ramps:
        raise UserError(f"grow.recipe = {recipe!r}: changes τ, which model.tau_tokens fixes; use zero_keys")
    for name, before in old.tokens.items():
        size = f"{name}_tokens" if name in ("ffn", "out") else "qkv_tokens"
        after = new.tokens[name]
        if after > before and (need := RECIPES[recipe].needs(before, after, new.embed_dim)):
            raise UserError(f"model.{size} = {after}: grow.recipe = {recipe!r} takes {need}")


def check_same_but_sizes(old: ModelConfig, new: ModelConfig, what: str) -> None:
    """Raises a UserError where two models differ in more than token counts and what may always change."""
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name not in (*SIZES, "pad_tokens_to", "nested", *FREE_MODEL_KEYS) and after != before:
            use = "use that" + ", or --interpolate" * (field.name == "image_size" and what == "growth")
            raise UserError(f"model.{field.name} = {after!r}: the source has {before!r}, which {what} keeps; {use}")
