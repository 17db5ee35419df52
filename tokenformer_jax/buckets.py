"""Google's buckets: paths in them, patience while they are out of reach, and one writer of a folder.

Objects appear whole, and are neither appended to nor renamed. For a lock there is an object that is made only if there
is none.
"""

import contextlib
import functools
import os
import pathlib
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from tokenformer_jax.errors import UserError

Result = TypeVar("Result")

SCHEME = "gs://"
LEASE = 30.0  # seconds without a sign of life after which a writer counts as dead
PATIENCE = "TOKENFORMER_BUCKET_PATIENCE"  # of the environment: seconds
_TOKEN = secrets.token_hex(8)  # of this process

# What libraries raise where the service, or the network to it, is out.
_OUTAGES = {
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "aiohttp.client_exceptions.ClientError",
    "google.api_core.exceptions.RetryError",
    "google.api_core.exceptions.ServerError",
    "google.api_core.exceptions.TooManyRequests",
    "google.auth.exceptions.RefreshError",
    "google.auth.exceptions.TransportError",
    "requests.exceptions.RequestException",
}
_OTHERS = {  # and for other reasons, such as rights
    "builtins.OSError",
    "gcsfs.retry.HttpError",
    "google.api_core.exceptions.GoogleAPIError",
    "google.auth.exceptions.GoogleAuthError",
}


class Unreachable(UserError):
    """A bucket was out of reach for longer than we wait."""


def is_bucket(path: str | os.PathLike[str]) -> bool:
    return os.fspath(path).startswith(SCHEME)


def bucket_path(url: str) -> pathlib.Path:
    """A path in a bucket, which acts as pathlib's do."""
    import fsspec

    # epath makes the file system, and listings must show what other processes and TensorStore write.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return cast(pathlib.Path, _path_class()(url))


@functools.cache
def _path_class() -> Any:
    import fsspec
    from etils.epath import gpath

    class BucketPath(gpath.PosixGPath):
        """epath's own says of a folder that is out of reach that there is none, and a run would begin anew."""

        def is_dir(self) -> bool:
            system, place = fsspec.core.url_to_fs(os.fspath(self))
            try:
                return system.info(place)["type"] == "directory"
            except FileNotFoundError:
                return False

    return BucketPath


def patience() -> float:
    """How many seconds a bucket may be out of reach before a command ends."""
    given = os.environ.get(PATIENCE, "300")
    try:
        return float(given)
    except ValueError:
        raise UserError(f"{PATIENCE}={given}: must be a number of seconds, such as 300") from None


def patiently(path: str | os.PathLike[str], action: Callable[[], Result]) -> Result:
    """What it returns; where the path is in a bucket that is out of reach, it is called until that is back.

    Raises:
      Unreachable: the bucket was out for `patience()` seconds.
    """
    began, pause = time.monotonic(), 1.0
    while True:
        try:
            return action()
        except Exception as error:
            if not is_bucket(path) or not is_outage(error):
                raise
            waited = time.monotonic() - began
            if waited >= patience():
                raise unreachable(path, error, f" for {waited:.0f} seconds") from error
        time.sleep(pause)
        pause = min(2 * pause, 15)


def unreachable(path: str | os.PathLike[str], error: BaseException, how_long: str = "") -> Unreachable:
    if isinstance(error, Unreachable):
        return error
    return Unreachable(
        f"{os.fspath(path)}: the bucket is out of reach{how_long} ({_line(error)}); start the same command "
        "again once it is back"
    )


def is_outage(error: BaseException) -> bool:
    return isinstance(error, Unreachable) or bool(_chain(error) & _OUTAGES)


