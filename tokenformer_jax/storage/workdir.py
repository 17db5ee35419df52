"""One writer a folder: a lock that ends with its process."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Iterator

import jax

from tokenformer_jax.config import LOCK, UserError


@contextlib.contextmanager
def only_writer(folder: pathlib.Path) -> Iterator[None]:
    """Makes this command, with all of its processes, the only one that writes a folder, which is made if need be.

    The lock ends with its process, however that does. A file system that has no locks is used without, which is told.

    Raises:
      UserError: another command holds the folder, and which; or it cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{folder}: is written by {file.read().strip() or 'another process'}; let it end") from None
        except OSError as error:
            print(f"warning: {folder} cannot be locked ({error.strerror}): start nothing else there", file=sys.stderr)
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [path.name for path in folder.iterdir()] == [LOCK]:  # nothing was begun
                    (folder / LOCK).unlink()
                    folder.rmdir()


def clear(folder: pathlib.Path) -> None:
    """Empties a folder that this command is the only writer of."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
