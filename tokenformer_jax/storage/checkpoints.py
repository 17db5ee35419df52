"""Checkpoints of a run through Orbax: state, data position, tokenizer and the run's record, all or nothing.

It knows trees, not models: what to restore is said by a tree of ShapeDtypeStructs, whose shardings may be those of
another mesh than the one that saved. Orbax does not see when bytes change on the disk. So the record's file holds a
fingerprint of every array, and a checksum of itself, and all that is read is compared with those.

python -m tokenformer_jax.checkpoint --workdir=W   # lists the checkpoints and reads every array of each
"""

import asyncio
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from tokenformer_jax.config import LOCK, UserError, read_model, run_command, workdir_flag
from tokenformer_jax.fingerprint import as_text, fingerprints, sealed, unsealed
from tokenformer_jax.lock import clear, only_writer
from tokenformer_jax.metrics import give_back_memory, replace_file
from tokenformer_jax.tokenizer import Tokenizer, tokenizer_from_json


@dataclasses.dataclass
class Record:
    """What a checkpoint says of its run, beside the arrays; stored as JSON."""

    model: dict[str, Any]  # its config
    data: str  # identity of the training tokens and their order
    batch_size: int  # sequences a step, the unit of the data position
    tokens: int = 0  # seen in training, by this model and the smaller ones it grew from
    train_flops: float = 0.0  # spent on them
    schedule_start: int = 0  # step from which the learning-rate schedule counts
    growth: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # step, tokens before and after, checks
    rung: int = 0  # of the ladder, how many were climbed
    plateau: dict[str, Any] = dataclasses.field(default_factory=dict)  # `ladder.Plateau` of this rung
    rollbacks: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # from step, to step, examples, why
    losses: list[float] = dataclasses.field(default_factory=list)  # of the last steps, to tell a spike by


Read = TypeVar("Read")

_CHUNK_BYTES = 64 << 20  # what is read or written at once


class DamagedError(UserError):
    """A checkpoint that cannot be read, or is not what was saved: `names` says which arrays, or its "record"."""

    def __init__(self, message: str, names: Sequence[str] = (), reason: str = ""):
        super().__init__(message)
        self.names, self.reason = names, reason


