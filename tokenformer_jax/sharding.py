"""Where arrays live: the mesh, one table from logical axes to mesh axes, and what follows from it."""

from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokenformer_jax.config import MeshConfig, UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Parameter tokens are the long axis and the one that grows (design: they are what is sharded);
# embed_dim is split over fsdp for storage only and gathered just before use.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "embed": "fsdp",
    "columns": ("fsdp", "tensor"),  # embed_dim while tokens are appended: a device has all tokens of its columns
    "rows": ("fsdp", "tensor"),  # tokens, where columns are multiplied with each other
}

Axes = tuple[str | None, ...]


def make_mesh(cfg: MeshConfig) -> Mesh:
    """A (data, fsdp, tensor) mesh over the first devices. Raises UserError where there are too few."""
    shape = (cfg.data, cfg.fsdp, cfg.tensor)
    size, devices = int(np.prod(shape)), jax.devices()
    if size > len(devices):
        raise UserError(f"mesh = {shape} (data, fsdp, tensor): needs {size} devices, but there are {len(devices)}")
    if size < len(devices) and jax.process_count() > 1:
        raise UserError(f"mesh = {shape} (data, fsdp, tensor): uses {size} of {len(devices)} devices; it must use all")
    if jax.process_count() > 1 and jax.local_device_count() % cfg.tensor:
        raise UserError(
            f"mesh.tensor = {cfg.tensor}: must divide the {jax.local_device_count()} devices of a process, "
            "since each process reads whole rows of the batch"
        )
    grid = mesh_utils.create_device_mesh(shape, devices=devices[:size], allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def this_process() -> dict[str, int]:
    """Which part of the data this process reads: the keywords of `data.train_batches` and `data.eval_batches`."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def partition_spec(axes: Axes) -> P:
    """Logical axis names of an array's dimensions -> their mesh axes."""
    return P(*(RULES.get(axis) if axis else None for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for x to be sharded by its logical axes; the identity outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def platform() -> str:
    """What the computation is for, "cpu", "tpu" or "gpu": the mesh's devices, which need not be present."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


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
