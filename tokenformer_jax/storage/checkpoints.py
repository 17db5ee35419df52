"""Checkpoints of a run through Orbax: state, data position, what the data needs and the run's record, all or nothing.

It knows trees, not models: what to restore is said by a tree of ShapeDtypeStructs, whose shardings may be those of
another mesh than the one that saved. Orbax does not see when bytes change on the disk. So the record's file holds a
fingerprint of every array, and a checksum of itself, and all that is read is compared with those.
"""

import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from tokenformer_jax.buckets import (
    Unreachable,
    is_bucket,
    is_outage,
    move_folder,
    patiently,
    size_of,
    unreachable,
)
from tokenformer_jax.config import read_model
from tokenformer_jax.devices.hardware import give_back_memory
from tokenformer_jax.errors import UserError, listed
from tokenformer_jax.files import unsealed
from tokenformer_jax.storage.arrays import (
    CHUNK_BYTES,
    Saved,
    as_tree,
    by_name,
    bytes_in_flight,
    parts_of,
    storage_context,
)
from tokenformer_jax.storage.fingerprint import as_text, fingerprints
from tokenformer_jax.storage.in_bucket import is_finished, settle
from tokenformer_jax.storage.record import Record, RecordFile
from tokenformer_jax.storage.workdir import require_still_the_writer

Read = TypeVar("Read")


class DamagedError(UserError):
    """A checkpoint that cannot be read, or is not what was saved: `names` says which arrays, or its "record"."""

    def __init__(self, message: str, names: Sequence[str] = (), reason: str = ""):
        super().__init__(message)
        self.names, self.reason = names, reason


