"""Other meshes, rematerialization and accumulation for the same step, and which of them fit into memory."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from tokenformer_jax.config import Config, validate
from tokenformer_jax.devices.sharding import MESH_AXES
from tokenformer_jax.errors import UserError
from tokenformer_jax.planning.plan import state_bytes, step_on

MOST_TRIES = 6  # compilations; each takes up to minutes
# Tokens of a part on a device with which parts cost next to nothing: parameters are exchanged anew for each of them.
LARGE_PART = 1 << 14
STRONGER_REMAT = {"none": "projections", "dots": "projections", "projections": "full"}
ACTIVATIONS = "activations, gradients, buffers"


def meshes(cfg: Config, devices: int, slices: int, before: Config | None = None) -> Iterator[Config]:
    """The config on each mesh of all devices on which it can be, with as few parts of the batch as it has or fewer.

    The storage of parameters is shared by as many devices as can be, and the tensor axis grows from its size in `cfg`.
    `before` is the stage that a rung grows from, whose model must divide, too.
    """
    each = devices // slices
    sizes = [n for n in _divisors(each) if n >= cfg.mesh.tensor]
    for tensor in sizes + [n for n in _divisors(each) if n < cfg.mesh.tensor]:
        shards = each // tensor
        fsdp = math.gcd(shards, cfg.model.embed_dim)
        rows, over = divmod(cfg.batch_size, slices * shards)
        if over:
            continue
        mesh = dataclasses.replace(cfg.mesh, slice=slices, data=shards // fsdp, fsdp=fsdp, tensor=tensor)
        parts = max(n for n in _divisors(rows) if n <= cfg.accumulation)
        other = dataclasses.replace(cfg, mesh=mesh, accumulation=parts)
        try:
            validate(other)
            validate(dataclasses.replace(other, model=before.model if before else cfg.model))
        except UserError:
            continue
        yield other


def find_fit(
    cfg: Config,
    devices: list[Any],
    slices: int,
    make: Callable[[Config], dict[str, Any]],
    say: Callable[[str], None],
    found: dict[str, Any] | None = None,
    before: Config | None = None,
) -> Config | None:
    """Changes of mesh, remat and accumulation with which a step fits; None where none of MOST_TRIES does.

    Gentle ones come first: parts that stay large, then more remat, then small parts, then another mesh. A mesh
    whose parameters and moments alone are too large is not compiled, nor are parts that can't fit by what larger
    ones need.

    Args:
      make: compiles a config; `plan.make_plan`'s report.
      found: that of `cfg` itself, which does not fit; None where its batch does not divide.
      before: as in `meshes`.
    """
    tries = 0

    def attempt(other: Config) -> dict[str, Any]:
        nonlocal tries
        if other == cfg and found:
            return found
        tries += 1
        say(f"trying {changes(cfg, other)} ({tries} of at most {MOST_TRIES} compilations)")
        return make(other)

    given = [cfg] if found else []
    for base in [*given, *(other for other in meshes(cfg, len(devices), slices, before) if other != cfg)]:
        limit = math.inf
        held = sum(state_bytes(step_on(base, devices, before).abstract_state).values())
        if found and held > found["memory"]["limit"]:
            continue
        other = base
        while tries < MOST_TRIES:
            plan = attempt(other)
            if plan["fits"]:
                return other
            memory = plan["memory"]
            limit = memory["limit"] - (memory["total"] - memory[ACTIVATIONS])
            if limit <= 0:
                break
            needed = other.accumulation * memory[ACTIVATIONS] / limit  # as activations shrink with the parts
            rows = other.batch_size // other.mesh.batch_shards
            finer = [n for n in _divisors(rows) if n > other.accumulation]
            parts = next((n for n in finer if n >= needed), 0)
            is_large = parts and rows * other.model.positions >= parts * LARGE_PART
            if other.model.remat in STRONGER_REMAT and not is_large:
                remat = STRONGER_REMAT[other.model.remat]
                other = dataclasses.replace(other, model=dataclasses.replace(other.model, remat=remat))
            elif parts:
                other = dataclasses.replace(other, accumulation=parts)
            else:
                break
    return None


def changes(cfg: Config, other: Config, rung: int = 0) -> str:
    """What turns one config into the other: flags, or keys of a rung's group."""
    mesh = {f"mesh.{axis}": getattr(other.mesh, axis) for axis in MESH_AXES}
    new = mesh | {"model.remat": other.model.remat, "accumulation": other.accumulation}
    old = {f"mesh.{axis}": getattr(cfg.mesh, axis) for axis in MESH_AXES}
    old |= {"model.remat": cfg.model.remat, "accumulation": cfg.accumulation}
    differ = {key: value for key, value in new.items() if value != old[key]}
    if not rung:
        return " ".join(f"--config.{key}={value}" for key, value in differ.items())
    groups: dict[str, Any] = {}
    for key, value in differ.items():
        group, _, name = key.rpartition(".")
        groups |= {group: groups.get(group, {}) | {name: value}} if group else {name: value}
    return f"config.rungs[{rung - 1}] with {', '.join(f'{key}={value}' for key, value in groups.items())}"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
