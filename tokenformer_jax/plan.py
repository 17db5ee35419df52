"""A config on a pod: its real training step, compiled ahead of time for a pod that need not be there.

python -m tokenformer_jax.plan --config=ladder:1b4_mesh --config.mesh.fsdp=16 --topology=v5e:4x4

Reports, for each device: what memory holds and whether it fits; the FLOPs of the model by formula, those of the
compiled program's contractions and its traffic, loop bodies × trip count; what it exchanges with other devices; and the
least time for each. Leaves plan.json and plan.png. Needs libtpu, about 2 GB and some minutes, and no TPU. For GPUs
(--topology=h100:8) it needs what requirements-gpu.txt installs, and no GPU.
"""

import sys

import jax
from absl import flags

from tokenformer_jax.cli import config_flag, run_command
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, local_path, replace_file
from tokenformer_jax.planning.plan import alternatives, describe, draw, make_plan


def main() -> None:
    config = config_flag()
    topology = flags.DEFINE_string("topology", "", "what to plan for: v5e:4x4, v5p:4x4x4, h100:2x8 (hosts x GPUs), …")
    slices = flags.DEFINE_integer("slices", 1, "so many of it, connected by the slower network (mesh.slice)")
    suggest = flags.DEFINE_bool("suggest", True, "where it does not fit, look for what would")
    folder = flags.DEFINE_string("out", ".", "directory for plan.json and plan.png")

    def plan() -> None:
        jax.config.update("jax_platforms", "cpu")
        cfg, out = config(), local_path(folder.value, "--out")
        if not topology.value:
            raise UserError("--topology is missing; use --topology=v5e:4x4")
        print("compiling; it takes some minutes", file=sys.stderr, flush=True)
        found = make_plan(cfg, topology.value, slices.value)
        if not found["fits"] and suggest.value:
            for asked, other in alternatives(cfg):
                print(f"does not fit; trying {asked}", file=sys.stderr, flush=True)
                if make_plan(other, topology.value, slices.value)["fits"]:
                    found["would_fit"] = asked
                    break
        print(describe(found))
        if not found["fits"] and suggest.value:
            fits = (
                f"{found['would_fit']} would fit"
                if "would_fit" in found
                else "nothing tried fits: take a larger topology"
            )
            print(fits)
        replace_file(out / "plan.json", json_text(found, indent=1) + "\n")
        draw(found, out / "plan.png")

    run_command(plan)


if __name__ == "__main__":
    main()
