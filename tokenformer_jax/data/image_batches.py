"""Batches of images: shuffled by grain, decoded and cropped in threads, each by the seed and its number alone.

What a device does faster than a host (all but that) is `augment`'s, within the training step.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from tokenformer_jax.config import Config
from tokenformer_jax.data.batches import process_rows
from tokenformer_jax.data.pictures import Pictures
from tokenformer_jax.errors import shown


class ImageBatch(NamedTuple):
    """Rows of a global batch. A damaged image, and what fills up an evaluation's last batch, has weight 0."""

    images_BHWC: np.ndarray  # uint8; floats in about [-1, 1] once they are augmented
    targets: np.ndarray  # int32 labels [B, 1], or float32 probabilities of the classes [B, V]
    weights_BL: np.ndarray  # float32 [B, 1]: 1 for an image that counts


def as_batch(images_BHWC: np.ndarray, labels_B: np.ndarray) -> ImageBatch:
    """What `Pictures.read` gives as a batch."""
    labels_B1 = labels_B[:, None]
    return ImageBatch(images_BHWC, np.maximum(labels_B1, 0), (labels_B1 >= 0).astype(np.float32))


def train_batches(
    split: Pictures, cfg: Config, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Endless batches of all images, shuffled anew in each epoch by cfg.seed; as `batches.train_batches`."""
    rows, read = process_rows(cfg.batch_size, process_index, process_count), reader(split, cfg)
    steps = grain.MapDataset.range(sys.maxsize // cfg.batch_size)
    steps = steps.map(lambda step: read([step * cfg.batch_size + row for row in rows]))
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def reader(split: Pictures, cfg: Config) -> Callable[[Sequence[int]], ImageBatch]:
    """What reads images by their number in the order of training, -1 for none, with their crops."""
    order, crop = shuffled(split, cfg), cfg.augment.smallest_crop

    def read(examples: Sequence[int]) -> ImageBatch:
        rngs = [np.random.default_rng((cfg.seed, max(example, 0))) for example in examples] if crop else None
        return as_batch(*split.read([order[example] if example >= 0 else -1 for example in examples], rngs, crop))

    return read


def training_examples(
    split: Pictures, cfg: Config, examples: Sequence[int], *, process_index: int = 0, process_count: int = 1
) -> Iterator[tuple[ImageBatch, str]]:
    """Each in a batch whose other rows are padding, and its name and class."""
    rows, order = process_rows(cfg.batch_size, process_index, process_count), shuffled(split, cfg)
    read = reader(split, cfg)
    for example in examples:
        batch, number = read([-1 if row else example for row in rows]), order[example]
        [(_, label)] = split.items([number])
        yield batch, f"{shown(split.name(number))} (is {shown(split.class_names[label])})"


def shuffled(split: Pictures, cfg: Config) -> grain.MapDataset:
    """The images of training in their order."""
    return grain.MapDataset.range(len(split)).seed(cfg.seed % 2**32).shuffle().repeat()


def data_identity(split: Pictures, cfg: Config) -> str:
    """What the position in the data refers to."""
    return f"images {split.fingerprint} with seed {cfg.seed}"


@dataclasses.dataclass(frozen=True, eq=False)
class EvalImages(Sequence[ImageBatch]):
    """Chosen images of a split, in order. The last batch is filled up."""

    split: Pictures
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
        return as_batch(*self.split.read([int(self.numbers[i]) if i < len(self.numbers) else -1 for i in wanted]))


def eval_batches(
    split: Pictures, batch_size: int, *, max_batches: int = 0, process_index: int = 0, process_count: int = 1
) -> EvalImages:
    """Every image of the split once, or those of `max_batches` batches spread over it."""
    rows = process_rows(batch_size, process_index, process_count)
    chosen = min(len(split), max_batches * batch_size or len(split))
    return EvalImages(split, np.arange(chosen) * len(split) // chosen, batch_size, rows)
