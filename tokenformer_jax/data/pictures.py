"""Pictures with labels: folders with one subfolder per class, and image sets of TensorFlow Datasets, as uint8 arrays.

Files are opened as JPEG, PNG or WebP alone, whatever they are called, and decoded in threads.
"""

import dataclasses
import functools
import hashlib
import io
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tokenformer_jax.data.published import cause, open_builder, open_split
from tokenformer_jax.data.workers import cores
from tokenformer_jax.devices.distributed import this_pod
from tokenformer_jax.errors import UserError, listed, shown
from tokenformer_jax.files import local_path

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
KINDS = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
FORMATS = ("JPEG", "PNG", "WEBP")  # PIL's decoders; of all others none is ever started
# Of a picture: 8192 x 8192, which takes 200 MB to decode. A file of few bytes may claim any number.
MOST_PIXELS = 1 << 26
ENOUGH = 2  # a JPEG is decoded at a half, quarter or eighth where a crop keeps this many times the pixels wanted
VALIDATION_PART = 20  # one picture of so many of each class, where a folder has no splits
SAY = 20  # damaged pictures that are named
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a split, by number.

    Attributes:
      num_images: how many there are, damaged ones included: that they are shows when they are read.
      class_names: the classes, by label.
      fingerprint: changes where other pictures, or others labels of them, are read.
      size: pixels of a side of what `read` returns.
      items: numbers -> what each picture is (a path, bytes of a file or a uint8 array) and its label.
      name: number -> what a damaged picture is called.
      channels: 3 (RGB) or 1 (gray).
      center: part of the shorter side that is seen where no crop is drawn.
      damaged: number -> why it cannot be read, of those that were read so far.
    """

    num_images: int
    class_names: list[str]
    fingerprint: str
    size: int
    items: Callable[[Sequence[int]], list[tuple[Any, int]]]
    name: Callable[[int], str]
    channels: int = 3
    center: float = 1.0
    damaged: dict[int, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return self.num_images

    def read(
        self, indices: Sequence[int], rngs: Sequence[np.random.Generator] | None = None, smallest_crop: float = 0.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pictures by number, in any order; -1 for none.

        Args:
          indices: B numbers.
          rngs: for random crops, which are cheaper and sharper while a photo is decoded: a generator for each row.
          smallest_crop: part of a picture's area that its crop has at least; 0: the center.

        Returns:
          uint8 [B, size, size, C], and int32 labels [B]: -1, and a black picture, for none and for a damaged one.
        """
        images_BHWC = np.zeros((len(indices), self.size, self.size, self.channels), np.uint8)
        labels_B = np.full(len(indices), -1, np.int32)
        rows = [row for row, number in enumerate(indices) if number >= 0]
        items = self.items([int(indices[row]) for row in rows])

        def read_row(row: int, item: Any, label: int) -> None:
            def choose(shape: tuple[int, int]) -> Box:
                if rngs is None or not smallest_crop:
                    return center_box(shape, self.center)
                return random_box(shape, smallest_crop, rngs[row])

            try:
                images_BHWC[row] = decode(item, self.size, self.channels, choose)
                labels_B[row] = label
            except Exception as error:  # of a damaged file PIL raises OSError, SyntaxError, ValueError, IndexError, …
                self._name_damaged(int(indices[row]), cause(error))

        list(pool().map(read_row, rows, *zip(*items, strict=True))) if items else None
        return images_BHWC, labels_B

    def _name_damaged(self, number: int, why: str) -> None:
        if number in self.damaged:
            return
        self.damaged[number] = why
        if len(self.damaged) <= SAY:
            more = "; more are not named" if len(self.damaged) == SAY else ""
            print(f"warning: {shown(self.name(number))}: skipped ({shown(why)}){more}", file=sys.stderr)


@functools.cache
def pool() -> ThreadPoolExecutor:
    """PIL decodes and resizes without Python's lock."""
    return ThreadPoolExecutor(cores())


def need_pil() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UserError("pictures need the package pillow; use pip install pillow") from None


# One picture.