class Saved(NamedTuple):
    """An array as it was saved."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fingerprint: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoints:
    """The checkpoints of one directory, one a step."""

    def __init__(self, directory: pathlib.Path, keep: int | None = None):
        """Opens a directory to read it, or with `keep` to save as well and keep that many newest ones."""
        self.directory, self.keep = directory.absolute(), keep
        self.kept_for_good: set[int] = set()  # steps: the last ones of a ladder's rungs
        if keep is None and not self.directory.is_dir():
            raise UserError(f"{directory}: no checkpoints here; is {directory.parent} the directory of a training run?")

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:  # made to save, since it makes the directory
        with self._writing():
            return ocp.training.Checkpointer(
                self.directory, preservation_policy=_Keep(self), cleanup_tmp_directories=True
            )

    @property
    def steps(self) -> list[int]:
        """Of the finished checkpoints, good or not, in order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())

    def choose(self, step: int | None) -> int:
        """The given step, or the newest; UserError where there is none."""
        if not self.steps:
            raise UserError(f"{self.directory}: holds no finished checkpoint; train first")
        if step is not None and step not in self.steps:
            raise UserError(f"--step={step}: {self.directory} holds the steps {_listed(self.steps)}")
        return self.steps[-1] if step is None else step

    def newest_good(self, step: int | None, read: Callable[[int], Read]) -> Read:
        """What `read` makes of the given step or, without one, of the newest that it can read.

        Those that it passed over, since they are damaged, are told on stderr. Raises a DamagedError where the given
        one is, or all are.
        """
        self.choose(step)
        if step is not None:
            try:
                return read(step)
            except DamagedError as error:
                others = [s for s in self.steps if s != step]
                raise DamagedError(f"{error}; there is also step {_listed(others)}" if others else str(error)) from None
        faults: list[str] = []
        for number in reversed(self.steps):
            try:
                result = read(number)
            except DamagedError as error:
                faults.append(str(error))
                continue
            if jax.process_index() == 0:
                for fault in faults:
                    print(f"warning: {fault}; step {number} is used instead", file=sys.stderr)
            return result
        raise DamagedError(f"{faults[0]}; none of the checkpoints is good" if len(faults) > 1 else faults[0])

    def save(self, step: int, state: Any, data: Any, tokenizer: Tokenizer, record: Record) -> None:
        """Saves in the background, once the arrays are copied. Waits for the save before, and raises its error.

        Args:
          step: number of the checkpoint; one already there is left alone.
          state: a tree of arrays, which may be donated afterwards.
          data: the training iterator; its position is saved, which is the same on all processes.
          tokenizer: what made the tokens.
          record: the rest.
        """
        if "_checkpointer" in self.__dict__ and not self.directory.is_dir():  # Orbax would make another
            raise UserError(f"{self.directory}: is gone; was {self.directory.parent} moved? The run ends here")
        with self._writing(), _storage(state), jax.transfer_guard("allow"):  # copying to the host is what a save is
            if step in [checkpoint.step for checkpoint in self._checkpointer.checkpoints]:
                return
            small = {"record": dataclasses.asdict(record), "position": data.get_state()}
            small["tokenizer"] = tokenizer.to_json()
            items = {"state": state, "record": _RecordFile(small, by_name(state))}
            self._checkpointer.save_checkpointables_async(step, items, force=True)

    def record(self, step: int) -> Record:
        try:
            return Record(**self._contents(step)["record"])
        except TypeError:
            raise UserError(f"{self.directory / str(step)}: not a checkpoint of tokenformer_jax") from None

    def tokenizer(self, step: int) -> Tokenizer:
        return tokenizer_from_json(self._contents(step)["tokenizer"])

    def restore_data(self, step: int, data: Any) -> None:
        """Sets a training iterator to the saved position."""
        data.set_state(self._contents(step)["position"])

    def restore(self, step: int, abstract: Any, padded: bool = False) -> Any:
        """The saved state, in the shapes, dtypes and shardings of `abstract`, a tree of ShapeDtypeStructs.

        `abstract` may be a part of what was saved, in nested dicts. With `padded` its arrays may be larger than those
        that were saved, and are filled up with zeros. Raises a UserError that names the first array that is missing or
        differs in shape or dtype, and a DamagedError that names those that are not what was saved.
        """
        saved = self._saved(step)
        self._metadata(step)
        for name, wanted in by_name(abstract).items():
            found = saved.get(name)
            if found is None:
                raise UserError(f"{self.directory / str(step)}: holds no array {name}")
            fits = found.shape == wanted.shape or (
                padded
                and len(found.shape) == len(wanted.shape)
                and all(n <= m for n, m in zip(found.shape, wanted.shape, strict=True))
            )
            if not fits or found.dtype != wanted.dtype:
                raise UserError(
                    f"{self.directory / str(step)}: {name} is {found.dtype}{list(found.shape)}, "
                    f"but the config asks for {wanted.dtype}{list(wanted.shape)}"
                )
        arrays: dict[str, jax.Array] = {}
        faults: dict[str, str] = {}
        for read, found_faults in self._read(step, abstract, saved, padded):
            arrays, faults = arrays | read, faults | found_faults
        if faults:
            raise self._damaged(step, list(faults), next(iter(faults.values())))
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in by_name(abstract)])

    def _read(
        self, step: int, abstract: Any, saved: dict[str, Saved], padded: bool = False
    ) -> Iterator[tuple[dict[str, jax.Array], dict[str, str]]]:
        """Reads arrays in parts: name -> array, and name -> fault of those that are not what was saved."""
        leaves, tree = jax.tree.flatten(abstract)
        names = list(by_name(abstract))
        context = ocp.Context()
        context.memory.read_concurrent_bytes = _in_flight([saved[name].nbytes for name in names])
        context.pytree.loading.partial_load = True
        context.array.loading.enable_padding_and_truncation = padded  # nothing is truncated: shapes were compared
        parts = _parts([math.prod(leaf.shape) for leaf in leaves])
        while parts:
            part = parts.pop(0)
            some = jax.tree.unflatten(tree, [leaf if i in part else None for i, leaf in enumerate(leaves)])
            try:
                with context:
                    state = ocp.load(self.directory / str(step), some, checkpointable_name="state")
                    arrays = by_name(jax.block_until_ready(state))
            except Exception as error:
                if len(part) > 1 and jax.process_count() == 1:  # one by one, to find out which
                    parts = [range(i, i + 1) for i in part] + parts
                else:
                    yield {}, {names[i]: _reason(error) for i in part}
                continue
            found = fingerprints(arrays, {name: saved[name].shape for name in arrays})
            differing = [name for name, sums in found.items() if as_text(sums) != saved[name].fingerprint]
            yield arrays, dict.fromkeys(differing, "its fingerprint differs")
            del state, arrays, found
            if sum(saved[names[i]].nbytes for i in part) > _CHUNK_BYTES:  # it takes longer than reading less
                give_back_memory()  # Orbax's reading leaves cycles that hold what it read

    def faults(self, step: int) -> dict[str, str]:
        """Reads all of a checkpoint, on one device: what is damaged -> how; empty if it is good."""
        try:
            saved = self._saved(step)
            self._metadata(step)
        except DamagedError as error:
            return dict.fromkeys(error.names, error.reason)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for name, a in saved.items()}
        faults: dict[str, str] = {}
        for _, found in self._read(step, _as_tree(wanted), saved):
            faults |= found
        return faults

    def _contents(self, step: int) -> dict[str, Any]:
        """What the record's file holds."""
        try:
            return unsealed((self.directory / str(step) / "record" / _RecordFile.name).read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(step, ["record"], _reason(error)) from error

    def _saved(self, step: int) -> dict[str, "Saved"]:
        arrays = self._contents(step)["arrays"]
        return {name: Saved(jnp.dtype(dtype), tuple(shape), text) for name, (dtype, shape, text) in arrays.items()}

    def _metadata(self, step: int) -> Any:
        try:
            return ocp.metadata(self.directory / str(step), "state")
        except Exception as error:
            raise self._damaged(step, ["state"], _reason(error)) from error

    def is_listed(self, step: int) -> bool:
        """Whether Orbax can tell what a checkpoint holds. One that it cannot keeps it from saving another."""
        try:
            self._metadata(step)
        except DamagedError:
            return False
        return True

    def _damaged(self, step: int, names: list[str], reason: str) -> DamagedError:
        return DamagedError(f"{self.directory / str(step)}: {_listed(names)} damaged ({reason})", names, reason)

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a checkpoint out of the way, and tells where to. Only before anything is saved."""
        aside = self.directory.with_name("damaged_checkpoints") / f"{step}_{int(time.time())}"
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            os.replace(self.directory / str(step), aside)
        multihost_utils.sync_global_devices("set aside")
        return aside

    def wait(self) -> None:
        """Blocks until what is being saved is safe; raises its error."""
        if "_checkpointer" in self.__dict__:
            with self._writing():
                self._checkpointer.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorStore tells of a full disk by a ValueError
            raise UserError(f"{self.directory}: a checkpoint cannot be written ({_reason(error)})") from error

    def close(self) -> None:
        if "_checkpointer" in self.__dict__:
            with self._writing():
                self._checkpointer.close()


class _RecordFile:
    """All that is not an array, in one file. It is written in the background, when the fingerprints are computed."""

    name = "record.json"

    def __init__(self, small: dict[str, Any], arrays: dict[str, jax.Array]):
        self.small = small
        self.kinds = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
        self.fingerprints = fingerprints(arrays)

    def text(self) -> str:
        arrays = {name: [*kind, as_text(self.fingerprints[name])] for name, kind in self.kinds.items()}
        return sealed(self.small | {"arrays": arrays})

    async def save(self, directory: Any) -> Awaitable[None]:
        """Called by Orbax; what it returns is awaited in a thread of its own."""
        return self._write(directory)

    async def _write(self, directory: Any) -> None:
        text = await asyncio.to_thread(self.text)
        folder = await directory.await_creation()
        if jax.process_index() == 0:
            with open(folder / self.name, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

    async def load(self, directory: Any) -> Awaitable[None]:
        raise NotImplementedError("Checkpoints reads the file itself")


class _Keep:
    """Preserves the newest checkpoints, and those kept for good."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def should_preserve(self, found: Any, *, context: Any) -> list[bool]:
        newest = ocp.training.preservation_policies.LatestN(self.checkpoints.keep)
        latest = newest.should_preserve(found, context=context)
        return [
            keep or checkpoint.step in self.checkpoints.kept_for_good
            for keep, checkpoint in zip(latest, found, strict=True)
        ]


def _parts(sizes: list[int]) -> list[range]:
    """Consecutive entries in groups of an eighth of the whole, or a single larger one."""
    parts: list[range] = []
    begin = 0
    for i in range(len(sizes)):
        if i > begin and sum(sizes[begin : i + 1]) > sum(sizes) / 8:
            parts.append(range(begin, i))
            begin = i
    return [*parts, range(begin, len(sizes))]


def _in_flight(sizes: list[int]) -> int:
    """A limit of the bytes that are read or written at once and are not in their place: little beside the whole.

    Orbax wants it above every single array's.
    """
    return 1 + max(*sizes, sum(sizes) // 32)


def _storage(state: Any) -> ocp.Context:
    """How arrays are stored: uncompressed, stacks of layers a layer at a time.

    A reader with another mesh then reads at most a layer beside its own shard. Compression made float32 a seventh
    smaller, at three times the time of a save; and without a limit, Orbax holds a second copy of the whole state.
    """
    context = ocp.Context()
    context.memory.write_concurrent_bytes = _in_flight([leaf.nbytes for leaf in jax.tree.leaves(state)])
    saving = context.array.saving
    saving.use_compression = False
    saving.use_zarr3 = False  # which writes a single layer in many small pieces, that glibc then keeps
    saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    by_layer = type(saving.storage_options)(shard_axes=(0,))
    saving.scoped_storage_options_creator = lambda _, array: by_layer if np.ndim(array) == 3 else None
    return context


def _reason(error: BaseException) -> str:
    while error.__cause__ or error.__context__:  # Orbax wraps the reason
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    line = next(iter(str(error).splitlines()), "")
    return line.split(" [tensorstore_spec")[0] if " " in line else f"{type(error).__name__} {line}".strip()


def _listed(values: Sequence[Any]) -> str:
    """A few values, and how many there are beside these."""
    few = ", ".join(map(str, values[:6]))
    return few + (f" and {len(values) - 6} more" if len(values) > 6 else "")


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves by their path, which is the same for a NamedTuple and for the dict that Orbax makes of it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _as_tree(by_name: dict[str, Any]) -> Any:
    """The inverse, in dicts and, where the keys are numbers, lists."""
    if "" in by_name:
        return by_name[""]
    groups: dict[str, dict[str, Any]] = {}
    for name, leaf in by_name.items():
        key, _, rest = name.partition(".")
        groups.setdefault(key, {})[rest] = leaf
    tree = {key: _as_tree(group) for key, group in groups.items()}
    if not all(key.isdecimal() for key in tree):
        return tree
    return [tree.get(str(i)) for i in range(1 + max(map(int, tree)))]


def write_workdir(
    workdir: pathlib.Path,
    step: int,
    items: tuple[Any, Any, Tokenizer, Record],
    files: Callable[[], dict[str, str]],
) -> None:
    """Makes a workdir of one checkpoint and some text files; it appears whole or not at all.

    Args:
      workdir: new or empty.
      step: number of the checkpoint.
      items: state, data, tokenizer and record, as for `Checkpoints.save`.
      files: gives name -> text; all processes call it, when the checkpoint is safe.

    Raises:
      UserError: it cannot be written.
    """
    workdir = workdir.resolve()
    partial = workdir.with_name(f".{workdir.name}.partial")
    first = jax.process_index() == 0
    with only_writer(partial):
        try:
            if first:
                clear(partial)  # of a process that was killed
            multihost_utils.sync_global_devices("workdir begun")
            checkpoints = Checkpoints(partial / "checkpoints", keep=1)
            checkpoints.save(step, *items)
            checkpoints.wait()
            checkpoints.close()
            texts = files()
            if first:
                for name, text in texts.items():
                    replace_file(partial / name, text)
                (workdir / LOCK).unlink(missing_ok=True)
                os.replace(partial, workdir)
            multihost_utils.sync_global_devices("workdir made")
        except OSError as error:
            raise UserError(f"{workdir}: cannot be written ({error.strerror or error})") from None
        finally:
            if first:
                shutil.rmtree(partial, ignore_errors=True)


def describe(checkpoints: Checkpoints, step: int) -> tuple[str, dict[str, str]]:
    """A checkpoint in words, and what of it is damaged -> how. Reads all of it."""
    faults = checkpoints.faults(step)
    files = [path for path in (checkpoints.directory / str(step)).rglob("*") if path.is_file()]
    lines = [f"step {step}: {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB"]
    try:
        record = checkpoints.record(step)
        tokens = read_model(record.model, str(checkpoints.directory / str(step))).tokens
        lines[0] += f", {record.tokens:,} tokens seen, parameter tokens: {_counts(tokens) or 'none'}"
        for growth in record.growth:
            changed = {name: n for name, n in growth["to"].items() if growth["from"].get(name) != n}
            before = {name: growth["from"].get(name, 0) for name in changed}
            lines.append(f"  grown at step {growth['step']}: {_counts(before)} -> {_counts(changed)}")
    except UserError:  # then it is among the faults, or no model of ours
        pass
    for why in dict.fromkeys(faults.values()):
        lines.append(f"  damaged: {_listed([name for name in faults if faults[name] == why])} ({why})")
    lines += [] if faults else ["  good"]
    return "\n".join(lines), faults


def _counts(tokens: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in tokens.items())


def main() -> None:
    checkpoints = Checkpoints(_WORKDIR() / "checkpoints")
    checkpoints.choose(None)
    damaged: dict[int, list[str]] = {}
    for step in checkpoints.steps:
        text, faults = describe(checkpoints, step)
        print(text, flush=True)
        damaged |= {step: list(faults)} if faults else {}
    if damaged:
        which = "; ".join(f"step {step}: {_listed(names)}" for step, names in damaged.items())
        raise UserError(f"{checkpoints.directory}: damaged are {which}")


if __name__ == "__main__":
    _WORKDIR = workdir_flag()
    run_command(main)
