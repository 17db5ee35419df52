"""Augmentations that a device makes, within the training step: a function of the seed and the step alone.

Flips, RandAugment (arXiv 1909.13719), random erasing (1708.04896), Mixup (1710.09412), CutMix (1905.04899) and label
smoothing. Operations on colors are PIL's, which the recipes are made of. A batch has the same augmentations on every
mesh; what is drawn for an image depends on its row.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from tokenformer_jax.image_config import UNCHANGED, AugmentConfig
from tokenformer_jax.nn.vision import as_targets, scaled

FILL = 128.0  # gray, where an image is turned or moved away from
TRIES = 0.5  # probability that one of RandAugment's operations is applied
QUANTILES = 4097
NOISE = 0.45  # of erased pixels, in [-1, 1]: about the deviation of photos'


def augmented(batch: Any, cfg: AugmentConfig, num_classes: int, key: jax.Array) -> Any:
    """The batch with float images and probabilities of classes as its targets; itself where nothing is to be done."""
    if cfg == UNCHANGED:
        return batch
    images_BHWC = batch.images_BHWC.astype(jnp.float32)
    own, shared = jax.random.split(key)
    keys_B = jax.random.split(own, len(images_BHWC))
    images_BHWC = scaled(jax.vmap(lambda image, key: of_one(image, cfg, key))(images_BHWC, keys_B))
    if cfg.erasing:
        images_BHWC = jax.vmap(lambda image, key: erased(image, cfg.erasing, key))(images_BHWC, keys_B)
    targets_BV = as_targets(batch.targets, num_classes)
    targets_BV = (1 - cfg.label_smoothing) * targets_BV + cfg.label_smoothing / num_classes
    if cfg.mixup or cfg.cutmix:
        images_BHWC, targets_BV = mixed(images_BHWC, targets_BV, batch.weights_BL[:, 0], cfg, shared)
    return batch._replace(images_BHWC=images_BHWC, targets=targets_BV)


def of_one(pixels_HWC: jax.Array, cfg: AugmentConfig, key: jax.Array) -> jax.Array:
    """An image after flip and RandAugment, 0 … 255."""
    if cfg.flip:
        pixels_HWC = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 0)), pixels_HWC[:, ::-1], pixels_HWC)
    for layer in range(cfg.rand_augment_layers):
        pixels_HWC = rand_augment(pixels_HWC, cfg, jax.random.fold_in(key, 1 + layer))
    return pixels_HWC


# RandAugment. All magnitudes are parts of their largest, in [0, 1].


def gray(x_HWC: jax.Array) -> jax.Array:
    """Luminance [H, W, 1]."""
    if x_HWC.shape[2] == 1:
        return x_HWC
    return jnp.floor(x_HWC @ jnp.array([[0.299], [0.587], [0.114]]) + 0.5)


def blend(dull: jax.Array, x_HWC: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(dull + factor * (x_HWC - dull), 0, 255)


def contrast(x_HWC: jax.Array, factor: jax.Array) -> jax.Array:
    return blend(jnp.floor(jnp.mean(gray(x_HWC)) + 0.5), x_HWC, factor)


def sharpness(x_HWC: jax.Array, factor: jax.Array) -> jax.Array:
    """PIL's SMOOTH is what it moves away from; borders stay."""
    kernel = jnp.ones((3, 3)).at[1, 1].set(5.0) / 13
    inner = sum(
        kernel[i, j] * x_HWC[i : i + x_HWC.shape[0] - 2, j : j + x_HWC.shape[1] - 2] for i in range(3) for j in range(3)
    )
    return blend(x_HWC.at[1:-1, 1:-1].set(inner), x_HWC, factor)


def autocontrast(x_HWC: jax.Array) -> jax.Array:
    low, high = jnp.min(x_HWC, (0, 1)), jnp.max(x_HWC, (0, 1))
    return jnp.where(high > low, jnp.clip((x_HWC - low) * (255 / jnp.maximum(high - low, 1.0)), 0, 255), x_HWC)


