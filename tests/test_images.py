"""Laws of images: where they are read from, how they are cropped, and what a device does to them."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tests.helpers import image_config, random_images
from tokenformer_jax.data import image_batches
from tokenformer_jax.data.images import as_array, center_crop, open_images, random_crop, split_of_arrays
from tokenformer_jax.errors import UserError
from tokenformer_jax.image_config import UNCHANGED, AugmentConfig
from tokenformer_jax.training import augment
from tokenformer_jax.training.tasks import task_of


def photo(seed, width=40, height=30):
    """Smooth, so that a JPEG of it is close to it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 6), ("validation", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                ending = ("jpg", "png", "webp")[i % 3]
                photo(100 * label + i).save(tmp_path / split / name / f"{i}.{ending}")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def folder_config(folder, **overrides):
    data = {"data__dataset": "image_folder", "data__path": str(folder), "model__num_classes": 2}
    return image_config(**data | overrides)


def test_a_folder_has_a_folder_for_each_class(folder):
    data = open_images(folder_config(folder).data, 2)
    assert data.train.classes == ["cat", "dog"] and (len(data.train), len(data.validation)) == (12, 6)
    assert [data.train.read(i)[1] for i in range(12)] == [0] * 6 + [1] * 6
    assert data.train.name(6) == str(folder / "train" / "dog" / "0.jpg")
    assert open_images(folder_config(folder).data, 2).train.fingerprint == data.train.fingerprint
    (folder / "train" / "dog" / "new.png").write_bytes((folder / "train" / "dog" / "1.png").read_bytes())
    assert open_images(folder_config(folder).data, 2).train.fingerprint != data.train.fingerprint


def test_a_folder_without_splits_is_split_by_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(60):
            (tmp_path / name / f"{i}.png").touch()
    data = open_images(folder_config(tmp_path).data, 2)
    assert len(data.train) + len(data.validation) == 120 and 1 <= len(data.validation) <= 15
    names = [split.name(i) for split in (data.train, data.validation) for i in range(len(split))]
    assert len(set(names)) == 120


def test_damaged_images_are_named_once_and_weigh_nothing(folder, capsys):
    bad = folder / "train" / "cat" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    cfg = folder_config(folder, batch_size=12)
    split = open_images(cfg.data, 2).train
    batches = image_batches.train_batches(split, cfg)
    both = [next(batches) for _ in range(2)]
    for batch in both:
        (row,) = np.flatnonzero(batch.weights_BL[:, 0] == 0)
        assert not batch.images_BHWC[row].any() and batch.weights_BL.sum() == 11
    assert capsys.readouterr().err.count(str(bad)) == 1


def test_every_image_is_evaluated_once(folder):
    cfg = folder_config(folder, batch_size=4)
    split = open_images(cfg.data, 2).validation
    found = image_batches.eval_batches(split, cfg, 4)
    assert len(found) == 2 and sum(batch.weights_BL.sum() for batch in found) == 6
    halves = [image_batches.eval_batches(split, cfg, 4, process_index=i, process_count=2) for i in (0, 1)]
    for k, whole in enumerate(found):
        joined = np.concatenate([half[k].images_BHWC for half in halves])
        np.testing.assert_array_equal(joined, whole.images_BHWC)
    assert len(image_batches.eval_batches(split, cfg, 2, max_batches=1)) == 1


@pytest.mark.parametrize("smallest", [0.0, 0.3])
def test_training_batches_resume_and_shard_exactly(folder, smallest):
    cfg = folder_config(folder, batch_size=4, augment__smallest_crop=smallest)
    split = open_images(cfg.data, 2).train
    whole = image_batches.train_batches(split, cfg)
    first = [next(whole) for _ in range(5)]
    for start in (2, 4):
        again = image_batches.train_batches(split, cfg)
        again.set_state({"next_index": start})
        for a, b in zip(next(again), first[start], strict=True):
            np.testing.assert_array_equal(a, b)
    halves = [image_batches.train_batches(split, cfg, process_index=i, process_count=2) for i in (0, 1)]
    for batch in first[:2]:
        parts = [next(half) for half in halves]
        np.testing.assert_array_equal(np.concatenate([p.images_BHWC for p in parts]), batch.images_BHWC)
    epoch = np.concatenate([batch.targets[:, 0] for batch in first[:3]])
    assert np.bincount(epoch).tolist() == [6, 6]  # each of twelve images once
    other = folder_config(folder, batch_size=4, augment__smallest_crop=smallest, seed=1)
    assert any((next(image_batches.train_batches(split, other)).images_BHWC != first[0].images_BHWC).ravel())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data__path": ""}, "data.path is missing: data.dataset = 'image_folder' needs a folder"),
        ({"data__path": "/nothing/here"}, "data.path = '/nothing/here': holds no images; use a folder with one"),
        ({"model__num_classes": 5}, "model.num_classes = 5: image_folder has 2 classes; use 2"),
        ({"data__dataset": "no_such_set"}, "data.dataset = 'no_such_set': cannot be loaded"),
    ],
)
def test_a_mistake_names_key_and_remedy(folder, change, message):
    cfg = folder_config(folder, **change)
    with pytest.raises(UserError, match=message):
        open_images(cfg.data, cfg.model.num_classes)


