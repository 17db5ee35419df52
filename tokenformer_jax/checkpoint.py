"""Checkpoints of a run through Orbax: state, data position, tokenizer and the run's record, all or nothing.

It knows trees, not models: what to restore is said by a tree of ShapeDtypeStructs, whose shardings may be those of
another mesh than the one that saved.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from tokenformer_jax.config import UserError
from tokenformer_jax.metrics import replace_file
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


_CHUNK_BYTES = 64 << 20  # what is read or written at once


class DamagedError(UserError):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """The checkpoints of one directory, one a step."""

    def __init__(self, directory: pathlib.Path, keep: int | None = None):
        """Opens a directory to read it, or with `keep` to save as well and keep that many newest ones."""
        self.directory, self.keep = directory.absolute(), keep
        self.kept_for_good: set[int] = set()  # steps: the last ones of a ladder's rungs
        if keep is None and not self.directory.is_dir():
            raise UserError(f"{directory}: no checkpoints here; is {directory.parent} the directory of a training run?")

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:  # made when needed, since it makes the directory
        try:
            return ocp.training.Checkpointer(
                self.directory,
                preservation_policy=_Keep(self),
                cleanup_tmp_directories=self.keep is not None,
            )
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be opened ({error.strerror})") from None

    @property
    def steps(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def choose(self, step: int | None) -> int:
        """The given step, or the newest; UserError where there is none."""
        if not self.steps:
            raise UserError(f"{self.directory}: holds no finished checkpoint; train first")
        if step is not None and step not in self.steps:
            raise UserError(f"--step={step}: {self.directory} holds the steps {', '.join(map(str, self.steps))}")
        return self.steps[-1] if step is None else step

    def save(self, step: int, state: Any, data: Any, tokenizer: Tokenizer, record: Record) -> None:
        """Saves in the background, once the arrays are copied. Waits for the save before, and raises its error.

        Args:
          step: number of the checkpoint; one already there is left alone.
          state: a tree of arrays.
          data: the training iterator; its position is saved, one file a process.
          tokenizer: what made the tokens.
          record: the rest.
        """
        if step in self.steps:
            return
        items = {"state": state, "data": data, "tokenizer": {"json": tokenizer.to_json()}}
        with self._writing(), _storage(state), jax.transfer_guard("allow"):  # copying to the host is what a save is
            self._checkpointer.save_checkpointables_async(
                step, items, force=True, custom_metadata=dataclasses.asdict(record)
            )

    def record(self, step: int) -> Record:
        try:
            return Record(**self._metadata(step).custom_metadata)
        except TypeError:
            raise UserError(f"{self.directory / str(step)}: not a checkpoint of tokenformer_jax") from None

    def tokenizer(self, step: int) -> Tokenizer:
        return tokenizer_from_json(self._load(step, "tokenizer", None)["json"])

    def restore_data(self, step: int, data: Any) -> None:
        """Sets a training iterator to the saved position: one number, the same on all processes that saved it.

        Orbax's own reader asks for as many processes as there were then.
        """
        try:
            path, *_ = sorted((self.directory / str(step) / "data").glob("process_*.json"))
            data.set_state(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(step, "data", error) from error

    def restore(self, step: int, abstract: Any, padded: bool = False) -> Any:
        """The saved state, in the shapes, dtypes and shardings of `abstract`, a tree of ShapeDtypeStructs.

        `abstract` may be a part of what was saved, in nested dicts. With `padded` its arrays may be larger than those
        that were saved, and are filled up with zeros. Raises a UserError that names the first array that is missing or
        differs in shape or dtype.
        """
        saved = self._metadata(step).metadata
        if saved is None:  # Orbax only warns of what it could not read; reading it raises the reason
            return self._load(step, "state", abstract)
        saved, sizes = _by_name(saved), []
        for name, wanted in _by_name(abstract).items():
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
            sizes.append(math.prod(found.shape) * found.dtype.itemsize)
        context = ocp.Context()
        context.memory.read_concurrent_bytes = _in_flight(sizes)
        context.pytree.loading.partial_load = True
        context.array.loading.enable_padding_and_truncation = padded  # nothing is truncated: shapes were compared
        leaves, tree = jax.tree.flatten(abstract)
        for part in _parts([math.prod(leaf.shape) for leaf in leaves]):
            some = jax.tree.unflatten(tree, [leaf if i in part else None for i, leaf in enumerate(leaves)])
            with context:
                read = jax.tree.leaves(jax.block_until_ready(self._load(step, "state", some)))
            leaves[part.start : part.stop] = read
            _give_back()
        return jax.tree.unflatten(tree, leaves)

    def _load(self, step: int, item: str, abstract: Any) -> Any:
        try:
            return self._checkpointer.load_checkpointables(step, {item: abstract})[item]
        except Exception as error:
            raise self._unreadable(step, item, error) from error

    def _metadata(self, step: int) -> Any:
        try:
            return ocp.metadata(self.directory / str(step), "state")
        except Exception as error:
            raise self._unreadable(step, "state", error) from error

    def _unreadable(self, step: int, item: str, error: Exception) -> DamagedError:
        others = [str(s) for s in self.steps if s != step]
        instead = f"; there is also step {' and '.join(others)}" if others else ""
        return DamagedError(f"{self.directory / str(step)}: {item} cannot be read ({_reason(error)}){instead}")

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a checkpoint out of the way, and tells where to."""
        aside = self.directory.with_name("damaged_checkpoints") / f"{step}_{int(time.time())}"
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            os.replace(self.directory / str(step), aside)
        multihost_utils.sync_global_devices("set aside")
        self._checkpointer.reload()
        return aside

    def wait(self) -> None:
        """Blocks until what is being saved is safe; raises its error."""
        with self._writing():
            self._checkpointer.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorStore tells of a full disk by a ValueError
            raise UserError(f"{self.directory}: a checkpoint cannot be written ({_reason(error)})") from error

    def close(self) -> None:
        if self.directory.is_dir():
            self._checkpointer.close()


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


def _give_back() -> None:
    """Returns memory to the system: Orbax's reading leaves cycles that hold what it read, glibc keeps small pieces."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


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
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].split(" [tensorstore_spec")[0]


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves by their path, which is the same for a NamedTuple and for the dict that Orbax makes of it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


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
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir(parents=True)
        multihost_utils.sync_global_devices("workdir begun")
        checkpoints = Checkpoints(partial / "checkpoints", keep=1)
        checkpoints.save(step, *items)
        checkpoints.wait()
        checkpoints.close()
        texts = files()
        if first:
            for name, text in texts.items():
                replace_file(partial / name, text)
            os.replace(partial, workdir)
        multihost_utils.sync_global_devices("workdir made")
    except OSError as error:
        raise UserError(f"{workdir}: cannot be written ({error.strerror or error})") from None
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
