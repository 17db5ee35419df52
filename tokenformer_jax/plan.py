"""A config on a pod: its real training step, compiled ahead of time for a pod that need not be there.

python -m tokenformer_jax.plan --config=ladder:1b4_mesh --config.mesh.fsdp=16 --topology=v5e:4x4

Reports hours, chip-hours and (with --price) cost of all steps, of every rung, at an assumed MFU. For each device: what
memory holds and whether it fits; the FLOPs of the model by formula, those of the compiled program's contractions and
its traffic, loop bodies × trip count; what it exchanges with other devices; and the least time for each. Where a step
does not fit, or its batch does not divide, it looks for mesh, remat and accumulation that do. Leaves plan.json and
plan.png. Needs libtpu, about 2 GB and some minutes, and no TPU. For GPUs (--topology=h100:8) it needs what
requirements-gpu.txt installs, and no GPU.
"""

import sys

import jax
from absl import flags

from tokenformer_jax.cli import config_flag, run_command
from tokenformer_jax.config import IndivisibleBatch
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, local_path, replace_file
from tokenformer_jax.planning.plan import draw
from tokenformer_jax.planning.whole_run import advise_division, beginning, describe_run, plan_run


def main() -> None:
    config = config_flag()
    topology = flags.DEFINE_string("topology", "", "what to plan for: v5e:4x4, v5p:4x4x4, h100:2x8 (hosts x GPUs), …")
    slices = flags.DEFINE_integer("slices", 1, "so many of it, connected by the slower network (mesh.slice)")
    mfu = flags.DEFINE_float("mfu", 0.4, "ASSUMED share of the peak FLOPs, for hours and cost (docs/accelerator.md)")
    price = flags.DEFINE_float("price", 0.0, "of a chip-hour, in any currency")
    source = flags.DEFINE_string("source", None, "the directory of the run that this one would grow from")
    from_step = flags.DEFINE_integer("from_step", 0, "the step of the source where it cannot be read here")
    suggest = flags.DEFINE_bool("suggest", True, "where it does not fit, look for what would")
    folder = flags.DEFINE_string("out", ".", "directory for plan.json and plan.png")

    def plan() -> None:
        jax.config.update("jax_platforms", "cpu")
        say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        out = local_path(folder.value, "--out")
        try:
            cfg, where = config(), topology.value
            if not where:
                raise UserError("--topology is missing; use --topology=v5e:4x4")
            since = beginning(source.value, from_step.value, cfg)
            found = plan_run(cfg, where, slices.value, mfu.value, price.value, since, suggest.value, say)
        except IndivisibleBatch as error:
            if not (topology.value and suggest.value):
                raise
            raise UserError(f"{error}{advise_division(error, topology.value, slices.value, say)}") from None
        print(describe_run(found))
        replace_file(out / "plan.json", json_text(found, indent=1) + "\n")
        draw(found, out / "plan.png")

    run_command(plan)


if __name__ == "__main__":
    main()
