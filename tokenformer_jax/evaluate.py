"""Evaluates a trained model: on a split of its own data, on other data sets, and on tasks of lm-evaluation-harness.

python -m tokenformer_jax.evaluate --workdir=W [--step=N] [--split=validation] [--mesh=1,1,1,1]
python -m tokenformer_jax.evaluate --workdir=W --tasks=lambada_openai,hellaswag --num_fewshot=0 --limit=100
python -m tokenformer_jax.evaluate --workdir=W --config=configs/zero_shot.py:paper   # which explains every key
python -m tokenformer_jax.evaluate --workdir=W --config=zero_shot:data --config.datasets.data.path=books
python -m tokenformer_jax.evaluate --workdir=W --out=eval.json   # where W cannot be written
python -m tokenformer_jax.evaluate --workdir=W --adapter=F   # of convert --to_adapter; or --tokens=0.5, of model.nested
python -m tokenformer_jax.evaluate --workdir=W --examples=96:104   # of training, in their order: text or image, loss
python -m tokenformer_jax.evaluate --workdir=W --config.data.path=PLACE   # where the run's own data were moved
"""

import dataclasses

from absl import flags

from tokenformer_jax.cli import any_config_flag, examples_flag, part_flags, run_command, workdir_flag
from tokenformer_jax.devices.sharding import parse_mesh
from tokenformer_jax.evaluation.perplexity import show_examples
from tokenformer_jax.evaluation.settings import EvalConfig, applied, read_eval_config
from tokenformer_jax.evaluation.suite import evaluate_all
from tokenformer_jax.files import local_path
from tokenformer_jax.storage.adapters import load_part


def main() -> None:
    workdir, examples, config = workdir_flag(), examples_flag(), any_config_flag(read_eval_config)
    parts = part_flags()
    step = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
    split = flags.DEFINE_string("split", "validation", "train or validation, of the run's own data")
    out = flags.DEFINE_string("out", None, "the file for the figures; by default eval.json in the workdir")
    keys = (  # of the config, which they override
        flags.DEFINE_string("tasks", None, "names of tasks of lm-evaluation-harness, separated by commas"),
        flags.DEFINE_string("include_path", None, "a folder with files of tasks"),
        flags.DEFINE_integer("num_fewshot", None, "examples before each question; by default the task's own number"),
        flags.DEFINE_float("limit", None, "questions of each task, or below 1 a part of them"),
        flags.DEFINE_integer("batch_size", None, "sequences of the context's length at once; by default the run's own"),
        flags.DEFINE_string("mesh", None, "[slice,]data,fsdp,tensor; by default the run's own, or a single device"),
    )

    def settings() -> EvalConfig:
        given = {key.name: key.value for key in keys if key.value is not None}
        return read_eval_config(dataclasses.asdict(config()) | given)

    def evaluate() -> None:
        chosen, asked = examples(), settings()
        mesh = parse_mesh(asked.mesh, "--mesh") if asked.mesh else None
        run = load_part(workdir(), step.value, mesh, **parts())
        if chosen:
            show_examples(applied(run, asked), chosen)
        else:
            evaluate_all(run, asked, workdir(), split.value, local_path(out.value, "--out") if out.value else None)

    run_command(evaluate, workdir, settings, examples, kind=EvalConfig, default="zero_shot:none")


if __name__ == "__main__":
    main()
