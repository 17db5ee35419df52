"""The released models' row of the paper's table 1: six zero-shot tasks, our figures, the paper's, and the difference.

    pip install -r requirements-eval.txt 'huggingface_hub>=1'
    python -m benchmarks.zero_shot --models=150m,450m,900m,1b5 [--batch_size=16] [--mesh=1,8,1,1] [--limit=100]

Each model is fetched from the Hugging Face hub to a workdir, evaluated by `configs/zero_shot.py:paper`, and compared. A
model whose workdir has its figures of the same settings is not evaluated again. Not run yet: it wants a network.

The paper evaluated in float16, with lm-evaluation-harness 0.4.0 to 0.4.1, and does not say which accuracy of a task its
table holds. Taken here, as is usual for these six: acc_norm of HellaSwag and ARC challenge, and acc of the others. The
table's column of the Pile is left out.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import flags

from tokenformer_jax.cli import run_command
from tokenformer_jax.config import suggest
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import json_text, local_path, replace_file

HUB = {
    "150m": "Haiyang-W/TokenFormer-150M",
    "450m": "Haiyang-W/TokenFormer-450M",
    "900m": "Haiyang-W/TokenFormer-900M",
    "1b5": "Haiyang-W/TokenFormer-1-5B",
}
METRICS = {  # column -> task, its metric, and by what to multiply it
    "LAMBADA ppl": ("lambada_openai", "perplexity", 1),
    "LAMBADA": ("lambada_openai", "acc", 100),
    "HellaSwag": ("hellaswag", "acc_norm", 100),
    "PIQA": ("piqa", "acc", 100),
    "ARC-e": ("arc_easy", "acc", 100),
    "ARC-c": ("arc_challenge", "acc_norm", 100),
    "WinoGrande": ("winogrande", "acc", 100),
}
PAPER = {
    "150m": (16.38, 45.0, 35.5, 64.9, 47.3, 24.9, 50.4),
    "450m": (7.69, 57.3, 47.5, 69.5, 56.2, 26.7, 54.6),
    "900m": (5.46, 64.0, 55.3, 72.4, 59.9, 30.6, 56.4),
    "1b5": (5.24, 64.7, 60.0, 74.8, 64.8, 32.0, 59.7),
}
AVERAGE = "average"  # of the six accuracies


def with_average(row: dict[str, float]) -> dict[str, float]:
    accuracies = [row[column] for column in METRICS if column != "LAMBADA ppl"]
    return row | {AVERAGE: sum(accuracies) / len(accuracies)}


def paper_row(model: str) -> dict[str, float]:
    return with_average(dict(zip(METRICS, PAPER[model], strict=True)))


def our_row(tasks: dict[str, Any]) -> dict[str, float]:
    """The table's columns, of the `tasks` of an eval.json."""
    row = {column: tasks[task]["metrics"][metric]["value"] * by for column, (task, metric, by) in METRICS.items()}
    return with_average(row)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: for each model our figures, the paper's and the difference."""
    columns = [*METRICS, AVERAGE]
    lines = [f"| model | | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 2)}"]
    for model, ours in rows.items():
        paper = paper_row(model)
        difference = {column: ours[column] - paper[column] for column in columns}
        for label, row, form in (("ours", ours, ".2f"), ("paper", paper, ".2f"), ("difference", difference, "+.2f")):
            name = model if label == "ours" else ""
            lines.append(f"| {name} | {label} | {' | '.join(format(row[column], form) for column in columns)} |")
    return "\n".join(lines)


def evaluate(model: str, workdir: pathlib.Path, asked: list[str]) -> dict[str, Any]:
    """The eval.json of a released model, which is fetched first if need be."""
    if not (workdir / "config.json").exists():
        run("convert", f"--from_hub={HUB[model]}", f"--workdir={workdir}")
    result = workdir / f"zero_shot{''.join(sorted(asked)).replace('/', '-')}.json"
    if not result.exists():
        run("evaluate", f"--workdir={workdir}", "--config=zero_shot:paper", *asked, f"--out={result}")
    return json.loads(result.read_text())


def run(command: str, *args: str) -> None:
    line = [sys.executable, "-m", f"tokenformer_jax.{command}", *args]
    print("---", *line[1:], file=sys.stderr, flush=True)
    code = subprocess.run(line).returncode
    if code:
        sys.exit(code)  # the command has said why


def main() -> None:
    names = flags.DEFINE_list("models", list(HUB), "the models, separated by commas")
    folder = flags.DEFINE_string("workdirs", "runs/zero_shot", "where their workdirs are, or will be")
    out = flags.DEFINE_string("out", "docs/zero_shot.json", "the file for the figures")
    passed = [
        flags.DEFINE_string(name, None, f"of evaluate: {what}")
        for name, what in (
            ("batch_size", "sequences at once"),
            ("mesh", "devices"),
            ("limit", "questions of each task"),
        )
    ]

    def measure() -> None:
        for name in names.value:
            if name not in HUB:
                raise UserError(f"--models={name}: no such model{suggest(name, HUB)}; use {', '.join(HUB)}")
        asked = [f"--{flag.name}={flag.value}" for flag in passed if flag.value is not None]
        found = {name: evaluate(name, local_path(folder.value, "--workdirs") / name, asked) for name in names.value}
        rows = {name: our_row(result["tasks"]) for name, result in found.items()}
        print(table(rows), flush=True)
        figures = {name: {"ours": rows[name], "paper": paper_row(name), "result": found[name]} for name in found}
        replace_file(local_path(out.value, "--out"), json_text(figures, indent=2) + "\n")

    run_command(measure)


if __name__ == "__main__":
    main()
