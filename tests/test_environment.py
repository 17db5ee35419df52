"""Config files that cannot be read, and machines that are not as they are said to be: one line, nothing written."""

import os
import subprocess
import sys

import pytest

from tests.commands import ROOT, call, complaint

FILES = {
    "broken.py": "def get_config(:",
    "imports.py": "import no_such_module",
    "empty.py": "",
    "raises.py": "def get_config():\n    return open('no/such/file')",
    "returns_nothing.py": "def get_config():\n    pass",
    "returns_a_dict.py": "def get_config():\n    return {'steps': 3}",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder.py").mkdir()
    return tmp_path


@pytest.mark.parametrize("after", [[], ["--config.steps=3"], ["--config.stepz=3", "--config.model.num_heads=x"]])
@pytest.mark.parametrize("command", ["train", "grow"])
@pytest.mark.parametrize(
    "file, says",
    [
        ("nope.py", "nope.py: no such file"),
        ("nope.py:small", "nope.py:small: no such file"),
        ("brokn.py", "no such file; did you mean 'broken.py'?"),
        ("no/folder/nope.py", "nope.py: no such file"),
        ("folder.py", "folder.py: is a folder"),
    ],
)
def test_a_config_that_is_not_there_is_called_that(folder, command, file, says, after):
    line = complaint(call(command, f"--config={folder}/{file}", *after, f"--workdir={folder}/w"))
    assert says in line and "use " in line and not (folder / "w").exists()


@pytest.mark.parametrize("after", [[], ["--config.steps=3"]])
@pytest.mark.parametrize("file", FILES)
def test_a_config_that_cannot_be_used_is_named(folder, file, after):
    line = complaint(call("train", f"--config={folder}/{file}", *after, f"--workdir={folder}/w"))
    assert "--config" in line and "is missing" not in line and not (folder / "w").exists()
    assert after or "returns" not in file or "return a ml_collections.ConfigDict" in line


def test_a_path_that_is_empty_names_no_file(folder):
    assert "names no file; use" in complaint(call("train", "--config=", f"--workdir={folder}/w"))


@pytest.mark.parametrize("command", ["train", "grow", "plan"])
def test_a_python_for_which_ml_collections_is_too_old_is_named(command, folder):
    script = f"""
import importlib.machinery, runpy, sys
import tokenformer_jax.cli
for owner in importlib.machinery.SourceFileLoader.__mro__:
    if "load_module" in vars(owner):
        del owner.load_module  # as Python 3.15 does
sys.argv = [{command!r}, "--config=quickstart:small", "--config.steps=3", "--workdir={folder}/w"]
runpy.run_module("tokenformer_jax.{command}", run_name="__main__", alter_sys=True)
"""
    line = complaint(subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True))
    assert "ml_collections reads no config there; use Python 3.11 to 3.14" in line


@pytest.mark.parametrize("platforms", ["cuda", "banana", "cpu,banana", "rocm"])
def test_devices_that_are_not_there_are_named(folder, platforms):
    args = "--config=quickstart:small", f"--workdir={folder}/w"
    result = subprocess.run(
        [sys.executable, "-m", "tokenformer_jax.train", *args],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    line = complaint(result)
    assert f"JAX_PLATFORMS={platforms}: JAX can use no such device" in line and "use JAX_PLATFORMS=cpu" in line
    assert not (folder / "w").exists()


def test_a_check_uses_no_device_and_leaves_nothing(folder):
    environment = os.environ | {"JAX_PLATFORMS": "banana", "JAX_COORDINATOR_ADDRESS": "nowhere:1"}
    line = [sys.executable, "-m", "tokenformer_jax.train", "--config=quickstart:small", f"--workdir={folder}/w"]
    for extra, code in ([], 0), (["--config.steps=-1"], 2), (["--config.mesh.fsdp=2"], 2):
        checked = [*line, *extra, "--distributed", "--check_for=1x1"]
        assert subprocess.run(checked, cwd=ROOT, env=environment, capture_output=True).returncode == code
    assert not (folder / "w").exists()


def test_an_error_that_has_nothing_to_do_with_devices_stays_what_it_is():
    script = """
from tokenformer_jax.cli import run_command
def main():
    raise RuntimeError("of another kind")
run_command(main)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "RuntimeError: of another kind" in result.stderr and "use " not in result.stderr