def decode(item: Any, size: int, channels: int, choose: Callable[[tuple[int, int]], Box]) -> np.ndarray:
    """A part of a picture as uint8 [size, size, channels].

    Args:
      item: a path, the bytes of a file, or a uint8 array [H, W] or [H, W, C].
      size: pixels of a side.
      channels: 1 or 3.
      choose: (width, height) of the picture, upright -> the part.

    Raises:
      Exception: of whatever kind, where it is damaged or has more than MOST_PIXELS.
    """
    from PIL import ExifTags, Image, ImageOps

    mode, factor = {1: "L", 3: "RGB"}[channels], 1.0
    if isinstance(item, np.ndarray):
        array = item[:, :, 0] if item.ndim == 3 and item.shape[2] == 1 else item
        image = Image.fromarray(array)
        box = choose(image.size)
    else:
        image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item, formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels; {MOST_PIXELS:,} are the most")
        is_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        box = choose((height, width) if is_on_its_side else (width, height))
        scale = min(1.0, ENOUGH * size / min(box[2] - box[0], box[3] - box[1]))
        drafted: Any = image.draft(mode, (math.ceil(width * scale), math.ceil(height * scale)))
        factor = drafted[1][2] / width if drafted else 1.0
        image = ImageOps.exif_transpose(image)
    image = in_mode(image, mode)
    edges: Any = tuple(min(edge * factor, image.size[i % 2]) for i, edge in enumerate(box))
    image = image.resize((size, size), Image.Resampling.BICUBIC, edges)
    return np.asarray(image).reshape(size, size, channels)