@pytest.mark.parametrize("encoded", [False, True], ids=["arrays", "files"])
def test_a_set_of_tfds_is_read_without_tensorflow(tmp_path, encoded):
    import tensorflow_datasets as tfds

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # there are no download checksums beside this file to look for

        def _info(self):
            image = (
                tfds.features.Image(shape=(6, 6, 1))
                if encoded
                else tfds.features.Tensor(shape=(6, 6, 1), dtype=np.uint8)
            )
            features = {"image": image, "label": tfds.features.ClassLabel(names=["round", "square", "flat"])}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(9), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            for i in range(count):
                pixels = np.full((6, 6, 1), 10 * i, np.uint8)
                if encoded:  # tfds encodes arrays with TensorFlow alone, and takes files as they are
                    Image.fromarray(pixels[:, :, 0]).save(tmp_path / f"{i}.png")
                yield i, {"image": str(tmp_path / f"{i}.png") if encoded else pixels, "label": i % 3}

    Shapes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    sizes = {"model__image_size": 6, "model__image_channels": 1, "model__num_classes": 3}
    cfg = image_config(
        data__dataset="shapes", data__path=str(tmp_path), data__validation_split="test", batch_size=9, **sizes
    )
    data = open_images(cfg.data, 3)
    assert data.train.classes == ["round", "square", "flat"] and (len(data.train), len(data.validation)) == (9, 4)
    batch = next(image_batches.train_batches(data.train, cfg))
    numbers = batch.images_BHWC[:, 0, 0, 0] // 10
    assert sorted(numbers) == list(range(9)) and (batch.targets[:, 0] == numbers % 3).all()
    missing = dataclasses.replace(cfg.data, validation_split="none")
    with pytest.raises(UserError, match=r"data.validation_split = 'none': cannot be read .*; use (train|test) or"):
        open_images(missing, 3)


def test_crops_stay_inside_and_keep_their_area():
    rng = np.random.default_rng(0)
    for shape in ((40, 30), (30, 90), (7, 7)):
        for _ in range(50):
            left, top, right, bottom = random_crop(shape, 0.2, rng)
            assert 0 <= left < right <= shape[0] and 0 <= top < bottom <= shape[1]
            assert (right - left) * (bottom - top) >= 0.15 * min(shape) ** 2
    assert center_crop((40, 20), 0.5) == (15.0, 5.0, 25.0, 15.0)


