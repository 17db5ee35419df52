"""Which files a path names: the file itself, all that a folder holds, or what a glob matches."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# What stands in a workdir; a folder with two of these is one.
_RUN = ("checkpoints", "config.json", "environment.json", "metrics.jsonl", "tensorboard", ".lock")
_OF_A_RUN = ("checkpoints", "damaged_checkpoints", "metrics.jsonl", "tensorboard", "wandb")
_OF_A_CHECKPOINT = "commit_success.txt"
_PREPARED = re.compile(r"-[0-9a-f]{12}$")  # folders of a cache


class File(NamedTuple):
    path: Path  # without links
    ending: str  # of the name that it was found by, in lower case: what a link points to may have none


class Found(NamedTuple):
    files: list[File]  # each once, sorted by path
    skipped: list[str]  # names of the others, and why if it is not their ending


def find(path: Path, endings: Sequence[str], cache: Path | None = None) -> Found:
    """The files with these endings (in any case) that a path names.

    A name that exists is taken as it is, even where it looks like a glob. Below a folder or a glob, links are followed;
    hidden files and folders are left out, and so are the folders of runs and prepared data in the folder `cache`.
    """
    base, pattern = _existing_part(path)
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
        ending = os.path.splitext(name)[1].lower()
        if name in faults:
            continue
        if ending in endings:
            stat = os.stat(real)
            files.setdefault((stat.st_dev, stat.st_ino) if stat.st_ino else real, File(Path(real), ending))
        else:
            skipped.append(inside(name))
    return Found(sorted(files.values()), sorted(skipped))


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