def _chain(error: BaseException | None) -> set[str]:
    """Names of the kinds of an error, and of those that it came of."""
    names: set[str] = set()
    while error:
        names |= {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
        if re.match("UNAVAILABLE|DEADLINE_EXCEEDED", str(error)) or getattr(error, "code", 0) in (429, 500, 502, 503):
            names.add("builtins.ConnectionError")  # of TensorStore, and of gcsfs
        error = error.__cause__ or error.__context__
    return names


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def bucket_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what libraries raise of a bucket into a UserError that names the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_bucket(path):
            raise
        if isinstance(error, ImportError):
            raise UserError(f"{path}: needs the package gcsfs; use pip install 'tokenformer-jax[gcs]'") from None
        if is_outage(error):
            raise unreachable(path, error) from error
        if _chain(error) & _OTHERS:
            raise UserError(f"{path}: cannot be used ({_line(error)})") from None
        raise


def remove_folder(folder: pathlib.Path) -> None:
    if is_bucket(folder):
        cast(Any, folder).rmtree()
    else:
        shutil.rmtree(folder)


def copy_folder(source: pathlib.Path, target: pathlib.Path, last: str = "") -> None:
    """Copies files between folders, in buckets or not: those named `last` after all others."""
    import fsspec

    system, place = fsspec.core.url_to_fs(os.fspath(source))
    for name in sorted(system.find(place), key=lambda name: (name.endswith(f"/{last}"), name)):
        copy = target / os.path.relpath(name, place)
        if not is_bucket(copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
        with system.open(name, "rb") as old, copy.open("wb") as new:
            shutil.copyfileobj(old, new, 1 << 24)


def move_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a folder to one that is not there; in a bucket object by object."""
    if is_bucket(source):
        copy_folder(source, target)
        return remove_folder(source)
    target.parent.mkdir(exist_ok=True)
    os.replace(source, target)


def size_of(folder: pathlib.Path) -> int:
    """Bytes of all files in it."""
    import fsspec

    system, place = fsspec.core.url_to_fs(os.fspath(folder))
    return system.du(place)


class Staged:
    """Where files of a folder are written that grow: the folder itself, or one of this machine that `send` copies."""

    def __init__(self, folder: pathlib.Path):
        self.target = folder
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="tokenformer_")) if is_bucket(folder) else folder
        self.sent: dict[pathlib.Path, tuple[int, int]] = {}

    def send(self) -> None:
        """Copies what has changed."""
        for file in sorted(self.folder.rglob("*")) if is_bucket(self.target) else ():
            stat = file.stat()
            now = stat.st_size, stat.st_mtime_ns
            if file.is_file() and self.sent.get(file) != now:
                copy = self.target / file.relative_to(self.folder).as_posix()
                patiently(copy, functools.partial(_send, file, copy))
                self.sent[file] = now

    def remove(self) -> None:
        if is_bucket(self.target):
            shutil.rmtree(self.folder, ignore_errors=True)


def _send(file: pathlib.Path, copy: pathlib.Path) -> None:
    copy.write_bytes(file.read_bytes())


class Lease:
    """An object that says who writes a folder, made only if there is none, and renewed as long as its maker lives.

    One that was not renewed for `LEASE` seconds, by the clock of whoever watches it, is taken over.
    """

    def __init__(self, file: pathlib.Path, wait: bool = False):
        """Waits for the end of another's, with `wait` for as long as it is renewed; a UserError without."""
        from google.cloud import storage

        self.file, self.stopped, self.busy = file, threading.Event(), threading.Lock()
        bucket, _, name = os.fspath(file).removeprefix(SCHEME).partition("/")
        self.blob = storage.Client().bucket(bucket).blob(name)
        self.me, self.generation = f"{_me()} {secrets.token_hex(8)}", 0
        while not self._write(0) and not self._take_over(wait):
            pass
        threading.Thread(target=self._renew, daemon=True).start()

    def _write(self, generation: int, **how: Any) -> bool:
        """Whether it was written, by which it is ours: only where the object is of that generation, or absent for 0."""
        from google.api_core.exceptions import PreconditionFailed

        try:
            self.blob.upload_from_string(self.me, if_generation_match=generation, **how)
        except PreconditionFailed:
            if writer_of(self.file) != self.me:  # as it may be after an upload whose answer was lost
                return False
            self.blob.reload()
        self.generation = self.blob.generation
        return True

    def _take_over(self, wait: bool) -> bool:
        from google.api_core.exceptions import NotFound

        seen, began, folder = None, time.monotonic(), self.file.parent
        while time.monotonic() - began < LEASE:
            try:
                self.blob.reload()
            except NotFound:
                return False
            writer = _shown(writer_of(self.file))
            if seen is None:
                print(f"{folder}: was last written by {writer}; waiting for a sign of life", file=sys.stderr)
            elif seen != self.blob.generation:
                if not wait:
                    raise UserError(f"{folder}: is written by {writer}; let it end")
                began = time.monotonic()
            seen = self.blob.generation
            time.sleep(LEASE / 15)
        return self._write(cast(int, seen))

    def _renew(self) -> None:
        while not self.stopped.wait(LEASE / 3):
            with self.busy, contextlib.suppress(Exception):  # it is tried again
                if not self.stopped.is_set() and not self._write(self.generation, retry=None, timeout=10):
                    return  # `require_writer` says so

    def close(self) -> None:
        self.stopped.set()
        if self.busy.acquire(timeout=1):
            with contextlib.suppress(Exception):  # then it ends by itself
                self.blob.delete(if_generation_match=self.generation, retry=None, timeout=5)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} {_TOKEN}"


def writer_of(file: pathlib.Path) -> str:
    """What a lease says; nothing where there is none."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _shown(writer: str) -> str:
    return " ".join(writer.split()[:4]) or "nobody"


def require_writer(folder: pathlib.Path, file: pathlib.Path) -> None:
    """Raises a UserError where another process has taken over the lease of a folder."""
    writer = patiently(file, lambda: writer_of(file))
    if not writer.startswith(_me()):
        raise UserError(
            f"{folder}: is written by {_shown(writer)} now, since this process gave no sign of life for {LEASE:.0f} "
            "seconds or its lock was deleted; it ends here, and what it saved before stands"
        )
