"""Compares runs: a table of their evaluations, and a plot of validation loss against training FLOPs.

python -m tokenformer_jax.report --runs=small=W,grown=W2 --out=DIR
"""

import pathlib

from absl import flags

from tokenformer_jax.cli import run_command
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.report import plot, summarise, table
from tokenformer_jax.files import json_text, replace_file


def main() -> None:
    named = flags.DEFINE_list("runs", [], "name=workdir of each run, in order")
    folder = flags.DEFINE_string("out", ".", "directory for loss.png and report.json")

    def report() -> None:
        runs: dict[str, pathlib.Path] = {}
        for item in named.value:
            name, _, path = item.rpartition("=")
            workdir = pathlib.Path(path).expanduser()
            name = name or workdir.name
            if name in runs:
                raise UserError(f"--runs: two runs are named {name!r}; --runs=one={runs[name]},two={workdir} would do")
            runs[name] = workdir
        if not runs:
            raise UserError("--runs is missing; --runs=small=W,grown=W2 would do")
        rows = [row for name, workdir in runs.items() for row in summarise(name, workdir)]
        out = pathlib.Path(folder.value).expanduser()
        print(table(rows), flush=True)
        replace_file(out / "report.json", json_text(rows, indent=2) + "\n")
        plot(runs, out / "loss.png")
        print(f"plot: {out / 'loss.png'}")

    run_command(report)


if __name__ == "__main__":
    main()