def equalize(x_HWC: jax.Array) -> jax.Array:
    """Levels are spread so that each channel's histogram is even, as PIL does."""

    def channel(x_HW: jax.Array) -> jax.Array:
        levels = x_HW.astype(jnp.int32)
        up_to = jnp.searchsorted(jnp.sort(levels.ravel()), jnp.arange(256), side="right")
        counts = jnp.diff(up_to, prepend=0)
        last = counts[jnp.max(levels)]
        step = (levels.size - last) // 255
        table = jnp.minimum((step // 2 + up_to - counts) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table[levels], levels).astype(jnp.float32)

    return jnp.stack([channel(x_HWC[:, :, c]) for c in range(x_HWC.shape[2])], axis=2)


def posterize(x_HWC: jax.Array, bits: jax.Array) -> jax.Array:
    step = jnp.exp2(8 - bits)
    return jnp.floor(x_HWC / step) * step


def solarize(x_HWC: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(x_HWC < threshold, x_HWC, 255 - x_HWC)


COLORS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {  # of x, magnitude m and sign s
    "autocontrast": lambda x, m, s: autocontrast(x),
    "equalize": lambda x, m, s: equalize(x),
    "invert": lambda x, m, s: 255 - x,
    "posterize": lambda x, m, s: posterize(x, 4 - jnp.floor(4 * m)),
    "solarize": lambda x, m, s: solarize(x, 256 - jnp.floor(256 * m)),
    "solarize_add": lambda x, m, s: jnp.where(x < 128, jnp.minimum(x + jnp.floor(110 * m), 255), x),
    "color": lambda x, m, s: blend(gray(x), x, 1 + 0.9 * m * s),
    "contrast": lambda x, m, s: contrast(x, 1 + 0.9 * m * s),
    "brightness": lambda x, m, s: blend(jnp.float32(0), x, 1 + 0.9 * m * s),
    "sharpness": lambda x, m, s: sharpness(x, 1 + 0.9 * m * s),
}
# From the place of a pixel, right of and below the center, to that where it comes from: [[a, b], [c, d]] and a shift.
SHAPES: dict[str, Callable[[jax.Array, int], tuple[Any, Any]]] = {  # of signed magnitude m and the side
    "rotate": lambda m, side: (rotation(m * math.radians(30)), (0, 0)),
    "shear_x": lambda m, side: (((1, 0.3 * m), (0, 1)), (0, 0)),
    "shear_y": lambda m, side: (((1, 0), (0.3 * m, 1)), (0, 0)),
    "translate_x": lambda m, side: (((1, 0), (0, 1)), (0.45 * m * side, 0)),
    "translate_y": lambda m, side: (((1, 0), (0, 1)), (0, 0.45 * m * side)),
}


def rotation(angle: jax.Array) -> Any:
    return ((jnp.cos(angle), jnp.sin(angle)), (-jnp.sin(angle), jnp.cos(angle)))


def moved(x_HWC: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """The image seen through an affine map, between its pixels linear."""
    side = x_HWC.shape[0]
    at = jnp.arange(side) - (side - 1) / 2
    right_HW, down_HW = jnp.meshgrid(at, at)
    from_x = matrix[0, 0] * right_HW + matrix[0, 1] * down_HW + shift[0] + (side - 1) / 2
    from_y = matrix[1, 0] * right_HW + matrix[1, 1] * down_HW + shift[1] + (side - 1) / 2

    def channel(x_HW: jax.Array) -> jax.Array:
        return map_coordinates(x_HW, [from_y, from_x], order=1, mode="constant", cval=FILL)

    return jax.vmap(channel, in_axes=2, out_axes=2)(x_HWC)


def rand_augment(x_HWC: jax.Array, cfg: AugmentConfig, key: jax.Array) -> jax.Array:
    """One operation of all, or none, at a magnitude drawn around the config's.

    Every image of a batch has its own, so all are computed and one is taken; the affine ones are one map.
    """
    keys = jax.random.split(key, 4)
    drawn = cfg.rand_augment_magnitude + cfg.rand_augment_deviation * jax.random.normal(keys[0])
    magnitude = jnp.clip(drawn / 10, 0.0, 1.0)
    sign = jnp.where(jax.random.bernoulli(keys[1]), 1.0, -1.0)
    choice = jax.random.randint(keys[2], (), 0, len(COLORS) + len(SHAPES))
    choice = jnp.where(jax.random.bernoulli(keys[3], TRIES), choice, -1)
    matrix, shift = jnp.eye(2), jnp.zeros(2)
    for number, of in enumerate(SHAPES.values(), len(COLORS)):
        own_matrix, own_shift = of(sign * magnitude, x_HWC.shape[0])
        matrix = jnp.where(choice == number, jnp.array(own_matrix), matrix)
        shift = jnp.where(choice == number, jnp.array(own_shift), shift)
    y_HWC = jnp.where(choice >= len(COLORS), moved(x_HWC, matrix, shift), x_HWC)
    for number, of_color in enumerate(COLORS.values()):
        y_HWC = jnp.where(choice == number, of_color(x_HWC, magnitude, sign), y_HWC)
    return jnp.floor(y_HWC)


def erased(x_HWC: jax.Array, probability: float, key: jax.Array) -> jax.Array:
    """A rectangle of 2 to 33 % of the image is noise, with this probability."""
    keys = jax.random.split(jax.random.fold_in(key, 100), 4)
    area = jax.random.uniform(keys[0], minval=0.02, maxval=1 / 3)
    ratio = jnp.exp(jax.random.uniform(keys[1], minval=math.log(0.3), maxval=-math.log(0.3)))
    inside_HW = rectangle(x_HWC.shape[0], jnp.sqrt(area * ratio), jnp.sqrt(area / ratio), keys[2], whole=True)
    erases = jax.random.bernoulli(keys[3], probability)
    noise_HWC = NOISE * jax.random.normal(jax.random.fold_in(key, 101), x_HWC.shape)
    return jnp.where((inside_HW & erases)[:, :, None], noise_HWC, x_HWC)


def rectangle(side: int, width: jax.Array, height: jax.Array, key: jax.Array, whole: bool) -> jax.Array:
    """A mask [H, W] of a rectangle of these parts of a side, at random; `whole`, or cut off at the borders."""
    pixels_2 = jnp.clip(jnp.round(side * jnp.stack([height, width])), 1 if whole else 0, side)
    place_2 = jax.random.uniform(key, (2,))
    first_2 = jnp.floor(place_2 * (side - pixels_2 + 1)) if whole else jnp.floor(place_2 * side) - pixels_2 // 2
    at_S = jnp.arange(side)
    rows_S, columns_S = ((at_S >= first_2[i]) & (at_S < first_2[i] + pixels_2[i]) for i in range(2))
    return rows_S[:, None] & columns_S


def mixed(
    images_BHWC: jax.Array, targets_BV: jax.Array, weights_B: jax.Array, cfg: AugmentConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each image with its neighbor's: a mean of both (Mixup), or a rectangle of it (CutMix); one of these a batch.

    Pairs of rows are on the same device. An image whose neighbor has no weight stays as it is.
    """
    keys = jax.random.split(key, 4)
    cuts = jax.random.bernoulli(keys[0], 0.5) if cfg.mixup and cfg.cutmix else jnp.bool_(cfg.cutmix > 0)
    kept_mixing, kept_cutting = beta(cfg.mixup, keys[1]), beta(cfg.cutmix, keys[2])
    side = jnp.sqrt(1 - kept_cutting)
    is_cut_HW = rectangle(images_BHWC.shape[1], side, side, keys[3], whole=False)
    own_HW = jnp.where(cuts, 1 - is_cut_HW.astype(jnp.float32), kept_mixing)  # part of its own that a pixel keeps
    has_neighbor_B = (neighbors(weights_B) > 0).astype(jnp.float32)

    def mix(x: jax.Array, own: jax.Array) -> jax.Array:
        others = has_neighbor_B.reshape(-1, *[1] * (x.ndim - 1)) * (1 - own)
        return x * (1 - others) + neighbors(x) * others

    return mix(images_BHWC, own_HW[:, :, None]), mix(targets_BV, jnp.mean(own_HW))


def beta(alpha: float, key: jax.Array) -> jax.Array:
    """A draw from Beta(α, α), through a table of its quantiles; 1 where α is 0.

    `jax.random.beta` tries until it succeeds, and so has a loop whose length no plan can tell.
    """
    if not alpha:
        return jnp.float32(1)
    import scipy.special  # which takes its time, and is needed here alone

    at = np.linspace(0, 1, QUANTILES)
    table = scipy.special.betaincinv(alpha, alpha, at).astype(np.float32)
    return jnp.interp(jax.random.uniform(key), at.astype(np.float32), table)


def neighbors(x_B: jax.Array) -> jax.Array:
    """Rows 1, 0, 3, 2, …"""
    return x_B.reshape(-1, 2, *x_B.shape[1:])[:, ::-1].reshape(x_B.shape)
