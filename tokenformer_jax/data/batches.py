"""Batches of a corpus: windows of the context's length, shuffled and sharded by grain.

Window i reads L + 1 ids of the stream from i * L on, so that every token but the first is predicted exactly once.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from tokenformer_jax.config import Config
from tokenformer_jax.data.tokens import TokenSplit, check_length
from tokenformer_jax.errors import UserError


class Batch(NamedTuple):
    """Rows of a global batch. B: rows of this process, L: context length.

    A row starts within segment 1; every end-of-text token after its first position opens the next one, for itself and
    the document that follows it. Padding has weight 0, segment 0 and token 0.
    """

    tokens_BL: np.ndarray  # int32
    targets_BL: np.ndarray  # int32: the next token of each
    weights_BL: np.ndarray  # float32: 1 for a target to be learnt, 0 for padding
    segments_BL: np.ndarray  # int32


def train_batches(
    split: TokenSplit, cfg: Config, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless batches of all whole windows, shuffled anew in each epoch by cfg.seed.

    Each process gets its consecutive rows of the same global batches, whatever `process_count` is. The iterator's
    state is one number, its step.

    Raises:
      UserError: batch_size does not divide by the processes, or the split is shorter than a window.
    """
    length, batch_size = cfg.model.context_length, cfg.batch_size
    rows = process_rows(batch_size, process_index, process_count)
    windows = _shuffled_windows(split, cfg)

    def read(step: int) -> Batch:
        numbers = [windows[step * batch_size + row] for row in rows]
        if not split.parts:
            return _read_windows(split, numbers, length)
        for i, part in enumerate(split.parts):
            part.split.prefetch(_ranges(part.split, [window for number, window in numbers if number == i], length))
        each = [_read_windows(split.parts[part].split, [window], length) for part, window in numbers]
        return Batch(*map(np.concatenate, zip(*each, strict=True)))

    steps = grain.MapDataset.range(sys.maxsize // batch_size).map(read)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def _shuffled_windows(split: TokenSplit, cfg: Config) -> grain.MapDataset:
    """The examples of training in their order: which window each reads, of a mixture after which part."""
    if split.parts:
        orders = []
        for i, part in enumerate(split.parts):
            own = dataclasses.replace(cfg, seed=cfg.seed + i)
            orders.append(_shuffled_windows(part.split, own).map(functools.partial(_pair, i)))
        return grain.MapDataset.mix(orders, [part.weight for part in split.parts])
    check_length(split, "data.train_split", cfg.model.context_length)
    num_windows = (split.num_tokens - 1) // cfg.model.context_length
    return grain.MapDataset.range(num_windows).seed(cfg.seed % 2**32).shuffle().repeat()


def _pair(part: int, window: int) -> tuple[int, int]:
    return part, window


def data_identity(split: TokenSplit, cfg: Config) -> str:
    """What the position in the data refers to: the tokens, and the order in which they are read."""
    return f"tokens {split.fingerprint} in windows of {cfg.model.context_length} with seed {cfg.seed}"


def keep_position(batches: grain.DatasetIterator, saved_batch_size: int, batch_size: int) -> None:
    """Moves an iterator whose state was saved with another batch size to the same example, or just after it."""
    if saved_batch_size != batch_size:
        examples = batches.get_state()["next_index"] * saved_batch_size
        batches.set_state({"next_index": -(-examples // batch_size)})


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches(Sequence[Batch]):
    """Chosen windows of a split, in order. The last batch is filled up with padding."""

    split: TokenSplit
    windows: np.ndarray
    batch_size: int
    context_length: int
    rows: range  # of this process
    stride: int = 0  # from a window's beginning to that of the next; 0: the context's length

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        first = range(len(self))[index] * self.batch_size
        beyond = self.split.num_tokens  # no window has so high a number: it reads as padding
        windows = [self.windows[i] if i < len(self.windows) else beyond for i in (first + row for row in self.rows)]
        return _read_windows(self.split, windows, self.context_length, self.stride)


def eval_batches(
    split: TokenSplit,
    batch_size: int,
    context_length: int,
    *,
    max_batches: int = 0,
    stride: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Predicts every token of the split but the first once, or those of `max_batches` batches spread over it.

    All batches have one shape, and all processes the same number of them. With a stride windows overlap: each but the
    first predicts its last `stride` tokens, from `context_length - stride` tokens before them at least.

    Raises:
      UserError: batch_size does not divide by the processes.
    """
    rows = process_rows(batch_size, process_index, process_count)
    stride = stride or context_length
    count = 1 + max(0, -(-(split.num_tokens - 1 - context_length) // stride))
    chosen = min(count, max_batches * batch_size or count)
    return EvalBatches(split, np.arange(chosen) * count // chosen, batch_size, context_length, rows, stride)


def training_examples(
    split: TokenSplit, cfg: Config, examples: Sequence[int], *, process_index: int = 0, process_count: int = 1
) -> list[Batch]:
    """Examples by their number in the order of training, each in a batch whose other rows are padding."""
    order, batch_size = _shuffled_windows(split, cfg), cfg.batch_size
    rows = process_rows(batch_size, process_index, process_count)
    batches = []
    for example in examples:
        part, window = order[example] if split.parts else (0, order[example])
        of = split.parts[part].split if split.parts else split
        batches.append(EvalBatches(of, np.array([window]), batch_size, cfg.model.context_length, rows)[0])
    return batches


def process_rows(batch_size: int, process_index: int, process_count: int) -> range:
    if batch_size % process_count:
        near = -(-batch_size // process_count) * process_count
        raise UserError(f"batch_size = {batch_size}: must divide by the {process_count} processes; use {near}")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _ranges(split: TokenSplit, windows: Sequence[int], length: int, stride: int = 0) -> list[tuple[int, int]]:
    """The tokens of windows, by number."""
    begins = np.minimum(np.asarray(windows, np.int64) * (stride or length), split.num_tokens).tolist()
    return [(begin, min(begin + length + 1, split.num_tokens)) for begin in begins]


def _read_windows(split: TokenSplit, windows: Sequence[int], length: int, stride: int = 0) -> Batch:
    """Gathers windows, by number; what lies beyond the split's end is padding."""
    stride = stride or length
    ranges = _ranges(split, windows, length, stride)
    split.prefetch(ranges)
    begins = np.array([begin for begin, _ in ranges])
    ids = np.zeros((len(begins), length + 1), np.int32)
    for row, place in zip(ids, ranges, strict=True):
        found = split.read(*place)
        row[: len(found)] = found
    # A token is read when the next one, its target, exists; it counts unless the window before predicted that.
    real = begins[:, None] + np.arange(1, length + 1) < split.num_tokens
    counts = real & ((begins == 0)[:, None] | (np.arange(length) >= length - stride))
    tokens, targets = ids[:, :-1] * real, ids[:, 1:] * real
    starts = tokens == split.end_of_text
    starts[:, 0] = True
    return Batch(tokens, targets, counts.astype(np.float32), np.cumsum(starts, axis=1, dtype=np.int32) * real)