@pytest.mark.parametrize("kind", ["array", "PNG", "JPEG"])
def test_an_image_is_resized_from_any_form(kind):
    image = photo(1, 400, 300)
    file = io.BytesIO()
    if kind != "array":
        image.save(file, kind)
    found = as_array(np.asarray(image) if kind == "array" else file.getvalue(), 32, 3)
    exact = image.crop((50, 0, 350, 300)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(found.astype(int) - np.asarray(exact).astype(int)).mean() < (4 if kind == "JPEG" else 1)
    gray = as_array(np.asarray(image), 32, 1)
    assert gray.shape == (32, 32, 1) and np.abs(gray[:, :, 0].astype(int) - np.asarray(exact.convert("L"))).mean() < 1


PIL_COLORS = {
    "autocontrast": lambda im, m, s: ImageOps.autocontrast(im),
    "equalize": lambda im, m, s: ImageOps.equalize(im),
    "invert": lambda im, m, s: ImageOps.invert(im),
    "posterize": lambda im, m, s: im.point(lambda v: v >> (4 + int(4 * m)) << (4 + int(4 * m))),
    "solarize": lambda im, m, s: ImageOps.solarize(im, 256 - int(256 * m)),
    "solarize_add": lambda im, m, s: im.point(lambda v: min(255, v + int(110 * m)) if v < 128 else v),
    "color": lambda im, m, s: ImageEnhance.Color(im).enhance(1 + 0.9 * m * s),
    "contrast": lambda im, m, s: ImageEnhance.Contrast(im).enhance(1 + 0.9 * m * s),
    "brightness": lambda im, m, s: ImageEnhance.Brightness(im).enhance(1 + 0.9 * m * s),
    "sharpness": lambda im, m, s: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * m * s),
}


@pytest.mark.parametrize("name", PIL_COLORS)
def test_operations_on_colors_are_pils(name):
    assert list(PIL_COLORS) == list(augment.COLORS)
    for seed, (magnitude, sign) in enumerate([(0.9, 1.0), (0.6, -1.0)]):
        pixels = (np.asarray(photo(seed, 24, 24)) * 0.8).astype(np.uint8)
        pixels[:2] = np.random.default_rng(seed).integers(0, 256, pixels[:2].shape)
        theirs = np.asarray(PIL_COLORS[name](Image.fromarray(pixels), magnitude, sign)).astype(float)
        ours = augment.COLORS[name](jnp.asarray(pixels, jnp.float32), jnp.float32(magnitude), jnp.float32(sign))
        assert np.abs(np.floor(ours) - theirs).max() <= 1, (magnitude, sign)


def test_affine_operations_move_what_they_say():
    side = 9
    x = jnp.zeros((side, side, 1)).at[4, 4].set(255.0).at[2, 6].set(100.0)
    matrix, shift = augment.SHAPES["translate_x"](jnp.float32(1 / (0.45 * side)), side)
    moved = augment.moved(x, jnp.array(matrix), jnp.array(shift))
    assert moved[4, 3, 0] == 255 and moved[2, 5, 0] == 100 and moved[0, 8, 0] == augment.FILL
    quarter = augment.moved(x, jnp.array(augment.rotation(jnp.float32(np.pi / 2))), jnp.zeros(2))
    np.testing.assert_allclose(quarter[:, :, 0], np.rot90(x[:, :, 0], -1), atol=1e-3)
    sheared = augment.moved(x, jnp.array(((1, 0.5), (0, 1))), jnp.zeros(2))
    assert sheared[4, 4, 0] == 255 and sheared[2, 7, 0] == 100


