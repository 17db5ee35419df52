"""The order of the modules: each imports only from those above it."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1] / "tokenformer_jax"
ORDER = """
    processes fingerprint config lock sharding recipes ladder tokenizer metrics corpus data pattention attention
    transformer loss step checkpoint evaluate generate successor shrink grow convert model report train hlo plan
""".split()


def imports(module: str) -> set[str]:
    """The project's modules that a module imports, however it says so."""
    names = []
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("tokenformer_jax.")}


def test_every_module_stands_in_the_order():
    assert sorted(ORDER) == sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")


def test_modules_import_only_from_above():
    for position, module in enumerate(ORDER):
        assert imports(module) <= set(ORDER[:position]), module


def test_checkpoints_and_data_know_no_model():
    for module in ("checkpoint", "corpus", "data", "tokenizer", "metrics"):
        assert not imports(module) & {"transformer", "pattention", "step"}, module


def test_nothing_unpickles_or_evaluates():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        for word in ("pickle", "eval(", "exec(", "allow_pickle=True", "yaml"):
            assert word not in text, f"{path.name}: {word}"
