"""Says which parameter tokens of a run matter: how much each contributes, dead ones, what each growth took over.

python -m tokenformer_jax.inspect --workdir=W [--step=N] [--split=validation] [--mesh=1,1,1,1] [--batches=100]
python -m tokenformer_jax.inspect --workdir=W --text=books --text=c='src/**/*.c'   # other domains, beside its own
python -m tokenformer_jax.inspect --workdir=W --text=books --split=none --out=DIR   # without its own
python -m tokenformer_jax.inspect --workdir=W --adapter=F   # of convert --to_adapter; or --tokens=0.5, of model.nested
"""

import jax
from absl import flags

from tokenformer_jax.cli import mesh_flag, part_flags, print_once, run_command, workdir_flag
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, local_path, replace_file
from tokenformer_jax.storage.adapters import load_part


def main() -> None:
    workdir, mesh, parts = workdir_flag(), mesh_flag(), part_flags()
    step = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
    split = flags.DEFINE_string("split", "validation", "train or validation, of the run's own data; or none")
    text = flags.DEFINE_multi_string("text", [], "a domain: a file, folder, glob or URL, or NAME=that; may be repeated")
    batches = flags.DEFINE_integer("batches", 0, "of each domain, spread over it; 0: all of it, once")
    dead = flags.DEFINE_float("dead", 0.01, "a token is dead below this part of its layer's mean")
    folder = flags.DEFINE_string("out", None, "directory for inspect.json and inspect.png; by default the workdir")

    def inspect() -> None:
        from tokenformer_jax.evaluation import inspection  # takes half a second

        if batches.value < 0:
            raise UserError(f"--batches={batches.value}: must be 0 or above")
        if not 0 <= dead.value < 1:
            raise UserError(f"--dead={dead.value:g}: must be 0 or above, and below 1; use 0.01")
        texts = inspection.named_texts(text.value)
        run = load_part(workdir(), step.value, mesh(), **parts())
        result = inspection.inspect_run(run, split.value, texts, dead_below=dead.value, max_batches=batches.value)
        print_once(f"{inspection.heading(result)}\n\n{inspection.table(result)}")
        out = local_path(folder.value, "--out") if folder.value else workdir()
        if jax.process_index() == 0:
            replace_file(out / "inspect.json", json_text(result) + "\n")
            inspection.plot(result, out / "inspect.png")
            print(f"picture: {out / 'inspect.png'}")

    run_command(inspect, workdir, mesh)


if __name__ == "__main__":
    main()
