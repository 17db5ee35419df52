"""The paper's models on pods: the ladder's rungs and Pile 1.5B, compiled for five topologies.

python -m benchmarks.pod_plans --workdir=runs/pod_plans [--report_only]
python -m benchmarks.pod_plans --workdir=runs/gpu_plans --topologies=h100:8,h100:32x8 --name=gpu_plans

The first also compiles the largest rung for 16, 256 and 1024 chips with the same work a chip. Plans that are made are
kept: the same command goes on. Leaves NAME.json, NAME_table.md and, of the first, NAME.png in --out. It takes an hour
or two on two cores; the second some minutes.
"""

import json
import math
import pathlib
import sys
from typing import Any

import jax
import matplotlib
from absl import flags

from configs import ladder, pile
from tokenformer_jax.cli import run_command, workdir_flag
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.files import replace_file
from tokenformer_jax.planning.plan import GB, make_plan

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TOPOLOGIES = ("v5e:4x4", "v5p:4x4x4", "v4:4x4x4", "v6e:16x16", "v5e:16x16")
MODELS = ("124m", "354m_mesh", "757m_mesh", "1b4_mesh", "pile 1b5")
SCALING = ("v5p:2x2x4", "v5p:4x8x8", "v5p:8x8x16")  # of the largest rung
TOKENS = 32 * 1024  # of a step, on each device
Plan = dict[str, Any]


def config(model: str, topology: str) -> Config:
    """The model on all devices of a topology: parameters shared by up to 256 of them, TOKENS tokens for each."""
    devices = math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    tree = pile.get_config(model.split()[1]) if model.startswith("pile") else ladder.get_config(model)
    tree.mesh.fsdp = min(devices, 256)
    tree.mesh.data = devices // tree.mesh.fsdp
    tree.accumulation = 1
    tree.batch_size = devices * TOKENS // tree.model.context_length
    return read_config(tree.to_dict())


def table(plans: dict[tuple[str, str], Plan]) -> str:
    lines = [
        "| model | topology | mesh | parameters, moments | activations, buffers | total of | received "
        "| compute, memory, network | MFU at most | one after another |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, topology), plan in plans.items():
        memory, mesh = plan["memory"], plan["mesh"]
        sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1)
        if not plan["fits"]:
            lines.append(
                f"| {model} | {topology} | {sizes} | | | {memory['total'] / GB:.1f} GB: does not fit | | | | |"
            )
            continue
        seconds = plan["seconds"]
        times = ", ".join(f"{seconds[name]:.3f}" for name in ("compute", "memory", "network"))
        lines.append(
            f"| {model} | {topology} | {sizes} | {(memory['parameters'] + memory['moments']) / GB:.2f} GB "
            f"| {memory['activations, gradients, buffers'] / GB:.2f} GB "
            f"| {memory['total'] / GB:.2f} of {memory['limit'] / GB:.1f} GB | {plan['received_bytes'] / GB:.1f} GB "
            f"| {times} s | {plan['mfu_at_most']:.0%} | {plan['mfu_one_after_another']:.0%} |"
        )
    return "\n".join(lines)


def draw(plans: list[Plan], path: pathlib.Path) -> None:
    """Weak scaling: bytes of a device against the number of devices."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    devices = [plan["devices"] for plan in plans]
    for what in ("parameters", "moments", "activations, gradients, buffers", "total"):
        axes[0].plot(devices, [plan["memory"][what] / GB for plan in plans], marker="o", label=what)
    axes[1].plot(devices, [plan["received_bytes"] / GB for plan in plans], marker="o", label="from other devices")
    axes[1].plot(devices, [plan["bytes"] / GB for plan in plans], marker="o", label="memory traffic")
    axes[0].set(title="memory of a device", ylabel="GB")
    axes[1].set(title="moved by a device in a step", ylabel="GB")
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="devices", xticks=devices, xticklabels=devices)
        ax.minorticks_off()
        ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    root, out = _WORKDIR(), pathlib.Path(_OUT.value)
    name, topologies = _NAME.value, tuple(_TOPOLOGIES.value)
    wanted = [(model, topology) for topology in topologies for model in reversed(MODELS)]
    scaling = [(MODELS[3], topology) for topology in SCALING if topologies == TOPOLOGIES]
    plans: dict[tuple[str, str], Plan] = {}
    for model, topology in wanted[:5] + scaling + wanted[5:]:
        path = root / f"{model} {topology}.json".replace(" ", "-").replace(":", "-")
        if not path.exists() and not _REPORT_ONLY.value:
            print(f"compiling {model} for {topology}", file=sys.stderr, flush=True)
            replace_file(path, json.dumps(make_plan(config(model, topology), topology)))
        if path.exists():
            plans[model, topology] = json.loads(path.read_text())
    found = {key: plans[key] for key in sorted(wanted, key=lambda key: MODELS.index(key[0])) if key in plans}
    replace_file(out / f"{name}.json", json.dumps([{"model": m, **plan} for (m, _), plan in plans.items()]) + "\n")
    replace_file(out / f"{name}_table.md", table(found) + "\n")
    if scaling and all(key in plans for key in scaling):
        draw([plans[key] for key in scaling], out / f"{name}.png")


if __name__ == "__main__":
    _WORKDIR = workdir_flag(help_text="holds the plans")
    _TOPOLOGIES = flags.DEFINE_list("topologies", list(TOPOLOGIES), "for `plan`")
    _NAME = flags.DEFINE_string("name", "pod_plans", "of the files that it leaves")
    _OUT = flags.DEFINE_string("out", "docs", "their directory")
    _REPORT_ONLY = flags.DEFINE_bool("report_only", False, "report the plans that are made, and make none")
    run_command(main)
