"""Batches of images: shuffled by grain, read by all cores, and augmented by seed and number alone.

What a device does faster than a host (all but decoding and cropping) it does within the training step.
"""

import concurrent.futures
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from tokenformer_jax.config import Config
from tokenformer_jax.data.batches import process_rows
from tokenformer_jax.data.images import ImageSplit, as_array


class ImageBatch(NamedTuple):
    """Rows of a global batch. A damaged image, and what fills up an evaluation's last batch, has weight 0."""

    images_BHWC: np.ndarray  # uint8; floats in about [-1, 1] once they are augmented
    targets: np.ndarray  # int32 labels [B, 1], or float32 probabilities of the classes [B, V]
    weights_BL: np.ndarray  # float32 [B, 1]: 1 for an image that counts


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """Reads images of a split on all cores; each damaged one is named once."""

    split: ImageSplit
    cfg: Config
    damaged: set[int] = dataclasses.field(default_factory=set)
    pool: Any = dataclasses.field(default_factory=lambda: concurrent.futures.ThreadPoolExecutor(os.cpu_count()))

    def batch(self, numbers: Sequence[int], examples: Sequence[int] | None = None) -> ImageBatch:
        """Images by number, -1 for none; random crops of `examples`, numbers in the order of training."""
        model = self.cfg.model
        shape = model.image_size, model.image_size, model.image_channels
        images_BHWC = np.zeros((len(numbers), *shape), np.uint8)
        labels_B, weights_B = np.zeros(len(numbers), np.int32), np.zeros(len(numbers), np.float32)

        def read(row: int) -> None:
            number, augment = numbers[row], self.cfg.augment
            if number < 0:
                return
            try:
                crop, rng = 0.0, None
                if examples is not None and augment.smallest_crop:
                    crop, rng = augment.smallest_crop, np.random.default_rng((self.cfg.seed, examples[row]))
                item, labels_B[row] = self.split.read(number)
                images_BHWC[row] = as_array(item, *shape[1:], crop, rng, augment.center)
                weights_B[row] = 1
            except (OSError, ValueError, SyntaxError) as error:  # PIL's PNG reader raises the last
                self.name_damaged(number, error)

        list(self.pool.map(read, range(len(numbers))))
        return ImageBatch(images_BHWC, labels_B[:, None], weights_B[:, None])

    def name_damaged(self, number: int, error: Exception) -> None:
        if number not in self.damaged:
            self.damaged.add(number)
            print(f"warning: {self.split.name(number)}: is damaged, and skipped ({error})", file=sys.stderr)


def train_batches(
    split: ImageSplit, cfg: Config, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless batches of all images, shuffled anew in each epoch by cfg.seed; as `batches.train_batches`."""
    rows = process_rows(cfg.batch_size, process_index, process_count)
    order, reader = shuffled(split, cfg), Reader(split, cfg)

    def read(step: int) -> ImageBatch:
        examples = [step * cfg.batch_size + row for row in rows]
        return reader.batch([order[example] for example in examples], examples)

    steps = grain.MapDataset.range(sys.maxsize // cfg.batch_size).map(read)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def shuffled(split: ImageSplit, cfg: Config) -> grain.MapDataset:
    """The images of training in their order."""
    return grain.MapDataset.range(len(split)).seed(cfg.seed % 2**32).shuffle().repeat()


def data_identity(split: ImageSplit, cfg: Config) -> str:
    """What the position in the data refers to."""
    return f"images {split.fingerprint} with seed {cfg.seed}"


@dataclasses.dataclass(frozen=True, eq=False)
class EvalImages(Sequence[ImageBatch]):
    """Chosen images of a split, in order. The last batch is filled up."""

    reader: Reader
    numbers: np.ndarray
    batch_size: int
    rows: range  # of this process

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        first = range(len(self))[index] * self.batch_size
        wanted = [first + row for row in self.rows]
        return self.reader.batch([int(self.numbers[i]) if i < len(self.numbers) else -1 for i in wanted])


def eval_batches(
    split: ImageSplit,
    cfg: Config,
    batch_size: int,
    *,
    max_batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalImages:
    """Every image of the split once, or those of `max_batches` batches spread over it."""
    rows = process_rows(batch_size, process_index, process_count)
    chosen = min(len(split), max_batches * batch_size or len(split))
    return EvalImages(Reader(split, cfg), np.arange(chosen) * len(split) // chosen, batch_size, rows)
