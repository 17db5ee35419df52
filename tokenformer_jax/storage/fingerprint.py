"""Fingerprints of arrays and of JSON: they differ where a byte was flipped.

An array's is a sum, modulo 2^32 and in two lanes, of a mix of each element's bits with its place:

    u = (bits ^ place · A) ;  u = (u ^ u >> 15) · B ;  first = u ^ u >> 16 ;  v = first · C ;  second = v ^ v >> 15

Each line can be undone, so that a change of one element always changes both sums; other changes, and elements that
changed places, go unseen once in 2^64. Sums of integers come out the same in any order: on any mesh, by any number of
processes. It is meant for accidents, not against those who want to deceive.
"""

import functools
import hashlib
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

_A, _B, _C = (np.uint32(odd) for odd in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35))
_BLOCK = 1 << 20  # elements that are summed side by side


def fingerprints(
    arrays: Mapping[str, jax.Array], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, jax.Array]:
    """Fingerprints of arrays of numbers, truth values or PRNG keys, computed where they lie; returns at once.

    Each device sums its shards, and devices do not wait for each other but those of several processes, and these once
    for all arrays: computations in flight that each wait for all devices can block each other on a CPU.

    Args:
      arrays: of any shapes, dtypes and shardings; they may be donated afterwards.
      shapes: of the arrays that these were padded from; what lies beyond does not count. By default their own.

    Returns:
      For each, uint32 [shards, 2], whose sum over shards is the fingerprint; `as_text` writes it.
    """
    parts = {}
    for name, x in arrays.items():
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        shape = x.shape if shapes is None else shapes[name]
        parts[name] = _fingerprint(x, shape, getattr(x, "sharding", None))
    spread = {name: p for name, p in parts.items() if not (p.is_fully_addressable or p.is_fully_replicated)}
    if spread:  # over processes, on the one mesh that these share
        parts |= _gather_on(next(iter(spread.values())).sharding.mesh)(spread)
    return parts


def as_text(parts: jax.Array) -> str:
    """16 hexadecimal digits of a fingerprint, once it is computed."""
    return "".join(f"{lane:08x}" for lane in np.asarray(parts).sum(axis=0, dtype=np.uint32).tolist())


def model_fingerprint(params: Any, tau: Mapping[str, Any]) -> str:
    """Names a model by its parameters and τ: the same on any mesh. All processes ask for it together."""
    arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
    found = {name: as_text(parts) for name, parts in fingerprints(arrays).items()}
    found |= {name: float(value).hex() for name, value in tau.items()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _gather_on(mesh: jax.sharding.Mesh) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    return jax.jit(lambda parts: parts, out_shardings=NamedSharding(mesh, P()))


class _Axis(NamedTuple):
    size: int  # of the array that was saved
    begin: Any  # where the piece at hand begins on it
    is_padded: bool  # whether the piece may go beyond


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fingerprint(x: jax.Array, shape: tuple[int, ...], sharding: Any) -> jax.Array:
    def of_piece(piece: jax.Array, begin: Sequence[Any]) -> jax.Array:
        padded = (size < whole for size, whole in zip(shape, x.shape, strict=True))
        return _sum(piece, list(map(_Axis, shape, begin, padded)))

    if not isinstance(sharding, NamedSharding):
        return of_piece(x, (0,) * x.ndim)[None]
    spec = [axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in sharding.spec]
    spec += [()] * (x.ndim - len(spec))
    used = [axis for axes in spec for axis in axes]  # along the others there are copies

    def of_shard(shard: jax.Array) -> jax.Array:
        begin = [jax.lax.axis_index(axes) * n if axes else 0 for axes, n in zip(spec, shard.shape, strict=True)]
        return of_piece(shard, begin)[None]

    return jax.shard_map(
        of_shard, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=P(tuple(used)), check_vma=False
    )(x)


def _sum(x: jax.Array, axes: list[_Axis]) -> jax.Array:
    """What a piece of an array adds to its fingerprint.

    Block by block over the last two axes, added up side by side: what XLA makes of that is fast on a CPU, too.
    """
    if x.dtype.itemsize == 8:
        x, axes = jax.lax.bitcast_convert_type(x, jnp.uint32), [*axes, _Axis(2, 0, False)]
    elif x.dtype.itemsize < 4:  # XLA may change a NaN's bits when it moves such floats; of larger ones this would copy
        x = _bits(x)
    while x.ndim < 2:
        x, axes = x[None], [_Axis(1, 0, False), *axes]
    if x.size == 0:
        return jnp.zeros(2, jnp.uint32)
    *lead, rows, columns = x.shape
    height = max(h for h in range(1, rows + 1) if rows % h == 0 and (h == 1 or h * columns <= _BLOCK))
    blocks = (*lead, rows // height)
    strides = [np.uint32(math.prod(axis.size for axis in axes[i + 1 :]) % 2**32) for i in range(x.ndim)]

    def add(number: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        *outer, block_number = jnp.unravel_index(number, blocks)
        start: list[Any] = [*outer, block_number * height, 0]
        block = jax.lax.dynamic_slice(x, start, (*(1 for _ in lead), height, columns)).reshape(height, columns)
        at = [jnp.asarray(s + axis.begin, jnp.uint32) for s, axis in zip(start, axes, strict=True)]
        at[-2:] = (at[i] + jax.lax.broadcasted_iota(jnp.uint32, block.shape, i % 2) for i in (-2, -1))
        place = functools.reduce(operator.add, map(operator.mul, at, strides))
        lanes = _mix(_bits(block).astype(jnp.uint32), place)
        for i, axis in zip(at, axes, strict=True):
            if axis.is_padded:
                lanes = jax.tree.map(lambda lane, is_in=i < axis.size: jnp.where(is_in, lane, 0), lanes)
        return jax.tree.map(jnp.add, sums, lanes)

    zeros = jnp.zeros((height, columns), jnp.uint32)
    sums = jax.lax.fori_loop(0, math.prod(blocks), add, (zeros, zeros))
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in sums])


def _mix(bits: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    u = bits ^ (place * _A)
    u = (u ^ (u >> 15)) * _B
    first = u ^ (u >> 16)
    v = first * _C
    return first, v ^ (v >> 15)


def _bits(x: jax.Array) -> jax.Array:
    """Floats as unsigned integers of their size; others as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}"))
