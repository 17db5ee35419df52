"""Config files that cannot be read, and machines that are not as they are said to be: one line, nothing written."""

import os
import signal
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


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("JAX_ENABLE_X64", "banana", "JAX does not take it"),
        ("JAX_ENABLE_X64", "1", "use 0, or unset"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "banana", "JAX does not take it"),
        ("JAX_NUM_CPU_DEVICES", "banana", "JAX does not take it"),
        ("JAX_NUM_CPU_DEVICES", "0", "use 1"),
        ("JAX_NUM_CPU_DEVICES", "-3", "use 1"),
        ("JAX_DEFAULT_DEVICE", "banana", "JAX does not take it"),
        ("JAX_NUMPY_RANK_PROMOTION", "raise", "use allow or warn"),
        ("JAX_DISABLE_JIT", "1", "use 0, or unset"),
        ("JAX_COMPILATION_CACHE_DIR", "/dev/null/cache", "cannot be written (Not a directory); use a folder"),
        ("JAX_PLATFORM_NAME", "banana", "JAX can use no such device"),
        ("XLA_FLAGS", "--xla_banana=1", "Unknown flag in XLA_FLAGS: --xla_banana=1"),
        ("XLA_FLAGS", "no_such_file", "Could not open file"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=banana", "Couldn't interpret value banana"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=0", "0 devices are too few"),
    ],
)
def test_a_variable_that_jax_or_xla_does_not_take_is_named(folder, name, value, says):
    line = [sys.executable, "-m", "tokenformer_jax.train", "--config=quickstart:small", f"--workdir={folder}/w"]
    environment = os.environ | {"XLA_FLAGS": "", name: value}
    error = complaint(subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True))
    assert f"{name}={value}" in error and says in error and "unset" in error
    assert not (folder / "w").exists()


@pytest.mark.parametrize("command", ["plan", "prepare", "report", "convert"])
def test_every_command_names_such_a_variable(command):
    line = [sys.executable, "-m", f"tokenformer_jax.{command}"]
    environment = os.environ | {"JAX_ENABLE_X64": "banana"}
    assert "JAX_ENABLE_X64=banana" in complaint(
        subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    )


def test_the_console_script_names_such_a_variable(tmp_path):
    script = tmp_path / "tokenformer"
    script.write_text("from tokenformer_jax.cli import main\nmain()\n")
    environment = os.environ | {"JAX_ENABLE_X64": "banana", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, script, "train"], env=environment, capture_output=True, text=True)
    assert "JAX_ENABLE_X64=banana" in complaint(ended)


def test_a_check_uses_no_device_and_leaves_nothing(folder):
    environment = os.environ | {"JAX_PLATFORMS": "banana", "JAX_COORDINATOR_ADDRESS": "nowhere:1"}
    line = [sys.executable, "-m", "tokenformer_jax.train", "--config=quickstart:small", f"--workdir={folder}/w"]
    for extra, code in ([], 0), (["--config.mesh.fsdp=2"], 2):
        checked = [*line, *extra, "--distributed", "--check_for=1x1"]
        assert subprocess.run(checked, cwd=ROOT, env=environment, capture_output=True).returncode == code
    assert not (folder / "w").exists()


def test_a_command_in_the_background_of_a_script_ends_on_sigint(tmp_path):
    script = """
import time
from tokenformer_jax.cli import run_command
def main():
    print("ready", flush=True)
    time.sleep(60)
run_command(main)
"""
    shell = f"trap : INT; ({sys.executable} -c '{script}' && touch {tmp_path}/next) & wait $!; wait $!"
    line = ["bash", "-c", shell]
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors == "interrupted\n" and not (tmp_path / "next").exists()


def test_an_error_that_has_nothing_to_do_with_devices_stays_what_it_is():
    script = """
from tokenformer_jax.cli import run_command
def main():
    raise RuntimeError("of another kind")
run_command(main)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "RuntimeError: of another kind" in result.stderr and "use " not in result.stderr


def test_a_python_without_jax_is_named():
    command = [sys.executable, "-S", "-m", "tokenformer_jax.train", "--help"]  # -S: without what is installed
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert told.returncode == 2
    assert told.stderr.startswith("error: ") and told.stderr.count("\n") == 1
    assert "has no module jax; use source .venv/bin/activate" in told.stderr