class Checkpoints:
    """The checkpoints of one directory, one a step."""

    def __init__(self, directory: pathlib.Path, keep: int | None = None):
        """Opens a directory to read it, or with `keep` to save as well and keep that many newest ones."""
        self.directory, self.keep = directory if is_bucket(directory) else directory.absolute(), keep
        self._open_saver: ocp.training.Checkpointer | None = None
        self.kept_for_good: set[int] = set()  # steps: the last ones of a ladder's rungs
        if keep is None and not self.directory.is_dir():
            raise UserError(f"{directory}: no checkpoints here; is {directory.parent} the directory of a training run?")

    def _saver(self) -> ocp.training.Checkpointer:
        """Orbax's, made when something is saved: it makes the directory."""
        if self._open_saver is None:
            self._open_saver = ocp.training.Checkpointer(
                self.directory, preservation_policy=_Keep(self), cleanup_tmp_directories=True
            )
        return self._open_saver

    @property
    def steps(self) -> list[int]:
        """Of the finished checkpoints, good or not, in order."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if path.name.isdecimal()]
        return sorted(int(path.name) for path in found if is_finished(path))

    def choose(self, step: int | None) -> int:
        """The given step, or the newest; UserError where there is none."""
        if not self.steps:
            raise UserError(f"{self.directory}: holds no finished checkpoint; train first")
        if step is not None and step not in self.steps:
            raise UserError(f"--step={step}: {self.directory} holds the steps {listed(self.steps)}")
        return self.steps[-1] if step is None else step

    def newest_good(self, step: int | None, read: Callable[[int], Read]) -> Read:
        """What `read` makes of the given step or, without one, of the newest that it can read.

        Damaged ones are skipped, with a warning. Raises a DamagedError where the given one is damaged, or all are.
        """
        self.choose(step)
        if step is not None:
            try:
                return read(step)
            except DamagedError as error:
                others = [s for s in self.steps if s != step]
                raise DamagedError(f"{error}; there is also step {listed(others)}" if others else str(error)) from None
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

    def save(self, step: int, state: Any, data: Any, assets: dict[str, str], record: Record) -> None:
        """Saves in the background, once the arrays are copied. Waits for the save before, and raises its error.

        Args:
          step: number of the checkpoint; one already there is left alone.
          state: a tree of arrays, which may be donated afterwards.
          data: the training iterator; its position is saved, which is the same on all processes.
          assets: texts that the data needs, such as its tokenizer, by name.
          record: the rest.
        """
        if is_bucket(self.directory):
            require_still_the_writer(self.directory.parent)
        elif self._open_saver and not self.directory.is_dir():  # Orbax would make another
            raise UserError(f"{self.directory}: is gone; was {self.directory.parent} moved? The run ends here")
        with (
            self._writing(),
            storage_context(state),
            jax.transfer_guard("allow"),
        ):  # copying to the host is what a save is
            small = {"record": dataclasses.asdict(record), "position": data.get_state()} | assets
            items = {"state": state, "record": RecordFile(small, by_name(state))}
            self._patiently(lambda: self._begin_save(step, items))

    def _begin_save(self, step: int, items: dict[str, Any]) -> None:
        self._settle()
        saver = self._saver()
        if step not in [checkpoint.step for checkpoint in saver.checkpoints]:
            saver.save_checkpointables_async(step, items, force=True)

    def _patiently(self, action: Callable[[], None]) -> None:
        """Where a bucket is out, it is called again, by which a later save takes the place of one that failed.

        Not by several processes, which would have to agree on it: their launcher starts all again.
        """
        patiently(self.directory if jax.process_count() == 1 else "", action)

    def record(self, step: int) -> Record:
        try:
            return Record(**self._contents(step)["record"])
        except TypeError:
            raise UserError(f"{self.directory / str(step)}: not a checkpoint of tokenformer_jax") from None

    def assets(self, step: int) -> dict[str, str]:
        """The texts that were saved with the state, by name."""
        contents = self._contents(step)
        return {name: contents[name] for name in contents.keys() - {"record", "position", "arrays"}}

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
        context.memory.read_concurrent_bytes = bytes_in_flight([saved[name].nbytes for name in names])
        context.pytree.loading.partial_load = True
        context.array.loading.enable_padding_and_truncation = padded  # nothing is truncated: shapes were compared
        parts = parts_of([math.prod(leaf.shape) for leaf in leaves])
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
                    yield {}, {names[i]: reason(error) for i in part}
                continue
            found = fingerprints(arrays, {name: saved[name].shape for name in arrays})
            differing = [name for name, sums in found.items() if as_text(sums) != saved[name].fingerprint]
            yield arrays, dict.fromkeys(differing, "its fingerprint differs")
            del state, arrays, found
            if sum(saved[names[i]].nbytes for i in part) > CHUNK_BYTES:  # it takes longer than reading less
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
        for _, found in self._read(step, as_tree(wanted), saved):
            faults |= found
        return faults

    def _contents(self, step: int) -> dict[str, Any]:
        """What the record's file holds."""
        try:
            return unsealed((self.directory / str(step) / "record" / RecordFile.name).read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(step, ["record"], reason(error)) from error

    def _saved(self, step: int) -> dict[str, "Saved"]:
        arrays = self._contents(step)["arrays"]
        return {name: Saved(jnp.dtype(dtype), tuple(shape), text) for name, (dtype, shape, text) in arrays.items()}

    def _metadata(self, step: int) -> Any:
        try:
            return ocp.metadata(self.directory / str(step), "state")
        except Exception as error:
            raise self._damaged(step, ["state"], reason(error)) from error

    def is_listed(self, step: int) -> bool:
        """Whether Orbax can tell what a checkpoint holds. One that it cannot keeps it from saving another."""
        try:
            self._metadata(step)
        except DamagedError:
            return False
        return True

    def _damaged(self, step: int, names: list[str], reason: str) -> DamagedError:
        return DamagedError(f"{self.directory / str(step)}: {listed(names)} damaged ({reason})", names, reason)

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a checkpoint out of the way, and tells where to. Only before anything is saved."""
        aside = self.directory.with_name("damaged_checkpoints") / f"{step}_{int(time.time())}"
        if jax.process_index() == 0:
            move_folder(self.directory / str(step), aside)
        multihost_utils.sync_global_devices("set aside")
        return aside

    def wait(self) -> None:
        """Blocks until what is being saved is safe; raises its error."""
        with self._writing():
            self._settle()

    def _settle(self) -> None:
        if self._open_saver:
            settle(self._open_saver, self.directory)

    def save_at_last(self, save: Callable[[], None]) -> None:
        """Saves, and returns once that is safe; where a bucket is out of reach meanwhile, it does so again."""

        def attempt() -> None:
            self.wait()
            save()
            self.wait()

        self._patiently(attempt)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # TensorStore tells of a full disk by a ValueError
            if is_bucket(self.directory) and is_outage(error):
                raise unreachable(self.directory, error) from error
            raise UserError(f"{self.directory}: a checkpoint cannot be written ({reason(error)})") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not (kind and issubclass(kind, Unreachable)):  # for which it would wait in vain
            self.close()

    def close(self) -> None:
        if self._open_saver:
            with self._writing():
                self._open_saver.close()


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


def reason(error: BaseException) -> str:
    while error.__cause__ or error.__context__:  # Orbax wraps the reason
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    line = next(iter(str(error).splitlines()), "")
    return line.split(" [tensorstore_spec")[0] if " " in line else f"{type(error).__name__} {line}".strip()


def save_one(directory: pathlib.Path, step: int, state: Any, data: Any, assets: dict[str, str], record: Record) -> None:
    """Saves the only checkpoint of a directory, and waits for it."""
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(step, state, data, assets, record)
    checkpoints.wait()
    checkpoints.close()


def describe(checkpoints: Checkpoints, step: int) -> tuple[str, dict[str, str]]:
    """A checkpoint in words, and what of it is damaged -> how. Reads all of it."""
    faults = checkpoints.faults(step)
    lines = [f"step {step}: {size_of(checkpoints.directory / str(step)) / 1e6:,.1f} MB"]
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
        lines.append(f"  damaged: {listed([name for name in faults if faults[name] == why])} ({why})")
    lines += [] if faults else ["  good"]
    return "\n".join(lines), faults


def _counts(tokens: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in tokens.items())
