"""Where arrays live: the mesh, one table from logical axes to mesh axes, and what follows from it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokenformer_jax.config import MeshConfig
from tokenformer_jax.errors import UserError

MESH_AXES = ("slice", "data", "fsdp", "tensor")  # from the slowest network to the fastest

# Parameter tokens are the long axis and the one that grows (design: they are what is sharded);
# embed_dim is split over fsdp for storage only and gathered just before use.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "tokens": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "embed": "fsdp",
    "columns": ("fsdp", "tensor"),  # embed_dim while tokens are appended: a device has all tokens of its columns
    "rows": ("fsdp", "tensor"),  # tokens, where columns are multiplied with each other
}

Axes = tuple[str | None, ...]


def parse_mesh(text: str, name: str) -> tuple[int, ...]:
    """The sizes of MESH_AXES that a flag or key gives, where slice may be left out. Raises UserError."""
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise UserError(f"{name}={text}: must be sizes slice,data,fsdp,tensor, such as 1,1,1,1")
    return (1,) * (4 - len(sizes)) + tuple(sizes)


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A (slice, data, fsdp, tensor) mesh over the first of the devices, by default of all there are.

    Raises:
      UserError: there are too few, they form other slices, or processes would share only a part of their rows.
    """
    devices = jax.devices() if devices is None else devices
    mesh = Mesh(arrange(cfg, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    parts = set(_rows_of_processes(mesh).values())
    _require_whole_rows(cfg, all(len(part) * len(parts) == cfg.batch_shards for part in parts))
    return mesh


def check_mesh(cfg: MeshConfig, processes: int, each: int) -> None:
    """Raises the UserErrors of `make_mesh` for so many processes with so many devices each, which need not be there."""
    _check_size(cfg, processes * each, must_use_all=processes > 1)
    _require_whole_rows(cfg, processes == 1 or each % cfg.tensor == 0 or cfg.tensor % each == 0)


def _require_whole_rows(cfg: MeshConfig, ok: bool) -> None:
    if not ok:
        raise UserError(
            f"mesh.tensor = {cfg.tensor}: must divide the devices of a process, or be a multiple of their number, "
            "since processes read either the same rows of the batch or different ones"
        )


def _check_size(cfg: MeshConfig, devices: int, must_use_all: bool) -> None:
    sizes = tuple(getattr(cfg, axis) for axis in MESH_AXES)
    size, shown = math.prod(sizes), f"mesh = {sizes} ({', '.join(MESH_AXES)})"
    if size > devices:
        raise UserError(f"{shown}: needs {size} devices, but there are {devices}")
    if size < devices and must_use_all:
        raise UserError(f"{shown}: uses {size} of {devices} devices; it must use all")


def arrange(cfg: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array [slice, data, fsdp, tensor]; of several slices only the first axis crosses between them.

    On GPUs, where every host counts as a slice, `cfg.slice` may differ: all are then taken as one network.
    """
    shape = tuple(getattr(cfg, axis) for axis in MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    _check_size(cfg, len(devices), must_use_all=slices > 1 or jax.process_count() > 1)
    if slices > 1 and cfg.slice != slices and devices[0].platform == "tpu":
        raise UserError(f"mesh.slice = {cfg.slice}: these devices form {slices} slices; use {slices}")
    if slices > 1 and cfg.slice == slices:
        inner, outer = (1, *shape[1:]), (slices, 1, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices[: math.prod(shape)], allow_split_physical_axes=True)


def _rows_of_processes(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Process -> which of the batch's shards its devices hold."""
    rows: dict[int, set[int]] = {}
    for shard, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(shard)
    return {process: tuple(sorted(shards)) for process, shards in rows.items()}


def this_process(mesh: Mesh) -> dict[str, int]:
    """Which part of the data this process reads: the keywords of `data.train_batches` and `data.eval_batches`.

    Processes whose devices share tokens hold the same rows, and read the same part.
    """
    rows = _rows_of_processes(mesh)
    parts = sorted(set(rows.values()))
    return {"process_index": parts.index(rows[jax.process_index()]), "process_count": len(parts)}


def partition_spec(axes: Axes) -> P:
    """Logical axis names of an array's dimensions -> their mesh axes."""
    return P(*(RULES.get(axis) if axis else None for axis in axes))


def batch_axes() -> tuple[str, ...]:
    """The axes of more than one device that the rows of a batch are spread over."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in RULES["batch"] if sizes.get(axis, 1) > 1)


def sum_over_batch(function: Callable, rows: Any, shared: Any) -> tuple[Any, Any]:
    """Calls a function on each device's rows of a batch, and adds up what it sums over them, once.

    Left to the compiler, sums inside a loop would be exchanged in its every turn.

    Args:
      function: `function(*rows, *shared)` gives arrays of the same rows, and sums over them.
      rows: arrays whose first axis is the batch.
      shared: arrays that are the same for all rows.

    Returns:
      The rows, and the sums over the whole batch.
    """
    axes = batch_axes()
    if not axes:
        return function(*rows, *shared)

    def local(rows: Any, shared: Any) -> tuple[Any, Any]:
        out, sums = function(*rows, *shared)
        return out, jax.tree.map(lambda x: x[None], sums)

    out, sums = jax.shard_map(local, in_specs=(P(axes), P()), out_specs=P(axes), axis_names=set(axes), check_vma=False)(
        rows, shared
    )
    return out, jax.tree.map(lambda parts: jnp.sum(parts, 0), sums)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for x to be sharded by its logical axes; the identity outside of a mesh, and on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def platform() -> str:
    """What the computation is for, "cpu", "tpu" or "gpu": the mesh's devices, which need not be present."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name == "cuda" else name


def shardings(abstract: Any, mesh: Mesh, axes: Any) -> Any:
    """NamedShardings for a tree of arrays, from a tree of the same structure with their logical axes."""
    return jax.tree.map(lambda _, a: NamedSharding(mesh, partition_spec(a)), abstract, axes)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(("batch",)))


def with_shardings(abstract: Any, sharding: Any) -> Any:
    """ShapeDtypeStructs that carry shardings: what a restore or an ahead-of-time compile asks for."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, sharding)
