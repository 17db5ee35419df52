"""Augmentations: each operation is PIL's, and a batch depends on the rng alone."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps

from tokenformer_jax.data.augment import (
    COLOR,
    FILL,
    GEOMETRIC,
    OPS,
    affine,
    augment,
    beta,
    normalize,
    recolor,
    warp,
)
from tokenformer_jax.image_config import AugmentConfig

RECIPE = AugmentConfig(flip=True, rand_augment_layers=2, erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
CLASSES = 7
Sixth = tuple[float, float, float, float, float, float]


@functools.cache
def photo() -> Image.Image:
    """A portrait that matplotlib brings along: 96 x 96 pixels of it."""
    path = pathlib.Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float32)


@functools.cache
def photos(size: int = 24) -> np.ndarray:
    """16 views of it, uint8."""
    boxes = [(4 * i, 3 * i, 4 * i + 30, 3 * i + 40) for i in range(16)]
    return np.stack([np.asarray(photo().resize((size, size), box=box)) for box in boxes])


LABELS = np.arange(16, dtype=np.int32) % CLASSES


@functools.cache
def jitted(cfg: AugmentConfig = RECIPE) -> Any:
    return jax.jit(lambda rng, images, labels: augment(rng, images, labels, cfg, CLASSES))


def key_of(seed: int, step: int) -> Any:
    return jax.random.fold_in(jax.random.key(seed), step)


# PIL's operations.

recolored = jax.jit(recolor)


def pil_color(name: str, image: Image.Image, magnitude: float, sign: float) -> Image.Image:
    factor = max(0.1, 1 + 0.9 * magnitude * sign)
    match name:
        case "posterize":
            return ImageOps.posterize(image, max(1, 4 - int(4 * magnitude)))
        case "solarize":
            return ImageOps.solarize(image, 256 - int(256 * magnitude))
        case "solarize_add":
            more = int(110 * magnitude)
            return image.point([min(255, i + more) if i < 128 else i for i in range(256)] * len(image.getbands()))
        case "autocontrast" | "equalize" | "invert":
            return getattr(ImageOps, name)(image)
    return getattr(ImageEnhance, name.title())(image).enhance(factor)


@pytest.mark.parametrize("name", COLOR)
def test_color_operations_are_pils(name):
    dim = photo().point([30 + i // 2 for i in range(256)] * 3)  # so that autocontrast and equalize have work
    for image, magnitude, sign in ((photo(), 0.9, 1.0), (dim, 0.62, -1.0), (dim, 0.0, 1.0), (photo(), 1.0, -1.0)):
        ours = recolored(array(image), OPS.index(name), magnitude, sign)
        apart = np.abs(ours - array(pil_color(name, image, magnitude, sign)))
        # Blends and stretches that are whole numbers may be cut off to the one below, here or in PIL.
        assert apart.max() <= 1 and np.mean(apart > 0) < 0.01, (name, magnitude)
        assert not np.any(ours % 1)


@pytest.mark.parametrize("name", [name for name in COLOR if name != "color"])
def test_color_operations_on_gray_pictures(name):
    gray = photo().convert("L")
    ours = recolored(array(gray)[:, :, None], OPS.index(name), 0.7, 1.0)[:, :, 0]
    assert np.abs(ours - array(pil_color(name, gray, 0.7, 1.0))).max() <= 1


def test_no_operation_changes_nothing():
    x = array(photo())
    np.testing.assert_array_equal(recolored(x, -1, 0.9, 1.0), x)
    np.testing.assert_array_equal(recolored(x, OPS.index("rotate"), 0.9, 1.0), x)
    np.testing.assert_array_equal(jax.jit(warp)(x, affine(jnp.int32(-1), 0.9, 96, 96)), x)
    flat = np.full((8, 8, 3), 77.0)
    for name in ("autocontrast", "equalize"):
        np.testing.assert_array_equal(recolored(flat, OPS.index(name), 0.9, 1.0), flat)


def pil_matrix(name: str, magnitude: float) -> Sixth:
    return {
        "shear_x": (1, 0.3 * magnitude, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * magnitude, 1, 0),
        "translate_x": (1, 0, 0.45 * 96 * magnitude, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 0.45 * 96 * magnitude),
    }[name]


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_are_pils(name):
    warped, bilinear = jax.jit(warp), Image.Resampling.BILINEAR
    for magnitude in (0.9, -0.37):
        ours = warped(array(photo()), affine(jnp.int32(OPS.index(name)), magnitude, 96, 96))
        if name == "rotate":
            theirs = photo().rotate(30 * magnitude, bilinear, fillcolor=(int(FILL),) * 3)
        else:
            affinely, fill = Image.Transform.AFFINE, (int(FILL),) * 3
            theirs = photo().transform((96, 96), affinely, pil_matrix(name, magnitude), bilinear, fillcolor=fill)
        apart = np.abs(ours - array(theirs)).max(-1)  # PIL cuts off what is behind the point; we round
        assert np.mean(apart > 1) < 2e-3  # pixels on the very border of what is filled
        assert np.mean(np.all(ours == FILL, -1)) > 0.02


def test_two_geometric_operations_are_one_map():
    rotate, shear = (affine(jnp.int32(OPS.index(name)), 0.5, 96, 96) for name in ("rotate", "shear_x"))
    both = jax.jit(warp)(array(photo()), rotate @ shear)
    one_by_one = jax.jit(warp)(jax.jit(warp)(array(photo()), rotate), shear)
    inside = np.s_[30:66, 30:66]  # where neither filled; two interpolations blur a little more than one
    assert np.abs(both - one_by_one)[inside].mean() < 3


# Laws of a batch.


def test_a_batch_depends_on_seed_and_step_alone():
    first, again = (jitted()(key_of(0, 3), photos(), LABELS) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert first[0].shape == (16, 24, 24, 3) and first[0].dtype == first[1].dtype == jnp.float32
    for key in (key_of(0, 4), key_of(1, 3)):
        assert np.abs(jitted()(key, photos(), LABELS)[0] - first[0]).mean() > 0.05


def test_rows_do_not_depend_on_the_batch():
    images, targets = jitted()(key_of(0, 0), photos(), LABELS)
    fewer_images, fewer_targets = jitted()(key_of(0, 0), photos()[:8], LABELS[:8])
    np.testing.assert_array_equal(images[:8], fewer_images)
    np.testing.assert_allclose(targets[:8], fewer_targets, atol=1e-5)  # shares are means, summed in another order


def test_sharded_is_single_and_nothing_moves_between_devices():
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    batch = jax.device_put((photos(), LABELS), sharding)
    compiled = jitted().lower(key_of(0, 5), *batch).compile()
    for one, sharded in zip(jitted()(key_of(0, 5), photos(), LABELS), compiled(key_of(0, 5), *batch), strict=True):
        # Two programs differ in last bits, which may round a level up or down, and sum pixels in another order.
        apart = np.abs(np.asarray(one) - np.asarray(sharded))
        assert np.mean(apart > 1e-5) < 1e-3 and apart.max() < 1.01 / 127.5
        assert sharded.sharding.is_equivalent_to(sharding, sharded.ndim)
    program = compiled.as_text()
    for moves in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert moves not in program, moves


def test_targets_are_probabilities():
    labels = LABELS.copy()
    labels[4] = -1  # a damaged picture
    images, targets = jitted()(key_of(0, 1), photos(), labels)
    expected = np.ones(16)
    expected[4] = 0
    np.testing.assert_allclose(targets.sum(1), expected, rtol=1e-6)
    assert np.asarray(targets).min() >= 0 and np.all(np.isfinite(images))
    np.testing.assert_array_equal(np.count_nonzero(targets[5] > 0.1 / CLASSES + 1e-6), 1)  # has no neighbor to mix with


def test_label_smoothing():
    cfg = AugmentConfig(label_smoothing=0.1)
    images, targets = jitted(cfg)(key_of(0, 0), photos(), LABELS)
    np.testing.assert_allclose(images, normalize(photos()), atol=1e-6)  # nothing else is changed
    np.testing.assert_allclose(targets, 0.9 * np.eye(CLASSES)[LABELS] + 0.1 / CLASSES, rtol=1e-6)


def test_flips_half_of_the_pictures():
    rows = np.tile(photos(), (25, 1, 1, 1))
    images, _ = jitted(AugmentConfig(flip=True))(key_of(0, 0), rows, np.tile(LABELS, 25))
    is_kept, is_flipped = (
        np.all(np.abs(images - normalize(x)) < 1e-6, axis=(1, 2, 3))
        for x in (rows, np.ascontiguousarray(rows[:, :, ::-1]))
    )
    assert np.all(is_kept ^ is_flipped) and 160 < is_flipped.sum() < 240


def test_erases_rectangles_with_noise():
    black = np.zeros((400, 24, 24, 3), np.uint8)
    images, _ = jitted(AugmentConfig(erasing=0.25))(key_of(0, 0), black, np.zeros(400, np.int32))
    is_erased = np.any(np.asarray(images) != -1, axis=3)
    part = is_erased.mean((1, 2))
    assert 70 < np.count_nonzero(part) < 130 and part.max() < 0.4 and part[part > 0].min() > 0.01
    for mask in is_erased[part > 0]:
        np.testing.assert_array_equal(mask, mask.any(1)[:, None] & mask.any(0))
        for lines in (mask.any(1), mask.any(0)):
            assert np.count_nonzero(np.diff(lines.astype(int), prepend=0, append=0)) == 2
    assert abs(np.asarray(images)[is_erased].std() - 0.45) < 0.05


@pytest.mark.parametrize("rows", [400, 401])
def test_mixup_and_cutmix_mix_neighbors(rows):
    """Even rows are black and of class 0, odd ones white and of class 1: pixels say what targets must."""
    odd = np.arange(rows) % 2
    images = np.broadcast_to(255 * odd[:, None, None, None], (rows, 24, 24, 1)).astype(np.uint8)
    cfg = dataclasses.replace(AugmentConfig(), mixup=0.8, cutmix=1.0)
    mixed, targets = (np.asarray(x) for x in jitted(cfg)(key_of(0, 0), images, odd.astype(np.int32)))
    white = (mixed.mean((1, 2, 3)) + 1) / 2
    np.testing.assert_allclose(targets[:, 1], white, atol=1e-5)
    np.testing.assert_allclose(targets[:, :2].sum(1), 1, rtol=1e-6)
    pairs = targets[: rows // 2 * 2].reshape(-1, 2, CLASSES)
    np.testing.assert_allclose(pairs.sum(1)[:, :2], 1, rtol=1e-6)  # what one gets, its neighbor gives
    assert rows % 2 == 0 or targets[-1, 0] == 1
    is_cut = np.all(np.abs(np.abs(mixed) - 1) < 1e-6, axis=(1, 2, 3))
    assert 0.4 < is_cut.mean() < 0.65
    kept = pairs[:, 0, 0]
    assert (
        0.4 < kept[is_cut[: 2 * len(kept) : 2]].mean() < 0.85 and 0.4 < kept[~is_cut[: 2 * len(kept) : 2]].mean() < 0.6
    )


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0, 4.0])
def test_shares_are_of_a_beta_distribution(alpha):
    shares = jax.jit(jax.vmap(lambda rng: beta(rng, alpha)))(jax.random.split(jax.random.key(0), 20_000))
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 5 * (variance / 20_000) ** 0.5 and abs(shares.var() / variance - 1) < 0.03
    fourth = ((shares - 0.5) ** 4).mean() / variance**2
    assert abs(fourth - (3 - 6 / (2 * alpha + 3))) < 0.1


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_one_alone(key):
    images = np.broadcast_to(np.array([0, 255])[:, None, None, None], (2, 24, 24, 1)).astype(np.uint8)
    cfg = dataclasses.replace(AugmentConfig(), **{key: 1.0})
    mixed, _ = jitted(cfg)(key_of(0, 2), np.tile(images, (20, 1, 1, 1)), np.tile([0, 1], 20))
    assert (len(np.unique(np.round(np.asarray(mixed), 5))) == 2) == (key == "cutmix")
