"""Loss, perplexity and bits per byte of a trained model on a split.

python -m tokenformer_jax.evaluate --workdir=W [--step=N] [--split=validation] [--mesh=1,1,1,1]
python -m tokenformer_jax.evaluate --workdir=W --out=eval.json   # where W cannot be written
python -m tokenformer_jax.evaluate --workdir=W --examples=96:104   # of training, by their order: each text and its loss
python -m tokenformer_jax.evaluate --workdir=W --config.data.path=PLACE   # where the data were moved
"""

import dataclasses

from absl import flags

from tokenformer_jax.cli import data_flags, examples_flag, mesh_flag, run_command, workdir_flag
from tokenformer_jax.evaluation.perplexity import evaluate_run, show_examples
from tokenformer_jax.files import local_path
from tokenformer_jax.storage.trained import load_trained


def main() -> None:
    workdir, mesh, examples, moved = workdir_flag(), mesh_flag(), examples_flag(), data_flags()
    step = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
    split = flags.DEFINE_string("split", "validation", "train or validation")
    out = flags.DEFINE_string("out", None, "the file for the figures; by default eval.json in the workdir")

    def evaluate() -> None:
        chosen = examples()
        run = load_trained(workdir(), step.value, mesh())
        run = dataclasses.replace(run, cfg=moved(run.cfg))
        if chosen:
            show_examples(run, chosen)
        else:
            evaluate_run(run, workdir(), split.value, local_path(out.value, "--out") if out.value else None)

    run_command(evaluate, workdir, mesh, examples)


if __name__ == "__main__":
    main()
