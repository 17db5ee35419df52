"""How the arrays of a checkpoint are named, stored, and read in parts."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

CHUNK_BYTES = 64 << 20  # what is read or written at once


class Saved(NamedTuple):
    """An array as it was saved."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fingerprint: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parts_of(sizes: list[int]) -> list[range]:
    """Consecutive entries in groups of an eighth of the whole, or a single larger one."""
    parts: list[range] = []
    begin = 0
    for i in range(len(sizes)):
        if i > begin and sum(sizes[begin : i + 1]) > sum(sizes) / 8:
            parts.append(range(begin, i))
            begin = i
    return [*parts, range(begin, len(sizes))]


def bytes_in_flight(sizes: list[int]) -> int:
    """A limit of the bytes that are read or written at once and are not in their place: little beside the whole.

    Orbax wants it above every single array's.
    """
    return 1 + max(*sizes, sum(sizes) // 32)


def storage_context(state: Any) -> ocp.Context:
    """How arrays are stored: uncompressed, stacks of layers a layer at a time.

    A reader with another mesh then reads at most a layer beside its own shard. Compression made float32 a seventh
    smaller, at three times the time of a save; and without a limit, Orbax holds a second copy of the whole state.
    """
    context = ocp.Context()
    context.memory.write_concurrent_bytes = bytes_in_flight([leaf.nbytes for leaf in jax.tree.leaves(state)])
    saving = context.array.saving
    saving.use_compression = False
    saving.use_zarr3 = False  # which writes a single layer in many small pieces, that glibc then keeps
    saving.storage_options.chunk_byte_size = CHUNK_BYTES
    by_layer = type(saving.storage_options)(shard_axes=(0,))
    saving.scoped_storage_options_creator = lambda _, array: by_layer if np.ndim(array) == 3 else None
    return context


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves by their path, which is the same for a NamedTuple and for the dict that Orbax makes of it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def as_tree(by_name: dict[str, Any]) -> Any:
    """The inverse, in dicts and, where the keys are numbers, lists."""
    if "" in by_name:
        return by_name[""]
    groups: dict[str, dict[str, Any]] = {}
    for name, leaf in by_name.items():
        key, _, rest = name.partition(".")
        groups.setdefault(key, {})[rest] = leaf
    tree = {key: as_tree(group) for key, group in groups.items()}
    if not all(key.isdecimal() for key in tree):
        return tree
    return [tree.get(str(i)) for i in range(1 + max(map(int, tree)))]
