"""Each question of the tasks from Python's library is true to the text, and their files are what the harness reads."""

import json

import pytest

from benchmarks.python_tasks import MOST, SHOWN, make_tasks
from tests.commands import ROOT
from tokenformer_jax.errors import UserError

TEXTS = [path.read_text() for path in sorted(ROOT.glob("tokenformer_jax/*.py"))]
NAMES = ["python_last_word", "python_next_line", "python_name"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    counts = make_tasks(TEXTS, folder)
    assert list(counts) == NAMES and all(20 <= count <= MOST for count in counts.values())
    return folder


def questions(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.json").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_the_right_choice_goes_on_as_the_text_does(folder, name):
    found = questions(folder, name)
    for question in found:
        choices = question["choices"]
        assert len(set(choices)) == 4 and len(question["context"]) <= SHOWN
        assert any(question["context"] + choices[question["answer"]] in text for text in TEXTS)
    assert {question["answer"] for question in found} == {0, 1, 2, 3}


def test_names_stood_there_before(folder):
    for question in questions(folder, "python_name"):
        assert all(choice in question["context"] for choice in question["choices"])


def test_they_are_made_the_same_again(folder, tmp_path):
    make_tasks(TEXTS, tmp_path)
    for name in NAMES:
        assert (tmp_path / f"{name}.json").read_text() == (folder / f"{name}.json").read_text()


def test_the_harness_reads_them(folder):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(NAMES)["tasks"]
    for name in NAMES:
        document = tasks[name].dataset["test"][0]
        assert document == questions(folder, name)[0]
        assert tasks[name].doc_to_text(document) == document["context"]
        assert tasks[name].doc_to_choice(document) == document["choices"]
        assert tasks[name].doc_to_target(document) == document["answer"]


def test_text_without_programs_is_refused(tmp_path):
    with pytest.raises(UserError, match="too few programs"):
        make_tasks(["no program\n" * 50], tmp_path)
