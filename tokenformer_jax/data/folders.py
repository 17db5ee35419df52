"""Which files a path or URL names: the file itself, all that a folder holds, or what a glob matches."""

import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenformer_jax.data.units import ending_of, is_known
from tokenformer_jax.errors import UserError

# What stands in a workdir; a folder with two of these is one.
_RUN = ("checkpoints", "config.json", "environment.json", "metrics.jsonl", "tensorboard", ".lock")
_OF_A_RUN = ("checkpoints", "damaged_checkpoints", "metrics.jsonl", "tensorboard", "wandb")
_OF_A_CHECKPOINT = "commit_success.txt"
_PREPARED = re.compile(r"-[0-9a-f]{12}$")  # folders of a cache


class File(NamedTuple):
    path: str  # without links, or the URL
    ending: str  # of the name that it was found by, in lower case: what a link points to may have none
    size: int
    stamp: Any  # another where the file has changed: its time or, in a bucket, what the bucket says of its content


class Found(NamedTuple):
    files: list[File]  # each once, sorted by path
    skipped: list[str]  # names of the others, and why if it is not their ending


def find(path: Path, cache: Path | None = None) -> Found:
    """The files that a path names: those whose endings are known (in any case) or, where it says an ending, all.

    A name that exists is taken as it is, even where it looks like a glob. Below a folder or a glob, links are followed;
    hidden files and folders are left out, and so are the folders of runs and prepared data in the folder `cache`.
    """
    base, pattern = _existing_part(path)
    wants = _wanted(pattern[-1] if pattern else "" if base.is_dir() else base.name)
    faults: dict[str, str] = {}  # why a name cannot be read
    if pattern or base.is_dir():
        base = Path(os.path.realpath(base))
        names = dict(_Walk(os.path.realpath(cache) if cache else "", faults).matches(str(base), pattern))
    else:
        names = {str(base): os.path.realpath(base)}
        if not base.is_file():
            faults[str(base)] = _why_not(str(base))

    def inside(name: str) -> str:
        return os.path.basename(name) if Path(name) == base else os.path.relpath(name, base)

    files: dict[Any, File] = {}
    skipped = [f"{inside(name)} ({fault})" for name, fault in faults.items()]
    # A file's own name comes before those of links to it, so that links do not change what it is read as.
    for name, real in sorted(names.items(), key=lambda item: (item[0] != item[1], item[0])):
        ending = ending_of(name)
        if name in faults:
            continue
        if wants(ending):
            stat = os.stat(real)
            file = File(real, ending, stat.st_size, stat.st_mtime_ns)
            files.setdefault((stat.st_dev, stat.st_ino) if stat.st_ino else real, file)
        else:
            skipped.append(inside(name))
    return Found(sorted(files.values(), key=lambda file: Path(file.path)), sorted(skipped))


def _wanted(name: str) -> Callable[[str], bool]:
    """Whether a file is read, by its ending, where a path's last part is `name`."""
    return (lambda ending: True) if re.search(r"\.[^.]*\w[^.]*$", name) else is_known


def find_remote(url: str) -> Found:
    """The files that a URL names, as `find` does, through whatever library fsspec knows for it.

    Raises:
      UserError: there is no such library, or it cannot list the files.
    """
    import fsspec

    key = f"data.path = {url!r}"
    try:
        system, path = fsspec.core.url_to_fs(url)
        pattern = ""
        if system.isfile(path):
            names = {path: system.info(path)}
        elif system.isdir(path):
            names = system.find(path, detail=True)
        else:
            pattern = path
            names = {name: info for name, info in system.glob(path, detail=True).items() if info["type"] == "file"}
    except ImportError as error:
        extra = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}.get(url.partition(":")[0], "")
        extra = f"; pip install 'tokenformer-jax[{extra}]'" if extra else ""
        raise UserError(f"{key}: cannot be read without a package ({_line(error)}){extra}") from None
    except Exception as error:  # each library has its own, of the network, of rights, of names
        raise UserError(
            f"{key}: cannot be listed ({_line(error)}); use one that can, or a path of this machine"
        ) from None
    base = os.path.dirname(re.split(r"[*?\[]", path)[0]) if pattern else path
    wants = _wanted(path.rpartition("/")[2] if pattern or path in names else "")
    found = Found([], [])
    for name, info in sorted(names.items()):
        inside = name.removeprefix(base).strip("/") or os.path.basename(name)
        if any(part.startswith(".") for part in inside.split("/")) and name != path:
            continue
        ending = ending_of(name)
        if wants(ending):
            stamp = next((info[key] for key in _CONTENT if info.get(key)), None) or str(info.get("mtime", ""))
            found.files.append(File(system.unstrip_protocol(name), ending, info["size"] or 0, stamp))
        else:
            found.skipped.append(inside)
    return found


