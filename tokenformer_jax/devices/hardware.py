"""The chips, what is installed, and the memory of this process."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import resource
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils


class Chip(NamedTuple):
    """One chip, from its vendor's data sheet."""

    flops: float  # dense bfloat16, a second
    memory: float  # bytes
    bandwidth: float  # bytes a second, of the memory
    network: float  # bytes a second that reach it over all its links to other chips of the slice


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1.228e12, 300e9),
    "v5e": Chip(197e12, 16 * 2**30, 0.819e12, 200e9),
    "v5p": Chip(459e12, 95 * 2**30, 2.765e12, 600e9),
    "v6e": Chip(918e12, 32 * 2**30, 1.640e12, 400e9),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7.380e12, 1200e9),
    # SXM; the network is NVLink.
    "a100-40": Chip(312e12, 40 * 2**30, 1.555e12, 300e9),
    "a100-80": Chip(312e12, 80 * 2**30, 2.039e12, 300e9),
    "h100": Chip(989e12, 84929347584, 3.352e12, 450e9),
    "h200": Chip(989e12, 141e9, 4.800e12, 450e9),
}
KINDS = {  # what JAX calls a device that is one such chip
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def peak_flops(devices: int) -> float | None:
    """Peak FLOP/s of so many devices together; None where it is not known (CPUs)."""
    name = KINDS.get(jax.devices()[0].device_kind)
    return CHIPS[name].flops * devices if name else None


def environment() -> dict[str, Any]:
    """Versions and devices, for whoever has to reproduce the run."""
    names = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "tensorflow-datasets",
        "tokenizers",
        "numpy",
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def give_back_memory() -> None:
    """Returns what is free in this process to the system: cycles hold some of it, and glibc keeps small pieces."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def peak_host_bytes() -> int:
    """The most memory that a process of the run held so far, in this machine's count of resident pages."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(np.max(multihost_utils.process_allgather(np.float32(peak))))
