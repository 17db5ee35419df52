"""Files that appear whole or not at all, and JSON that can tell when it has changed."""

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

from tokenformer_jax.buckets import SCHEME, bucket_path, is_bucket, patiently
from tokenformer_jax.errors import UserError, shown

_URL = re.compile(r"[A-Za-z][\w.+-]+:/")  # also with one slash, to which pathlib shortens two


def is_url(value: str | os.PathLike[str]) -> bool:
    return bool(_URL.match(os.fspath(value)))


def run_path(value: str | os.PathLike[str], name: str) -> pathlib.Path:
    """The path of a run that a user gave: of this machine, as `local_path` has it, or gs://BUCKET/FOLDER.

    Raises:
      UserError: it is another URL, or no name that can be used.
    """
    text = os.fspath(value)
    if not is_bucket(text):
        return local_path(text, name, or_bucket=True)
    parts = text.removeprefix(SCHEME).rstrip("/").split("/")
    if len(parts) < 2 or {"", ".", ".."} & set(parts) or not text.isprintable() or set(text) & set("*?[]#"):
        raise UserError(f"{_given(value, name)}: names no folder of a bucket; use gs://BUCKET/FOLDER")
    return bucket_path(SCHEME + "/".join(parts))


def _given(value: str | os.PathLike[str], name: str) -> str:
    return f"{name}={shown(os.fspath(value))}" if name.startswith("--") else f"{name} = {os.fspath(value)!r}"


def local_path(
    value: str | os.PathLike[str], name: str, any_bytes: bool = False, or_bucket: bool = False
) -> pathlib.Path:
    """A path that a user gave in the flag or key `name`, with ~ expanded.

    With `any_bytes` it need not be UTF-8, which libraries want of what they write.

    Raises:
      UserError: it is a URL, or no name that can be used.
    """
    given = _given(value, name)
    if is_url(value):
        other = ", or gs://BUCKET/FOLDER" if or_bucket else " (copy it there, or from there)"
        raise UserError(f"{given}: is a URL; use a path of this machine{other}")
    if "\0" in os.fspath(value):
        raise UserError(f"{given}: holds a zero byte, as no path does; leave it out")
    path = pathlib.Path(os.path.expanduser(value))
    if not any_bytes and not _is_unicode(str(path.absolute())):
        raise UserError(f"{given}: is not UTF-8 ({shown(path.absolute())}); use a path that is")
    return path


def check_data_path(value: str, name: str) -> None:
    """Raises a UserError, which begins with the key's or flag's name, where it names no place that can be used."""
    if not name.endswith(".path"):
        run_path(value, name)
    elif not is_url(value):
        local_path(value, name, any_bytes=True)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: str | bytes) -> Any:
    """What JSON holds; ValueError for anything else, also where it is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON, which has no word for NaN and infinities: they are null."""
    return json.dumps(_finite(value), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sealed(tree: dict[str, Any]) -> str:
    """JSON text of a dict, with a checksum of all of it as its last entry."""
    tree = _finite(tree)
    return json.dumps(tree | {"checksum": _checksum(tree)}, indent=2) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """The dict that `sealed` wrote. Raises ValueError where it has changed."""
    tree = parse_json(text)
    if not isinstance(tree, dict) or tree.pop("checksum", None) != _checksum(tree):
        raise ValueError("its checksum differs")
    return tree


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:16]


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all. Raises UserError where it can't be written."""
    if is_bucket(path):
        return patiently(path, lambda: cast(None, path.write_text(text)))
    partial = path.with_name(f".{path.name}.partial")
    try:
        make_folder(path.parent)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def write_with(path: pathlib.Path, write: Callable[[Any], None]) -> None:
    """Has a library write a file, which it is told by its path or, in a bucket, as a file in memory."""
    if not is_bucket(path):
        return write(path)
    memory = io.BytesIO()
    write(memory)
    patiently(path, lambda: cast(None, path.write_bytes(memory.getvalue())))


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder, with its parents, unless it is there. Raises an OSError whose `strerror` is the true reason."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        taken = str(error.filename)
        if os.path.islink(taken) and not os.path.exists(taken):
            reason = f"{taken} is a link to {os.readlink(taken)}, which does not exist"
        else:
            reason = f"{taken} is a file"
        raise FileExistsError(error.errno, reason) from None


@contextlib.contextmanager
def locked(path: pathlib.Path, wait: bool = True) -> Iterator[None]:
    """Holds a file's lock, which the system frees when its holder dies, however it does.

    Raises:
      BlockingIOError: another process holds it, and this one does not wait.
      OSError: the file cannot be opened, or its file system has no locks.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