# What libraries call a hash of a file's content: Hugging Face's, Google's, Amazon's and Azure's.
_CONTENT = ("blob_id", "md5Hash", "crc32c", "etag", "ETag", "content_md5")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


def _existing_part(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The longest beginning of a path that exists, and the rest: a glob."""
    base = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for i, part in enumerate(parts):
        if not os.path.lexists(base / part):
            return base, parts[i:]
        base /= part
    return base, ()


class _Entries(NamedTuple):
    """What a folder holds, by name: where it really is."""

    folders: dict[str, str]
    files: dict[str, str]
    others: dict[str, str]


class _Walk:
    """Goes through folders by where they really are, each once, so that links in a circle end."""

    def __init__(self, cache: str, faults: dict[str, str]):
        self.cache, self.faults = cache, faults
        self.listed: dict[str, _Entries] = {}

    def matches(self, base: str, pattern: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Paths of the files below a folder that a pattern matches (without one, all), and where they really are."""
        folders = {base: base}  # where they really are, and a path to them
        *segments, last = pattern or ("**",)
        for segment in segments:
            folders = self._descend(folders) if segment == "**" else self._step(folders, segment)
        if last == "**":
            folders, last = self._descend(folders), "*"
        for real, folder in folders.items():
            entries = self._entries(real)
            for name in _matching(entries.files, last):
                yield os.path.join(folder, name), entries.files[name]
            for name in _matching(entries.others, last):
                self.faults[os.path.join(folder, name)] = _why_not(os.path.join(real, name))

    def _step(self, folders: dict[str, str], segment: str) -> dict[str, str]:
        """The folders in these folders whose names match."""
        if segment == "..":
            return {os.path.dirname(real): os.path.join(path, "..") for real, path in folders.items()}
        within: dict[str, str] = {}
        for real, path in folders.items():
            entries = self._entries(real)
            for name in _matching(entries.folders, segment):
                if not glob.has_magic(segment) or not self._is_left_out(entries.folders[name]):
                    within.setdefault(entries.folders[name], os.path.join(path, name))
        return within

    def _descend(self, folders: dict[str, str]) -> dict[str, str]:
        """These folders and all below them."""
        found, waiting = dict(folders), list(folders)
        while waiting:
            real = waiting.pop()
            entries = self._entries(real)
            for name in _matching(entries.folders, "*"):
                place = entries.folders[name]
                if place not in found and not self._is_left_out(place):
                    found[place] = os.path.join(found[real], name)
                    waiting.append(place)
        return found

    def _is_left_out(self, real: str) -> bool:
        folder, name = os.path.split(real)
        return (folder == self.cache and bool(_PREPARED.search(name))) or _is_run(real)

    def _entries(self, real: str) -> _Entries:
        if real not in self.listed:
            self.listed[real] = entries = _Entries({}, {}, {})
            own = _OF_A_RUN if _is_run(real) else ()
            try:
                with os.scandir(real) as found:
                    for entry in found:
                        if entry.name not in own and entry.name != _OF_A_CHECKPOINT:
                            place = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                            if _holds(entry.is_dir):
                                entries.folders[entry.name] = place
                            else:
                                kind = entries.files if _holds(entry.is_file) else entries.others
                                kind[entry.name] = place
            except OSError as error:
                self.faults[real] = error.strerror or str(error)
        return self.listed[real]


def _is_run(folder: str) -> bool:
    return sum(os.path.lexists(os.path.join(folder, name)) for name in _RUN) >= 2


def _holds(test: Any) -> bool:
    try:
        return test()
    except OSError:  # of a link that leads nowhere or in a circle
        return False


def _matching(names: Iterable[str], segment: str) -> list[str]:
    """Names that match a part of a glob; hidden ones only where it says so itself."""
    if not glob.has_magic(segment):
        return [name for name in names if name == segment]
    return [name for name in names if fnmatch.fnmatchcase(name, segment) and (name[0] != "." or segment[0] == ".")]


def _why_not(name: str) -> str:
    return "no regular file" if os.path.exists(name) else "a link to nothing" if os.path.islink(name) else "not found"
