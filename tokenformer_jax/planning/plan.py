"""A config's real training step, compiled ahead of time for devices that need not be there, and what it costs there."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import matplotlib
from jax.experimental import topologies

from tokenformer_jax.config import Config
from tokenformer_jax.devices.hardware import CHIPS, Chip
from tokenformer_jax.devices.sharding import MESH_AXES, make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.planning.hlo import Program, read_program
from tokenformer_jax.training.schedule import NewTokens, grown_tokens
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import Step, make_step
from tokenformer_jax.training.tasks import task_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GB = 1e9
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# What XLA asks a GPU for when it compiles, and has to be told where there is none.
GPU_TARGETS = {
    "h100": """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84929347584
}
platform_name: "CUDA" runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}
# JAX's attention kernels: how many L x L products each makes, of which causality leaves half.
KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
KERNEL_PRODUCTS |= {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}


def devices_of(topology: str, slices: int = 1) -> tuple[list[Any], Chip]:
    """The devices of a topology such as "v5e:4x4" or "h100:2x8", which need not be present, and what each is.

    Raises:
      UserError: there is no such topology, or no compiler for it.
    """
    name, _, shape = topology.partition(":")
    if name not in (*TPUS, *GPU_TARGETS) or not re.fullmatch(
        r"\d+(x\d+)?" if name in GPU_TARGETS else r"\d+(x\d+){1,2}", shape
    ):
        raise UserError(
            f"--topology={topology}: must be one of {', '.join((*TPUS, *GPU_TARGETS))}, a colon and a shape; "
            "use v5e:4x4, or h100:2x8 for two hosts of eight GPUs"
        )
    if name in GPU_TARGETS:
        return _gpus(name, f"{slices}x{shape}" if "x" in shape else f"{slices}x1x{shape}"), CHIPS[name]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: needs the TPU compiler; use pip install libtpu")
    # libtpu asks a machine's metadata for its TPU, locks it, and complains; here is none.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4"} | dict.fromkeys(
        ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"), "4"
    )
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name == "v4":  # whose two cores JAX takes as one device
        options["chip_config_name"] = "megacore"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # libtpu tells of a wrong shape by several kinds
        raise UserError(f"--topology={topology}: {str(error).splitlines()[0]}") from None
    chip, cores = CHIPS[name], len(devices) // (slices * math.prod(int(n) for n in shape.split("x")))
    return list(devices), Chip(*(quantity / cores for quantity in chip))


def _gpus(name: str, shape: str) -> list[Any]:
    """Of slices x hosts x GPUs."""
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=name, topology=shape, target_config=GPU_TARGETS[name]
        )
    except NotImplementedError:
        raise UserError("--topology: needs the GPU compiler; use pip install -r requirements-gpu.txt") from None
    return list(found.devices)


def tokens_of_stage(cfg: Config, before: Config | None) -> NewTokens | None:
    """The tokens of a stage that grows from the one before, if they learn in a way of their own."""
    return grown_tokens(cfg, before.model, 0) if before else None


def step_on(cfg: Config, devices: list[Any], before: Config | None = None) -> Step:
    """The training step of a stage, which may grow from the one before."""
    return make_step(cfg, make_mesh(cfg.mesh, devices), new_tokens=tokens_of_stage(cfg, before))


def lower_step(cfg: Config, devices: list[Any], before: Config | None = None) -> tuple[jax.stages.Lowered, Step]:
    """The config's training step for those devices, lowered and as it is.

    Raises:
      UserError: the mesh is not one of all devices.
    """
    size = math.prod(getattr(cfg.mesh, axis) for axis in MESH_AXES)
    if size != len(devices):
        raise UserError(
            f"mesh: is of {size} devices, but the topology has {len(devices)}; "
            f"use --config.mesh.fsdp={len(devices)} and 1 for the others"
        )
    step = step_on(cfg, devices, before)
    batch = task_of(cfg).abstract_batch(cfg, step.batch)
    return step.train.lower(step.abstract_state, batch), step