ALL = AugmentConfig(flip=True, rand_augment_layers=2, erasing=0.5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def augmented(cfg, batch, seed=0):
    return jax.device_get(jax.jit(lambda b, k: augment.augmented(b, cfg, 6, k))(batch, jax.random.key(seed)))


@pytest.mark.parametrize("cfg", [AugmentConfig(mixup=0.8), AugmentConfig(cutmix=1.0)], ids=["mixup", "cutmix"])
def test_mixing_keeps_probabilities_and_the_share_of_pixels(cfg):
    batch = random_images(image_config())
    weights = batch.weights_BL.copy()
    weights[3] = 0  # the neighbor of row 2 is damaged
    black_and_white = np.zeros_like(batch.images_BHWC)
    black_and_white[::2] = 255
    labels = np.array([0, 1] * 4, np.int32)[:, None]
    batch = batch._replace(images_BHWC=black_and_white, targets=labels, weights_BL=weights)
    shares = set()
    for seed in range(6):
        found = augmented(cfg, batch, seed)
        np.testing.assert_allclose(found.targets.sum(1), 1, atol=1e-6)
        own = (found.images_BHWC.mean((1, 2, 3)) + 1) / 2  # white pixels' part
        np.testing.assert_allclose(found.targets[:, 0], own, atol=1e-5)
        assert own[2] == 1 and found.targets[2, 0] == 1
        np.testing.assert_allclose(own[0], 1 - own[1], atol=1e-5)
        shares.add(round(float(own[0]), 3))
    assert len(shares) > 3


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_draws_of_mixing_have_the_moments_of_beta(alpha):
    drawn = np.asarray(jax.vmap(lambda key: augment.beta(alpha, key))(jax.random.split(jax.random.key(0), 20_000)))
    assert drawn.min() >= 0 and drawn.max() <= 1
    np.testing.assert_allclose(drawn.mean(), 0.5, atol=0.01)
    np.testing.assert_allclose(drawn.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.03)


def test_labels_are_smoothed_and_erasing_and_flips_are_as_often_as_asked():
    batch = random_images(image_config(batch_size=400))
    found = augmented(AugmentConfig(label_smoothing=0.3), batch)
    at = np.take_along_axis(found.targets, batch.targets, 1)
    np.testing.assert_allclose(at, 0.7 + 0.3 / 6, atol=1e-6)
    plain = batch.images_BHWC / np.float32(127.5) - 1
    flips = augmented(AugmentConfig(flip=True), batch).images_BHWC
    is_flipped = np.abs(flips - plain[:, :, ::-1]).max((1, 2, 3)) < 1e-5
    assert (is_flipped | (np.abs(flips - plain).max((1, 2, 3)) < 1e-5)).all() and 0.4 < is_flipped.mean() < 0.6
    erased = augmented(AugmentConfig(erasing=0.25), batch).images_BHWC
    changed = np.abs(erased - plain).max(-1) > 1e-6
    assert 0.17 < changed.any((1, 2)).mean() < 0.33 and changed.mean((1, 2)).max() < 0.45


def test_augmentations_are_a_function_of_seed_and_step_alone():
    cfg = image_config(**{f"augment__{key}": getattr(ALL, key) for key in ("flip", "rand_augment_layers", "mixup")})
    task, batch = task_of(cfg), random_images(cfg)
    make = jax.jit(lambda batch, step: task.augmented(batch, cfg, step))
    one, again, other = (jax.device_get(make(batch, jnp.int32(step))) for step in (3, 3, 4))
    np.testing.assert_array_equal(one.images_BHWC, again.images_BHWC)
    assert (one.images_BHWC != other.images_BHWC).any() and one.images_BHWC.dtype == np.float32
    plain = image_config()
    assert plain.augment == UNCHANGED and task.augmented(batch, plain, 3) is batch


def test_rand_augment_changes_about_three_images_of_four():
    batch = random_images(image_config(batch_size=200))
    found = augmented(AugmentConfig(rand_augment_layers=2), batch).images_BHWC
    changed = (np.abs(found - (batch.images_BHWC / np.float32(127.5) - 1)).max((1, 2, 3)) > 1e-5).mean()
    assert 0.6 < changed < 0.85 and found.min() >= -1 and found.max() <= 1


def test_arrays_in_memory_are_told_apart_by_content():
    images, labels = np.zeros((4, 2, 2), np.uint8), np.arange(4)
    split = split_of_arrays(images, labels, list("abcd"))
    images[1, 1, 1] = 1
    assert split_of_arrays(images, labels, list("abcd")).fingerprint != split.fingerprint
