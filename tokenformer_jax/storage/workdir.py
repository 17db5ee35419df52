"""The folder of a run: one writer, whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from tokenformer_jax.buckets import Lease, is_bucket, patiently, remove_folder, require_writer
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import locked, make_folder, parse_json, replace_file, unsealed


def load_config(path: pathlib.Path) -> Config:
    """Reads the `config.json` of a workdir. Raises UserError when it is missing, damaged or not a config."""
    require_whole(path.parent)
    try:
        text = path.read_text()
        tree = parse_json(text)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; is {path.parent} the --workdir of a training run?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON config ({error})") from None
    if isinstance(tree, dict) and "checksum" in tree:
        try:
            tree = unsealed(text)
        except ValueError:
            raise UserError(
                f"{path}: has changed since it was written; if that was meant, delete its checksum, and if not, "
                "use the --config of the run: train writes it anew"
            ) from None
    return read_config(tree, str(path))


LOCK = ".lock"  # in a folder that a command writes
BEGUN = ".partial"  # in a bucket's folder that is not whole: an object that is written first, and deleted last


def require_whole(workdir: pathlib.Path) -> None:
    """Raises a UserError where a command that makes the workdir has not ended well."""
    if is_bucket(workdir) and (workdir / BEGUN).exists():
        raise UserError(f"{workdir}: is not whole; the command that makes it still runs, or must be started again")


def require_empty(workdir: pathlib.Path, why: str, flag: str = "--workdir") -> None:
    """Raises a UserError unless the directory is new or empty."""
    if is_bucket(workdir) and (workdir / BEGUN).exists():
        return  # what is there is cleared
    if workdir.exists() and (not workdir.is_dir() or any(path.name != LOCK for path in workdir.iterdir())):
        raise UserError(f"{flag}={workdir}: {why}; name a new or an empty directory")


@contextlib.contextmanager
def only_writer(folder: pathlib.Path) -> Iterator[None]:
    """Makes this command, with all of its processes, the only one that writes a folder, which is made if need be.

    The lock ends with its process, however that ends; in a bucket half a minute later, for which the next one waits. On
    a file system without locks a warning says that there is none.

    Raises:
      UserError: another command holds the folder, and which; or it cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    lock = folder / LOCK
    if is_bucket(folder):
        with contextlib.closing(Lease(lock)):
            yield
        return
    try:
        make_folder(folder)
        lock.touch()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            writer = lock.read_text().strip() or "another process"
            raise UserError(f"{folder}: is written by {writer}; let it end") from None
        except OSError as error:
            print(f"warning: {folder} cannot be locked ({error.strerror}): start nothing else there", file=sys.stderr)
        with contextlib.suppress(OSError):
            lock.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [path.name for path in folder.iterdir()] == [LOCK]:  # nothing was begun
                    lock.unlink()
                    folder.rmdir()


def require_still_the_writer(folder: pathlib.Path) -> None:
    """Raises a UserError where a bucket was out of reach for this process, and another took the folder over."""
    if is_bucket(folder) and jax.process_index() == 0:
        require_writer(folder, folder / LOCK)


def clear(folder: pathlib.Path) -> None:
    """Empties a folder that this command is the only writer of."""
    for path in list(folder.iterdir()):
        if path.is_dir():
            remove_folder(path)
        elif path.name not in (LOCK, BEGUN):
            path.unlink()


@contextlib.contextmanager
def new_workdir(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a workdir that appears whole or not at all, out of what is written to the folder that it yields.

    All processes enter it together. `workdir` is new or empty.

    Raises:
      UserError: it cannot be written.
    """
    if is_bucket(workdir):
        with _new_in_bucket(workdir):
            yield workdir
        return
    workdir = workdir.resolve()
    partial = workdir.with_name(f".{workdir.name}.partial")
    first = jax.process_index() == 0
    with only_writer(partial):
        try:
            if first:
                clear(partial)  # of a process that was killed
            multihost_utils.sync_global_devices("workdir begun")
            yield partial
            if first:
                (workdir / LOCK).unlink(missing_ok=True)
                os.replace(partial, workdir)
            multihost_utils.sync_global_devices("workdir made")
        except OSError as error:
            raise UserError(f"{workdir}: cannot be written ({error.strerror or error})") from None
        finally:
            if first:
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _new_in_bucket(workdir: pathlib.Path) -> Iterator[None]:
    """`new_workdir` where nothing can be renamed: an object marks the folder as long as it is not whole."""
    first = jax.process_index() == 0
    with only_writer(workdir):
        if first:
            replace_file(workdir / BEGUN, "")
            clear(workdir)
        multihost_utils.sync_global_devices("workdir begun")
        yield
        multihost_utils.sync_global_devices("workdir written")
        if first:
            patiently(workdir, (workdir / BEGUN).unlink)
        multihost_utils.sync_global_devices("workdir made")
