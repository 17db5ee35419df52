"""Pictures from folders and published sets: what each kind of file becomes, and what is said of the wrong ones."""

import functools
import io
import pathlib
import re
import struct
import zlib
from typing import Any

import matplotlib
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tokenformer_jax.data.pictures import center_box, decode, open_folder, open_published, random_box
from tokenformer_jax.errors import UserError

SIZE = 16


@functools.cache
def photo() -> Image.Image:
    """A portrait of 512 x 600 pixels that matplotlib brings along."""
    return Image.open(pathlib.Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def flat(color: Any, mode: str = "RGB", size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.new(mode, size, color)


def claim(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def write(path: pathlib.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_set(root: pathlib.Path, classes: str = "cat dog", each: int = 5) -> pathlib.Path:
    """Flat pictures, whose red says the class and whose green says the number."""
    for label, name in enumerate(classes.split()):
        for i in range(each):
            write(root / name / f"{i}.png", encoded(flat((50 * label, 10 * i, 0))))
    return root


def upright(item: Any, size: int = SIZE, channels: int = 3, part: float = 1.0) -> np.ndarray:
    return decode(item, size, channels, lambda shape: center_box(shape, part))


def test_a_folder_of_classes(tmp_path):
    found, _ = open_folder(str(write_set(tmp_path / "set", "dog cat", 6)), SIZE)
    assert found.class_names == ["cat", "dog"] and len(found) == found.num_images == 10
    images, labels = found.read(range(10))
    assert images.shape == (10, SIZE, SIZE, 3) and images.dtype == np.uint8 and labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [0] * 5 + [1] * 5)
    np.testing.assert_array_equal(images[..., 0], np.broadcast_to(50 * (1 - labels[:, None, None]), images.shape[:3]))
    again, others = found.read([7, -1, 2])
    np.testing.assert_array_equal(again, [images[7], np.zeros_like(images[0]), images[2]])
    np.testing.assert_array_equal(others, [1, -1, 0])
    assert [len(x) for x in found.read([])] == [0, 0]


def test_a_folder_without_splits_is_split_by_seed(tmp_path):
    path = str(write_set(tmp_path / "set", each=45))
    names = {}
    for seed in (0, 0, 1):
        train, validation = open_folder(path, SIZE, seed=seed)
        assert (len(train), len(validation)) == (86, 4)  # 2 of 45 of each class
        own = [{x.name(i) for i in range(len(x))} for x in (train, validation)]
        assert not own[0] & own[1] and len(own[0] | own[1]) == 90
        assert names.setdefault(seed, own) == own
        assert train.fingerprint != validation.fingerprint
    assert names[0] != names[1]


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_a_folder_with_splits(tmp_path, name):
    splits = ("part", name) if name == "test" else ("train", "validation")
    write_set(tmp_path / splits[0], "a b c", 3)
    write_set(tmp_path / name, "a c", 2)
    train, validation = open_folder(str(tmp_path), SIZE, splits)
    assert (len(train), len(validation)) == (9, 4) and train.class_names == validation.class_names == ["a", "b", "c"]
    np.testing.assert_array_equal(validation.read(range(4))[1], [0, 0, 2, 2])
    write_set(tmp_path / name, "new", 1)
    with pytest.raises(UserError, match=f"{name} has a class 'new', which {splits[0]} has not"):
        open_folder(str(tmp_path), SIZE, splits)


def test_a_split_that_nothing_reads_is_said(tmp_path, capsys):
    write_set(tmp_path / "train", "a b", 3)
    assert len(open_folder(str(tmp_path), SIZE)[1]) == 2 and not capsys.readouterr().err
    write_set(tmp_path / "test", "a b", 2)
    assert len(open_folder(str(tmp_path), SIZE)[1]) == 2
    assert re.search("no folder 'validation', .* and test for nothing; .* use data.valid", capsys.readouterr().err)
    assert len(open_folder(str(tmp_path), SIZE, ("train", "test"))[1]) == 4 and not capsys.readouterr().err


@pytest.mark.parametrize("splits", [("a", "b"), ("train", "validation[:9]"), ("", "val"), ("..", "."), ("train", "b")])
def test_a_split_that_is_not_there(tmp_path, splits):
    for name in ("train", "val"):
        write_set(tmp_path / name, each=2)
    with pytest.raises(UserError) as error:
        open_folder(str(tmp_path), SIZE, splits)
    key, split = ("validation", splits[1]) if splits[0] == "train" else ("train", splits[0])
    expected = f"{tmp_path} has no such folder, but train, val; use one of these, or {key!r} where these are classes"
    assert str(error.value) == f"data.{key}_split = {split!r}: {expected}"
    (tmp_path / "train").rename(tmp_path / "training")
    with pytest.raises(
        UserError, match=r"data\.train_split = 'train': .* folder, but training, val; use one of these$"
    ):
        open_folder(str(tmp_path), SIZE)


def test_which_files_are_pictures(tmp_path, capsys):
    root = write_set(tmp_path / "set", each=2)
    for name in ("cat/A.JPG", "cat/b.Jpeg", "dog/deep/c.WEBP"):
        write(root / name, encoded(flat((9, 9, 9)), "WEBP" if name.endswith("WEBP") else "JPEG"))
    for name in ("cat/.hidden.png", ".git/x.png", "cat/notes.txt", "loose.png", "dog/._1.png"):
        write(root / name, encoded(flat(0)))
    (root / "dog" / "circle").symlink_to(root)
    found = open_folder(str(root), SIZE)
    names = {pathlib.Path(x.name(i)).relative_to(root).as_posix() for x in found for i in range(len(x))}
    assert names == {"cat/0.png", "cat/1.png", "cat/A.JPG", "cat/b.Jpeg", "dog/0.png", "dog/1.png", "dog/deep/c.WEBP"}
    (line,) = capsys.readouterr().err.splitlines()
    others = "skipped 2 files, not .jpg, .jpeg, .png or .webp: cat/notes.txt, loose.png"
    assert line == f"warning: data.path = {str(root)!r}: {others}"


def test_the_fingerprint_says_which_pictures(tmp_path):
    root = write_set(tmp_path / "set", each=4)
    before = open_folder(str(root), SIZE)[0].fingerprint
    assert open_folder(str(root), 2 * SIZE)[0].fingerprint == before
    (root / "cat").rename(root / "cow")
    assert open_folder(str(root), SIZE)[0].fingerprint != before


# What a file becomes.


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (encoded(flat(90, "L")), (90, 90, 90)),
        (encoded(flat(90, "L"), "JPEG"), (90, 90, 90)),
        (encoded(flat(1, "1")), (255, 255, 255)),
        (encoded(flat((90, 128), "LA")), (172, 172, 172)),  # half of white shines through
        (encoded(flat((200, 100, 0, 0), "RGBA")), (255, 255, 255)),
        (encoded(flat((200, 100, 0, 255), "RGBA"), "WEBP", lossless=True), (200, 100, 0)),
        (encoded(flat((200, 100, 0)).convert("P", palette=Image.Palette.ADAPTIVE)), (200, 100, 0)),
        (encoded(flat(0, "P"), transparency=0), (255, 255, 255)),
        (encoded(flat((0, 255, 255, 0), "CMYK"), "JPEG", quality=100), (254, 0, 0)),
        (encoded(Image.fromarray(np.full((20, 24), 0x5A80, np.uint16))), (0x5A, 0x5A, 0x5A)),
        (encoded(flat((200, 100, 0)), "JPEG", quality=100), (200, 100, 0)),
    ],
    ids="gray grayjpeg bits grayalpha clear opaque palette clearpalette cmyk sixteen rgb".split(),
)
def test_every_kind_becomes_rgb(item, expected):
    pixels = upright(item)
    assert pixels.shape == (SIZE, SIZE, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    gray = upright(item, channels=1)
    assert gray.shape == (SIZE, SIZE, 1)
    assert np.abs(gray.astype(int) - np.dot(expected, [0.299, 0.587, 0.114])).max() <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_pictures_are_turned_upright(form, orientation):
    whole = photo().resize((64, 96))
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encoded(whole.transpose(turns[orientation]), form, exif=exif, quality=95)
    apart = np.abs(upright(turned, 32, part=0.875).astype(int) - upright(encoded(whole), 32, part=0.875))
    assert apart.mean() < 3


def test_arrays_are_pictures():
    digits = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(upright(digits, 8, 1)[:, :, 0], digits)
    np.testing.assert_array_equal(upright(digits[:, :, None], 8, 3)[:, :, 1], digits)


@pytest.mark.parametrize("size", [32, 112])
def test_reduced_decoding_is_close_to_all_of_it(size):
    """Decoding a JPEG at a half or quarter is much faster; what differs is less than a JPEG loses."""
    item = encoded(photo(), "JPEG", quality=90)
    whole = Image.open(io.BytesIO(item)).resize((size, size), Image.Resampling.BICUBIC, center_box((512, 600), 0.875))
    ours, theirs = upright(item, size, part=0.875).astype(int), np.asarray(whole).astype(int)
    original = photo().resize((size, size), Image.Resampling.BICUBIC, center_box((512, 600), 0.875))
    assert 0 < np.abs(ours - theirs).mean() < 1.5
    assert np.abs(ours - np.asarray(original)).mean() < 2


def test_evaluation_sees_what_resizing_and_cropping_see():
    """The shorter side resized to 256 / 224 of the size, and its middle."""
    resized = photo().resize((128, 150), Image.Resampling.BICUBIC)
    middle = np.asarray(resized.crop((8, 19, 120, 131))).astype(int)
    assert np.abs(upright(encoded(photo()), 112, part=112 / 128) - middle).mean() < 1


def test_random_crops_are_drawn_by_their_generators(tmp_path):
    write(tmp_path / "a" / "0.jpg", encoded(photo(), "JPEG"))
    write(tmp_path / "a" / "1.jpg", encoded(photo(), "JPEG"))
    write(tmp_path / "b" / "0.jpg", encoded(photo(), "JPEG"))
    found, _ = open_folder(str(tmp_path), SIZE)

    def rngs(seed: int) -> list[np.random.Generator]:
        return [np.random.default_rng((seed, row)) for row in range(2)]

    first, again, other = (found.read([0, 0], rngs(seed), 0.08)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[0].astype(int) - first[1]).mean() > 5 and np.abs(first.astype(int) - other).mean() > 5
    boxes = np.array([random_box((500, 375), 0.08, np.random.default_rng(i)) for i in range(500)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 375
    assert 0.0799 < (sides.prod(1) / (500 * 375)).min() < 0.1 and np.ptp(np.log(sides[:, 0] / sides[:, 1])) < 0.58
    assert random_box((1000, 10), 0.9, np.random.default_rng(0)) == center_box((1000, 10), 1.0)


# Damage.

BOMB = claim(60_000, 60_000)


@pytest.mark.parametrize(
    "item",
    [
        b"",
        b"not a picture",
        encoded(flat(0), "JPEG")[:-200],
        encoded(photo().resize((64, 64)))[:3000],
        encoded(flat(0), "WEBP")[:20],
        claim(0, 0),
        BOMB,
        claim(9_000, 9_000),
        encoded(flat(0), "GIF"),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touched) print\n",
    ],
    ids="empty text jpeg png webp nothing bomb large gif postscript".split(),
)
def test_damaged_files_are_named_and_skipped(tmp_path, capsys, item):
    root = write_set(tmp_path / "set", each=2)
    write(root / "dog" / "bad.jpg", item)
    write(root / "dog" / "z.jpg", encoded(flat((50, 0, 0)), "JPEG"))
    found = open_folder(str(root), SIZE)
    labels = [found[0].read(range(len(found[0])))[1] for _ in range(2)] + [found[1].read(range(len(found[1])))[1]]
    bad = [x for x in found if any("bad.jpg" in x.name(i) for i in range(len(x)))]
    assert [len(x.damaged) for x in bad] == [1]
    assert sum(np.count_nonzero(x < 0) for x in labels[1:]) == 1
    said = capsys.readouterr().err.strip().split("\n")
    assert len(said) == 1 and said[0].startswith("warning: ") and "bad.jpg: skipped (" in said[0]


def test_a_bomb_is_not_decoded():
    with pytest.raises(ValueError, match="9000 x 9000 pixels; 67,108,864 are the most"):
        upright(claim(9_000, 9_000))


def test_many_damaged_files_are_counted(tmp_path, capsys):
    root = write_set(tmp_path / "set", each=2)
    for i in range(60):
        write(root / "cat" / f"bad{i}.png", b"x")
    found, _ = open_folder(str(root), SIZE)
    found.read(range(len(found)))
    assert len(found.damaged) > 50
    said = capsys.readouterr().err.strip().split("\n")
    assert len(said) == 20 and said[-1].endswith("more are not named")


def test_no_line_of_a_name_is_printed_raw(tmp_path, capsys):
    root = write_set(tmp_path / "set", each=2)
    for i in range(30):
        write(root / "cat" / f"two\nlines{i}.png", b"x")
    found, _ = open_folder(str(root), SIZE)
    found.read(range(len(found)))
    assert all(line.startswith("warning: ") for line in capsys.readouterr().err.strip().split("\n"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"data\.path = '.*': no pictures in subfolders of .*; use one subfolder per class, of \.jpg"),
        (["a.png", "b.png"], "no pictures in subfolders"),
        (["cat/notes.txt", "dog/b.gif"], "no pictures in subfolders"),
        (["cat/a.png", "cat/b.png"], "all pictures are of one class, 'cat'; use one subfolder per class"),
        (["cat/a.png", "dog/b.png"], "no pictures for validation; use two pictures or more of a class"),
    ],
)
def test_wrong_folders(tmp_path, files, message):
    (tmp_path / "set").mkdir()
    for name in files:
        write(tmp_path / "set" / name, encoded(flat(0)))
    with pytest.raises(UserError, match=message) as error:
        open_folder(str(tmp_path / "set"), SIZE)
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path, monkeypatch):
    write(tmp_path / "file.png", b"")
    for name, what in (("nowhere", "not found"), ("file.png", "is a file")):
        with pytest.raises(UserError, match=f"{what}; use a folder of one subfolder per class"):
            open_folder(str(tmp_path / name), SIZE)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(UserError, match=r"use pip install pillow"):
        open_folder(str(tmp_path), SIZE)


# Published sets.


def prepare_set(folder: pathlib.Path, name: str, features: dict[str, Any], splits: dict[str, Any]) -> str:
    """Writes examples as the tfds set `name` into a folder."""
    tfds.disable_progress_bar()

    class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # there are no download checksums beside this file to look for

        def _info(self) -> tfds.core.DatasetInfo:
            all_of_them = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=all_of_them, disable_shuffling=True)

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: iter(enumerate(examples)) for split, examples in splits.items()}

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # abstract in tfds; the splits are generators already

    Set.name = name
    Set(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


LABEL = tfds.features.ClassLabel(names=["cat", "dog", "owl"])


def test_a_published_set_by_name(tmp_path, capsys):
    examples = [
        {"image": encoded(flat((10 * i, 0, 0)), "JPEG", quality=100), "label": i % 3, "file_name": f"{i}"}
        for i in range(10)
    ]
    examples[4]["image"] = b"damaged"
    features = {"file_name": tfds.features.Text(), "image": tfds.features.Image(), "label": LABEL}
    folder = prepare_set(tmp_path, "animals", features, {"train": examples, "test": examples[:3]})
    capsys.readouterr()
    found, test = open_published("animals", SIZE, ("train[:80%]", "test"), folder)
    assert not capsys.readouterr().out  # it belongs to the command
    assert (len(found), len(test)) == (8, 3) and found.class_names == ["cat", "dog", "owl"]
    images, labels = found.read([7, 4, 0])
    np.testing.assert_array_equal(labels, [1, -1, 0])
    assert np.abs(images[:, 8, 8].astype(int) - [[70, 0, 0], [0, 0, 0], [0, 0, 0]]).max() <= 2
    assert capsys.readouterr().err.startswith("warning: animals, train[:80%], picture 4: skipped (")
    again, all_of_it = open_published("animals", SIZE, ("train[:80%]", "train"), folder)
    assert found.fingerprint == again.fingerprint != all_of_it.fingerprint
    with pytest.raises(UserError, match=r"data\.validation_split = 'validation': cannot be read .*; use train or test"):
        open_published("animals", SIZE, data_dir=folder)


def test_published_sets_of_arrays_and_without_pictures(tmp_path):
    pixels = np.arange(5 * 8 * 8 * 1, dtype=np.int64).reshape(5, 8, 8, 1).astype(np.uint8)
    features = {"digit": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8), "label": LABEL}
    examples = [{"digit": pixels[i], "label": 2} for i in range(5)]
    folder = prepare_set(tmp_path, "figures", features, {"train": examples})
    images, labels = open_published("figures", 8, ("train", "train"), folder, channels=1)[0].read(range(5))
    np.testing.assert_array_equal(images, pixels)
    np.testing.assert_array_equal(labels, [2] * 5)
    prepare_set(tmp_path, "words", {"text": tfds.features.Text()}, {"train": [{"text": "a"}]})
    with pytest.raises(UserError, match="has no pictures with labels, but text; use another"):
        open_published("words", SIZE, data_dir=folder)
    with pytest.raises(UserError, match=r"data\.dataset = 'nothing_like_it': cannot be loaded"):
        open_published("nothing_like_it", SIZE, data_dir=folder)
