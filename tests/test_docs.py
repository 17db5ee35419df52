"""What the documentation names exists."""

import ast
import importlib
import pathlib
import re

import pytest

import tokenformer_jax
from tokenformer_jax.cli import key_names
from tokenformer_jax.config import Config

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "tokenformer_jax"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", ARCHITECTURE.read_text())))
PATH = re.compile(r"([\w/]+\.(?:py|sh|md)|(?:\w+/)+\w*)(?::([\w.]+))?")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.\w+)+")
MADE_BY_RUNS = {"metrics.jsonl", "tokenizer.json", "config.json", "eval.json"}


def definitions(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """What statements define, by name: functions, classes and what is in these, variables."""
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(prefix + statement.name)
        if isinstance(statement, ast.ClassDef):
            names |= definitions(statement.body, f"{prefix}{statement.name}.")
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
    return names


def is_defined(path: str, name: str | None) -> bool:
    found = [root / path for root in (PACKAGE, ROOT) if (root / path).exists()]
    return bool(found) and (not name or name in definitions(ast.parse(found[0].read_text()).body))


def is_importable(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def is_known(span: str) -> bool:
    if match := PATH.fullmatch(span):
        return is_defined(*match.groups())
    if DOTTED.fullmatch(span) and span not in MADE_BY_RUNS:
        key = span.removeprefix("config.")
        return key in key_names(Config) or is_importable(span)
    return True  # a word, a flag, an equation


def test_files_and_names_of_the_architecture_exist():
    assert [span for span in SPANS if not is_known(span)] == []


@pytest.mark.parametrize("span", ["no/such.py", "config.py:NoSuch", "config.steeps", "jax.no_such", "nowhere/"])
def test_a_name_that_does_not_exist_is_noticed(span):
    assert not is_known(span)


def test_every_room_is_in_the_table():
    rooms = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(SPANS)
    assert {path.name for path in PACKAGE.glob("*.py")} <= set(SPANS)


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    assert [t for t in targets if "://" not in t and not (path.parent / t).exists()] == []


def test_the_index_lists_every_document():
    index = (ROOT / "docs" / "README.md").read_text()
    documents = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.ipynb")]
    assert [path.name for path in documents if path.name != "README.md" and f"({path.name})" not in index] == []


def test_pre_commit_runs_the_pinned_ruff():
    (pinned,) = re.findall(r"^ruff==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.M)
    assert f"rev: v{pinned}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_the_citation_is_of_this_version():
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited == tokenformer_jax.__version__
    assert f"## {cited} - " in (ROOT / "CHANGELOG.md").read_text().replace("[", "").replace("]", "")
