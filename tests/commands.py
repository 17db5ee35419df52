"""Runs the project's commands in processes of their own that need not import anything first: a server forks them."""

import asyncio
import contextlib
import multiprocessing
import os
import pathlib
import resource
import runpy
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
NAMES = "train grow evaluate generate convert report inspect checkpoint plan".split()

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([f"tokenformer_jax.{name}" for name in NAMES])


def call(
    command: str, *args: Any, file_limit: int = 0, bucket_pauses: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python -m tokenformer_jax.COMMAND ARGS` does.

    With `file_limit` no file may become larger, in bytes. Without `bucket_pauses` a bucket out of reach is tried as
    often, but at once. The environment must not concern what is imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = start(folder, command, *args, file_limit=file_limit, bucket_pauses=bucket_pauses, **environment)
        process.join(300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{command} {args}")
        out, err = (pathlib.Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([command, *args], process.exitcode or 0, out, err)


def start(
    folder: str, command: str, *args: Any, file_limit: int = 0, bucket_pauses: bool = True, **environment: str
) -> Any:
    """The process, running; it writes FOLDER/stdout and FOLDER/stderr."""
    paths = [f"{folder}/stdout", f"{folder}/stderr"]
    how = file_limit, bucket_pauses, environment
    process = _FORKS.Process(target=_run, args=(command, list(map(str, args)), paths, *how))
    process.start()
    return process


def call_well(command: str, *args: Any) -> str:
    """Its output; it must succeed."""
    result = call(command, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line, with exit code 2, that a mistake must give."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


_ASK = """#!/usr/bin/env bash
call=$(mktemp -d "{0}/XXXXXX")
mkfifo "$call/code"
printf '%s\\0' "$@" >"$call/args"
echo "$call" >"{0}/calls"
code=$(<"$call/code")
cat "$call/stdout"
cat "$call/stderr" >&2
exit "$code"
"""


@contextlib.contextmanager
def forked_python(folder: pathlib.Path) -> Iterator[str]:
    """The path of an executable for which `-m tokenformer_jax.COMMAND ARGS` does what it does for Python, as `call`."""
    folder.mkdir()
    (folder / "python").write_text(_ASK.format(folder))
    (folder / "python").chmod(0o755)
    os.mkfifo(folder / "calls")
    calls = os.fdopen(os.open(folder / "calls", os.O_RDWR), "r+b", buffering=0)  # so that no end ever waits for another

    def answer() -> None:
        while (name := calls.readline().decode().strip()) != "end":
            _, module, *args = pathlib.Path(name, "args").read_text().removesuffix("\0").split("\0")
            process = start(name, module.removeprefix("tokenformer_jax."), *args)
            process.join(300)
            pathlib.Path(name, "code").write_text(str(process.exitcode))

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield str(folder / "python")
    finally:
        calls.write(b"end\n")
        thread.join()
        calls.close()


def _run(
    command: str, args: list[str], paths: list[str], file_limit: int, bucket_pauses: bool, environment: dict[str, str]
) -> None:
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    for path, number in zip(paths, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)  # the server's takes what it was started with for a file or a pipe
    os.environ.update(environment)
    if not bucket_pauses:
        import gcsfs.retry

        gcsfs.retry.asyncio = types.SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0))
    os.chdir(ROOT)
    sys.argv = [command, *args]
    sys.modules.pop(f"tokenformer_jax.{command}", None)
    runpy.run_module(f"tokenformer_jax.{command}", run_name="__main__", alter_sys=True)
