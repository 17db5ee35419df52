"""Makes three zero-shot tasks that a small model can do, from text of the embedded corpus that no model trained on.

    python -m benchmarks.python_tasks --out=runs/tasks
    python -m tokenformer_jax.evaluate --workdir=W --config=zero_shot:python --config.include_path=runs/tasks

The text is the validation split of `--config`, Python's standard library by default; it differs between versions of
Python. Each task is a .yaml for lm-evaluation-harness and a .json with its questions, at most 500, of four choices:

| task | question | choices |
|---|---|---|
| python_last_word | a documentation string up to a sentence's last word | words of such strings, with a full stop |
| python_next_line | some lines of a program | the next line, and lines of the other questions |
| python_name | a program up to a name that stood in it just before | names that stood there |

The longer of two words or lines has the lower probability: the first two are judged by that of a character (acc_norm).
"""

import ast
import io
import json
import keyword
import pathlib
import random
import re
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from tokenformer_jax.cli import config_flag, run_command
from tokenformer_jax.config import Config
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import local_path, replace_file

MOST = 500  # questions of a task
OF_A_DOCUMENT = 100  # candidates, so that no long document is most of a task
SHOWN = 220  # characters before an answer, at most: they must fit into the context of a small model
Question = dict[str, Any]

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def documents(cfg: Config) -> list[str]:
    """The documents of the validation split."""
    corpus = prepare(cfg)
    found: list[list[int]] = [[]]
    for token in corpus.validation.read(0, corpus.validation.num_tokens).tolist():
        if token == corpus.validation.end_of_text:
            found.append([])
        else:
            found[-1].append(token)
    return [corpus.tokenizer.decode(ids) for ids in found if ids]


def before(text: str, end: int) -> str:
    """The text before a place, from the beginning of a line."""
    shown = text[max(0, end - SHOWN) : end]
    return shown if end <= SHOWN else shown[shown.find("\n") + 1 :]


def last_words(text: str) -> Iterator[Question]:
    """Sentences of documentation strings, and the last word of each."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for match in re.finditer(r"(?<=[a-z,] )([a-z]{3,})\.(?=\s|$)", node.value):
                context = before(node.value, match.start() - 1)
                if len(context) >= SHOWN // 2:
                    yield {"context": context, "right": f" {match[1]}."}


def next_lines(text: str) -> Iterator[Question]:
    """Lines of a program, and the one that follows."""
    end = 0
    for line in text.splitlines(keepends=True):
        context = before(text, end)
        if context.count("\n") >= 4 and len(line.strip()) >= 10 and len(line) <= 80 and line.endswith("\n"):
            yield {"context": context, "right": line.rstrip()}
        end += len(line)


def names(text: str) -> Iterator[Question]:
    """A program up to a name that stood in it before, and other names that did."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return
    seen: list[tuple[int, str]] = []  # where each name ends
    for token in tokens:
        if token.type != tokenize.NAME or keyword.iskeyword(token.string) or len(token.string) < 3:
            continue
        place = starts[token.start[0] - 1] + token.start[1]
        context = before(text, place)
        near = {name for end, name in seen if end > place - len(context)}
        if token.string in near and len(near) >= 4:
            yield {"context": context, "right": token.string, "near": sorted(near)}
        seen.append((place + len(token.string), token.string))


def questions(make: Callable[[str], Iterator[Question]], texts: list[str], rng: random.Random) -> list[Question]:
    """Questions of all documents, in random order."""
    chosen = []
    for text in texts:
        found = list(make(text))
        chosen += rng.sample(found, min(len(found), OF_A_DOCUMENT))
    rng.shuffle(chosen)
    if len({question["right"] for question in chosen}) < 4:
        raise UserError("--config: its validation split has too few programs; use one of Python programs")
    return chosen[:MOST]


def with_choices(question: Question, others: list[str], rng: random.Random) -> Question:
    """The question with three others than the right answer, frequent ones more often."""
    choices = [question["right"]]
    while len(choices) < 4:
        other = rng.choice(others)
        choices += [other] * (other not in choices)
    rng.shuffle(choices)
    return {"context": question["context"], "choices": choices, "answer": choices.index(question["right"])}


def make_tasks(texts: list[str], out: pathlib.Path) -> dict[str, int]:
    """Writes the tasks; returns how many questions each has."""
    rng = random.Random(0)
    words, lines, called = (questions(make, texts, rng) for make in (last_words, next_lines, names))
    every_word = [f" {word}." for question in words for word in re.findall(r"\b[a-z]{3,}\b", question["context"])]
    every_line = [question["right"] for question in lines]
    made = {
        "python_last_word": ("acc_norm", [with_choices(question, every_word, rng) for question in words]),
        "python_next_line": ("acc_norm", [with_choices(question, every_line, rng) for question in lines]),
        "python_name": ("acc", [with_choices(question, question["near"], rng) for question in called]),
    }
    for name, (metric, found) in made.items():
        file = (out / f"{name}.json").absolute()
        replace_file(file, "".join(json.dumps(question) + "\n" for question in found))
        replace_file(out / f"{name}.yaml", TASK.format(name=name, file=json.dumps(str(file)), metric=metric))
    return {name: len(found) for name, (_, found) in made.items()}


def main() -> None:
    config = config_flag()
    folder = flags.DEFINE_string("out", "runs/tasks", "the folder for the tasks")

    def make() -> None:
        out = local_path(folder.value, "--out")
        for name, count in make_tasks(documents(config()), out).items():
            print(f"{out / name}.yaml: {count} questions")

    run_command(make, config, default="quickstart:small")


if __name__ == "__main__":
    main()
