"""The TPU compiler's own estimate of a step's computation, in the way in which the authors' TPU code was measured.

python -m benchmarks.optimal_seconds [--variants=1b4_mesh,124m] [--topology=v5e:4x4] [--out=docs/optimal_seconds.json]

Compiles the step of one and of two unrolled layers, with the compiler's default flags and with windowed einsums off,
and extrapolates `optimal_seconds` over all layers. An operation of unknown cost adds about -1 to it, so its fraction is
taken: each estimate must be below a second. Exchanges between devices are not in it. `plan` counts operations instead.
"""

import argparse
import functools
import json
import pathlib
from typing import Any

import jax

from configs import ladder
from tokenformer_jax.config import read_config
from tokenformer_jax.files import replace_file
from tokenformer_jax.planning.plan import devices_of, lower_step
from tokenformer_jax.training.metrics import train_flops_per_token

FLAGS: dict[str, dict[str, str]] = {
    "default": {},
    "windowed einsum off": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
}
ROWS = 32  # of a device


def lower(variant: str, topology: str, num_layers: int = 0) -> tuple[jax.stages.Lowered, Any, float]:
    """The step, the config, and the chip's FLOP/s; of fewer layers than the config's with `num_layers`."""
    devices, chip = devices_of(topology)
    tree = ladder.get_config(variant)
    tree.mesh.fsdp, tree.accumulation, tree.batch_size = len(devices), 1, ROWS * len(devices)
    tree.model.num_layers = num_layers or tree.model.num_layers
    cfg = read_config(tree.to_dict())
    return lower_step(cfg, devices)[0], cfg, chip.flops


def measure(variant: str, topology: str) -> dict[str, Any]:
    whole, cfg, peak = lower(variant, topology)
    sizes = whole.compile().memory_analysis()
    assert sizes is not None
    flops = train_flops_per_token(cfg.model) * ROWS * cfg.model.context_length
    rolled, jax.lax.scan = jax.lax.scan, functools.partial(jax.lax.scan, unroll=True)
    try:
        steps = [lower(variant, topology, num_layers)[0] for num_layers in (1, 2)]
    finally:
        jax.lax.scan = rolled
    found: dict[str, Any] = {"temporary_bytes": sizes.temp_size_in_bytes, "model_flops": flops}
    for name, options in FLAGS.items():
        costs = [step.compile(dict(options)).cost_analysis() for step in steps]
        one, two = (cost["optimal_seconds"] % 1 for cost in costs if cost)
        seconds = one + (cfg.model.num_layers - 1) * (two - one)
        found[name] = {"seconds": seconds, "mfu": flops / seconds / peak}
        print(f"{variant} {topology}, {name}: {seconds:.3f} s, MFU {flops / seconds / peak:.1%}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="1b4_mesh,124m")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--out", default="docs/optimal_seconds.json")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    found = {variant: measure(variant, args.topology) for variant in args.variants.split(",")}
    replace_file(pathlib.Path(args.out), json.dumps({"topology": args.topology, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