def in_mode(image: Any, mode: str) -> Any:
    """A PIL image as RGB or L: of 16 bits the upper eight, and white behind what is transparent."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def center_box(shape: tuple[int, int], part: float) -> Box:
    """The square in the middle of (width, height) whose side is this part of the shorter one's.

    With 224 / 256 this is what resizing the shorter side to 256 and cropping the middle 224 see.
    """
    width, height = shape
    side = min(shape) * part
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(shape: tuple[int, int], smallest: float, rng: np.random.Generator) -> Box:
    """A box of at least this part of the area, between 3 : 4 and 4 : 3; the center where ten tries find none."""
    width, height = shape
    for _ in range(10):
        area = width * height * rng.uniform(smallest, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return center_box(shape, 1.0)


# Folders.


def open_folder(
    path: str,
    size: int,
    splits: tuple[str, str] = ("train", "validation"),
    *,
    channels: int = 3,
    center: float = 1.0,
    seed: int = 0,
) -> list[Pictures]:
    """Pictures to train and to validate on, of a folder with one subfolder per class, or with such folders as splits.

    Where there is none for validation, one picture of 20 of each class is, by a hash of its name and the seed. Files
    that are no pictures by their endings are named.

    Args:
      splits: the names of their folders; val does for validation.

    Raises:
      UserError: there is no such split, no pictures in it, or of one class alone.
    """
    need_pil()
    key = f"data.path = {path!r}"
    root = local_path(path, "data.path", any_bytes=True)
    if not root.is_dir():
        raise UserError(
            f"{key}: {'is a file' if root.is_file() else 'not found'}; use a folder of one subfolder per class"
        )
    train, held_out = folders_of(root, splits)
    names, skipped = files_below(train, key)
    class_names = sorted({class_of(name) for name in names})
    if not names:
        raise UserError(
            f"{key}: no pictures in subfolders of {shown(train)}; use one subfolder per class, of {KINDS} files"
        )
    if len(class_names) < 2:
        raise UserError(f"{key}: all pictures are of one class, {class_names[0]!r}; use one subfolder per class")
    if held_out is None:
        chosen = held_out_of(names, seed)
        each = [(train, [name for name in names if name not in chosen]), (train, sorted(chosen))]
    else:
        others, more = files_below(held_out, key)
        each, skipped = [(train, names), (held_out, others)], sorted({*skipped, *more})
        if unknown := sorted({class_of(name) for name in others} - set(class_names)):
            raise UserError(
                f"{key}: {held_out.name} has a class {unknown[0]!r}, which {train.name} has not; use the same classes"
            )
    if skipped and not this_pod().index:
        some = listed([shown(os.path.relpath(name, root)) for name in skipped])
        print(f"warning: {key}: skipped {len(skipped)} files, not {KINDS}: {some}", file=sys.stderr)

    numbers = {name: label for label, name in enumerate(class_names)}

    def pictures(split: str, folder: pathlib.Path, names: list[str]) -> Pictures:
        if not names:
            raise UserError(f"{key}: no pictures for {split}; use two pictures or more of a class")
        labels = [numbers[class_of(name)] for name in names]
        content = hashlib.sha256(b"\0".join(map(os.fsencode, [*class_names, "", *names]))).hexdigest()[:16]
        paths = [os.path.join(folder, name) for name in names]

        def items(numbers: Sequence[int]) -> list[tuple[Any, int]]:
            return [(paths[number], labels[number]) for number in numbers]

        return Pictures(len(names), class_names, content, size, items, paths.__getitem__, channels, center)

    return [pictures(split, *where) for split, where in zip(("training", "validation"), each, strict=True)]


def folders_of(root: pathlib.Path, splits: tuple[str, str]) -> tuple[pathlib.Path, pathlib.Path | None]:
    """The folders to train on and to validate on: all of it, and none, where it has no splits.

    Raises:
      UserError: it has not the split that is named.
    """
    there = sorted(name for name in next(os.walk(root), ("", [], []))[1] if not name.startswith("."))
    names = [("val" if split == "validation" and split not in there else split) for split in splits]
    is_there = [name in there for name in names]
    for key, split, found in zip(("train", "validation"), splits, is_there, strict=True):
        if not found and (split != key or (key == "train" and any(is_there))):
            or_none = f", or {key!r} where these are classes" * (split != key)
            raise UserError(
                f"data.{key}_split = {split!r}: {shown(root)} has no such folder, but "
                f"{listed(list(map(shown, there))) or 'none at all'}; use one of these{or_none}"
            )
    others = [shown(name) for name in there if name != names[0]]
    if is_there == [True, False] and others and not this_pod().index:
        print(
            f"warning: {shown(root)} has no folder {splits[1]!r}, so a part of {names[0]!r} is for validation, and "
            f"{listed(others)} for nothing; if that is wrong, use data.validation_split",
            file=sys.stderr,
        )
    train, held_out = (root / name if found else None for name, found in zip(names, is_there, strict=True))
    return train or root, held_out


def class_of(name: str) -> str:
    return name.split("/", 1)[0]


def files_below(root: pathlib.Path, key: str) -> tuple[list[str], list[str]]:
    """Pictures in the subfolders of a folder, as paths below it, and paths of other files; hidden ones are left out."""

    def fail(error: OSError) -> None:
        raise UserError(f"{key}: {shown(error.filename)} cannot be listed ({error.strerror})")

    pictures: list[str] = []
    others: list[str] = []
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:  # links in a circle end
            folders.clear()
            continue
        seen.add(real)
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in files:
            if not name.startswith("."):
                if inside != "." and name.lower().endswith(ENDINGS):
                    pictures.append(f"{inside}/{name}")
                else:
                    others.append(os.path.join(folder, name))
    return sorted(pictures), sorted(others)


def held_out_of(names: Iterable[str], seed: int) -> set[str]:
    """For validation: of each class one picture of VALIDATION_PART, and at least one, but not its only one."""

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{seed} ".encode() + os.fsencode(name)).digest()

    of_class: dict[str, list[str]] = {}
    for name in names:
        of_class.setdefault(class_of(name), []).append(name)
    counts = {label: min(len(own) - 1, max(1, len(own) // VALIDATION_PART)) for label, own in of_class.items()}
    return {name for label, own in of_class.items() for name in sorted(own, key=place)[: counts[label]]}


# Published sets.


def open_published(
    name: str,
    size: int,
    splits: tuple[str, str] = ("train", "validation"),
    data_dir: str | None = None,
    *,
    channels: int = 3,
    center: float = 1.0,
) -> list[Pictures]:
    """Pictures to train and to validate on, of a set of TensorFlow Datasets, such as "imagenet2012" or "cifar10".

    TensorFlow is not needed.

    Raises:
      UserError: it cannot be loaded, has no pictures with labels, or has not the split that is named.
    """
    need_pil()
    import tensorflow_datasets as tfds

    folder = str(local_path(data_dir, "data.path").resolve()) if data_dir else None
    builder = open_builder(name, folder, "image_folder")
    features: Any = builder.info.features
    image = next((key for key, kind in features.items() if is_picture(kind)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)), None)
    if image is None or label is None:
        raise UserError(f"data.dataset = {name!r}: has no pictures with labels, but {', '.join(features)}; use another")
    images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
    skip = {key: tfds.decode.SkipDecoding() for key in images}  # also of masks and the like, which nobody reads

    def pictures(split: str, key: str) -> Pictures:
        source = open_split(builder, split, key, decoders=skip)
        content = f"{builder.info.full_name} {split} {len(source)} {builder.info.dataset_size}"

        def items(numbers: Sequence[int]) -> list[tuple[Any, int]]:
            return [(record[image], int(record[label])) for record in source.__getitems__(numbers)]

        return Pictures(
            len(source),
            list(features[label].names),
            hashlib.sha256(content.encode()).hexdigest()[:16],
            size,
            items,
            lambda number: f"{name}, {split}, picture {number}",
            channels,
            center,
        )

    return [pictures(split, f"data.{key}_split") for split, key in zip(splits, ("train", "validation"), strict=True)]


def is_picture(kind: Any) -> bool:
    """Whether a feature of a set is a picture."""
    import tensorflow_datasets as tfds

    if isinstance(kind, tfds.features.Image):
        return True
    return type(kind) is tfds.features.Tensor and len(kind.shape) in (2, 3) and kind.np_dtype == np.uint8
