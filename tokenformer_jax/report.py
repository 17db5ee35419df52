"""Compares runs: tables of their evaluations, and a plot of validation loss against training FLOPs.

python -m tokenformer_jax.report --runs=small=W,grown=W2 --out=DIR
python -m tokenformer_jax.report --runs=small=W --runs=grown=W2   # the same
python -m tokenformer_jax.report --runs=small=W,large=W3 --advise   # both from scratch: when to grow
"""

from absl import flags

from tokenformer_jax.cli import run_command
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.report import named_runs, plot, summarise, table, task_table
from tokenformer_jax.files import json_text, local_path, replace_file


def main() -> None:
    named = flags.DEFINE_multi_string("runs", [], "name=workdir of each run, in order; separated by commas or repeated")
    advising = flags.DEFINE_boolean("advise", False, "say when to grow, by runs of two or more sizes from scratch")
    folder = flags.DEFINE_string("out", ".", "directory for loss.png and report.json")

    def report() -> None:
        runs = named_runs(named.value)
        if not runs:
            raise UserError("--runs is missing; use --runs=small=W,grown=W2")
        rows = [row for name, workdir in runs.items() for row in summarise(name, workdir)]
        out = local_path(folder.value, "--out")
        advice, told = [], []
        if advising.value:
            from tokenformer_jax.evaluation.advice import advise, describe  # takes half a second

            advice = advise(runs)
            told = [describe(pair) for pair in advice]
        print(table(rows), flush=True)
        if tasks := task_table(runs):
            print(f"\n{tasks}", flush=True)
        replace_file(out / "report.json", json_text(rows, indent=2) + "\n")
        plot(runs, out / "loss.png")
        print(f"plot: {out / 'loss.png'}")
        if advice:
            print("\n".join(told))
            replace_file(out / "advice.json", json_text(advice, indent=2) + "\n")

    run_command(report)


if __name__ == "__main__":
    main()