def state_bytes(state: TrainState) -> dict[str, float]:
    """What a device holds of an abstract state."""
    held = {"parameters": _bytes_on_a_device(state.params), "moments": _bytes_on_a_device(state.opt_state)}
    return held | ({"mean of parameters": _bytes_on_a_device(state.average)} if state.average else {})


def _bytes_on_a_device(tree: Any) -> float:
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves))


def compile_step(lowered: jax.stages.Lowered) -> tuple[Any, str]:
    """The sizes and the text of a program.

    The text is the compiler's own: jaxlib can't print what libtpu knows of newer chips (its asynchronous copies).
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (path,) = pathlib.Path(folder).glob("*after_optimizations.txt")
        return compiled.memory_analysis(), path.read_text()


def make_plan(cfg: Config, topology: str, slices: int = 1, before: Config | None = None) -> dict[str, Any]:
    """Compiles a config's step for a topology, and reports what each device does in it.

    Args:
      cfg: of a run, or of one of its stages.
      topology: as of `devices_of`.
      slices: so many of it.
      before: the stage that it grows from.

    Returns:
      What plan.json holds: bytes, FLOPs and seconds of one device and one step. Where the program does not fit into the
      memory, there is no more than that.

    Raises:
      UserError: as `devices_of` and `lower_step`.
    """
    devices, chip = devices_of(topology, slices)
    began = time.monotonic()
    plan: dict[str, Any] = {
        "topology": topology,
        "slices": slices,
        "devices": len(devices),
        "mesh": {axis: getattr(cfg.mesh, axis) for axis in MESH_AXES},
        "batch_size": cfg.batch_size,
        "accumulation": cfg.accumulation,
        "context_length": cfg.model.positions,
        "remat": cfg.model.remat,
        "dtype": cfg.model.dtype,
        "packages": _versions("jax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
        "chip": chip._asdict(),
    }
    lowered, step = lower_step(cfg, devices, before)
    of_state = state_bytes(step.abstract_state)
    held = dict(of_state)
    try:
        sizes, text = compile_step(lowered)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        held["activations, gradients, buffers"] = float(needed[1]) * 2**30
        memory = held | {"total": sum(held.values()), "limit": float(needed[2]) * 2**30}
        return plan | {"fits": False, "memory": memory}
    held["activations, gradients, buffers"] = float(sizes.temp_size_in_bytes)
    held["batch and program"] = float(
        sizes.argument_size_in_bytes - sum(of_state.values()) + sizes.generated_code_size_in_bytes
    )
    total = sum(held.values())
    program = read_program(text, plan["mesh"])
    model_flops = task_of(cfg).tokens_per_step(cfg) / len(devices) * step.flops_per_token
    return plan | {
        "compile_seconds": round(time.monotonic() - began, 1),
        "fits": total <= chip.memory,
        "memory": held | {"total": total, "limit": chip.memory},
        "model_flops": model_flops,
        "model_parameters": count_params(step.abstract_state.params),
        **costs(program, cfg, chip, model_flops),
    }


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    return {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in packages}


def costs(program: Program, cfg: Config, chip: Chip, model_flops: float) -> dict[str, Any]:
    """What a compiled program does on a device, and the least time that it takes."""
    kernels, kernel_flops = program.kernels, 0.0
    rows = cfg.batch_size // cfg.accumulation // cfg.mesh.batch_shards
    product = (
        rows * cfg.model.positions**2 * cfg.model.embed_dim / cfg.mesh.tensor * (2 - cfg.model.is_causal)
    )  # or half
    for name, count in kernels.items():
        products = next((n for prefix, n in KERNEL_PRODUCTS.items() if name.startswith(prefix)), 0)
        kernel_flops += count * products * product
    contractions = [o for o in program.operations if o.flops]
    flops = sum(o.flops * o.count for o in contractions)
    traffic = sum(o.bytes * o.count for o in program.operations)
    received = sum(c.received * c.count for c in program.collectives)
    seconds = {
        "compute": (flops + kernel_flops) / chip.flops,
        "memory": traffic / chip.bandwidth,
        "network": received / chip.network,
        "one operation after another": kernel_flops / chip.flops
        + sum(o.count * max(o.flops / chip.flops, o.bytes / chip.bandwidth) for o in program.operations),
    }
    best = model_flops / chip.flops
    seen: dict[tuple[str, tuple[str, ...], str], dict[str, Any]] = {}
    for c in program.collectives:
        row = seen.setdefault((c.kind, c.axes, c.shape), dataclasses.asdict(c) | {"count": 0})
        row["count"] += c.count
    return {
        "contraction_flops": flops,
        "kernel_flops": kernel_flops,
        "kernels": kernels,
        "contraction_bytes": sum(o.bytes * o.count for o in contractions),
        "bytes": traffic,
        "received_bytes": received,
        "collectives": sorted(seen.values(), key=lambda row: -row["received"] * row["count"]),
        "seconds": seconds,
        "mfu_at_most": best / max(seconds["compute"], seconds["memory"], seconds["network"]),
        "mfu_one_after_another": best / (seconds["one operation after another"] + seconds["network"]),
    }


def describe(plan: dict[str, Any]) -> str:
    """The plan for people."""
    memory = plan["memory"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "1"
    lines = [
        f"{plan['topology']}, slices {plan['slices']}: {plan['devices']} devices, mesh {mesh}; "
        f"{plan['batch_size']} x {plan['context_length']} tokens a step in {plan['accumulation']} parts, "
        f"remat {plan['remat']}",
        "",
        "memory of a device, GB",
        *(f"  {name:<34}{size / GB:>9.2f}" for name, size in memory.items()),
    ]
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    if "seconds" not in plan:
        return "\n".join([*lines, f"  {verdict}"])
    seconds = plan["seconds"]
    lines += [
        f"  {verdict}",
        "",
        "a device and a step",
        f"  {'model FLOPs':<34}{plan['model_flops']:>9.3g}",
        f"  {'FLOPs of contractions':<34}{plan['contraction_flops']:>9.3g}",
        f"  {'FLOPs of attention kernels':<34}{plan['kernel_flops']:>9.3g}",
        f"  {'memory traffic, GB':<34}{plan['bytes'] / GB:>9.1f}",
        f"  {'received from other devices, GB':<34}{plan['received_bytes'] / GB:>9.2f}",
        "",
        "collectives                                    times  GB each",
        *(
            f"  {row['kind']:<16}{'+'.join(row['axes']):<12}{row['shape']:<20}"
            f"{row['count']:>4}  {row['bytes'] / GB:>9.4f}"
            for row in plan["collectives"][:12]
        ),
        "",
        "least time, s",
        *(f"  {name:<34}{value:>9.4f}" for name, value in seconds.items()),
        f"MFU at most {plan['mfu_at_most']:.0%}, were all three hidden behind the longest; "
        f"{plan['mfu_one_after_another']:.0%} with one operation after another and no exchange hidden",
    ]
    return "\n".join(lines)


def draw(plan: dict[str, Any], path: pathlib.Path) -> None:
    """Memory against what a device has, and the least times."""
    figure, axes = plt.subplots(1, 2 if "seconds" in plan else 1, figsize=(10, 3.2), squeeze=False)
    left, memory = 0.0, plan["memory"]
    parts = {name: size for name, size in memory.items() if name not in ("total", "limit")} or memory
    for name, size in parts.items():
        if name != "limit":
            axes[0, 0].barh(0, size / GB, left=left / GB, label=name)
            left += size
    axes[0, 0].axvline(memory["limit"] / GB, color="black", linestyle="--", label="the device has")
    axes[0, 0].set(yticks=[], xlabel="GB a device", title=f"{plan['topology']}, {plan['devices']} devices")
    axes[0, 0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    if "seconds" in plan:
        names = list(plan["seconds"])
        axes[0, 1].barh(names, list(plan["seconds"].values()))
        axes[0, 1].axvline(plan["model_flops"] / plan["chip"]["flops"], color="black", linestyle="--")
        axes[0, 1].set(xlabel="s a step; dashed: the model's FLOPs at the peak rate", title="least time")
        axes[0, 1].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
