"""Augmentations of pictures, made on the device within the training step; the host has cropped them before.

Flips, RandAugment (arXiv 1909.13719), random erasing (1708.04896), Mixup (1710.09412), CutMix (1905.04899) and label
smoothing. All are pure functions of an rng and a batch. What is drawn for a row depends on the rng and the row's number
in the global batch alone, so a batch comes out the same on every mesh, and no picture leaves its device. Operations of
RandAugment are PIL's, which published recipes are made of. Images hold whole numbers from 0 to 255 until they are
normalized.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from tokenformer_jax.image_config import AugmentConfig

FILL = 128.0  # gray, where a picture was turned or moved away from
TRIES = 0.5  # probability that a layer of RandAugment does anything
NOISE = 0.45  # standard deviation of erased pixels once normalized: about that of photos
LOG_ERASED = math.log(10 / 3)  # of width and height of what is erased, at most
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
COLOR = tuple(
    "autocontrast equalize invert posterize solarize solarize_add color contrast brightness sharpness".split()
)
OPS = GEOMETRIC + COLOR


def augment(
    rng: Any, images_BHWC: jax.Array, labels_B: jax.Array, cfg: AugmentConfig, num_classes: int
) -> tuple[jax.Array, jax.Array]:
    """A training batch as a model takes it.

    Args:
      rng: PRNG key of this step: from the seed and the step's number alone, a resumed run makes the same again.
      images_BHWC: uint8 pictures, square.
      labels_B: int32. A row whose label is negative holds no picture: its targets are 0, and no row is mixed with it.
      cfg: config.augment.
      num_classes: V, the number of classes.

    Returns:
      float32 images [B, H, W, C] in about [-1, 1], and float32 probabilities of the classes [B, V].
    """
    of_rows, of_pairs, of_noise = jax.random.split(rng, 3)
    rngs_B = row_rngs(of_rows, len(images_BHWC))
    # One picture of noise a batch: to draw one for each row costs more than everything else here.
    noise_HWC = NOISE * jax.random.normal(of_noise, images_BHWC.shape[1:]) if cfg.erasing else None
    images_BHWC = jax.vmap(lambda rng, x_HWC: of_one(rng, x_HWC, noise_HWC, cfg))(rngs_B, images_BHWC)
    targets_BV = (1 - cfg.label_smoothing) * jax.nn.one_hot(labels_B, num_classes) + cfg.label_smoothing / num_classes
    targets_BV = jnp.where(labels_B[:, None] >= 0, targets_BV, 0.0)
    if cfg.mixup or cfg.cutmix:
        images_BHWC, targets_BV = mix(of_pairs, images_BHWC, targets_BV, labels_B >= 0, cfg)
    return images_BHWC, targets_BV


def normalize(pixels: jax.Array) -> jax.Array:
    """0 … 255 -> [-1, 1], float32."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def row_rngs(rng: Any, rows: int) -> Any:
    """A PRNG key for each row of a global batch."""
    return jax.vmap(lambda row: jax.random.fold_in(rng, row))(jnp.arange(rows))


def of_one(rng: Any, x_HWC: jax.Array, noise_HWC: Any, cfg: AugmentConfig) -> jax.Array:
    """A picture after flip, RandAugment and erasing, normalized."""
    _, of_flip, of_ops, of_erasing = jax.random.split(rng, 4)  # the first was that of crops: older runs go on alike
    x_HWC = x_HWC.astype(jnp.float32)
    if cfg.flip:
        x_HWC = jnp.where(jax.random.bernoulli(of_flip), x_HWC[:, ::-1], x_HWC)
    if cfg.rand_augment_layers:
        x_HWC = rand_augment(of_ops, x_HWC, cfg)
    x_HWC = normalize(x_HWC)
    if cfg.erasing:
        x_HWC = jnp.where(erased(of_erasing, x_HWC.shape[:2], cfg.erasing)[:, :, None], noise_HWC, x_HWC)
    return x_HWC


# RandAugment. Under vmap every branch of a switch is computed for every picture. So the geometric operations of all
# layers are one affine map, and the color operations of a layer are one table of levels and one blend.


def rand_augment(rng: Any, x_HWC: jax.Array, cfg: AugmentConfig) -> jax.Array:
    """Each layer draws one of OPS, whose magnitude is drawn around the config's; the geometric ones come first."""
    drawn = jax.vmap(lambda layer: draw(layer, cfg))(jax.random.split(rng, cfg.rand_augment_layers))
    matrix_33 = jnp.eye(3)
    for op, magnitude, sign in zip(*drawn, strict=True):
        matrix_33 = jnp.matmul(matrix_33, affine(op, magnitude * sign, *x_HWC.shape[:2]), precision="highest")
    # A scan: without it XLA computes a picture anew for each of the sums and shifts that the next layer makes of it.
    return jax.lax.scan(lambda x_HWC, layer: (recolor(x_HWC, *layer), None), warp(x_HWC, matrix_33), drawn)[0]


def draw(rng: Any, cfg: AugmentConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An index of OPS, or -1 for none; a magnitude in [0, 1]; a sign."""
    of_op, of_try, of_magnitude, of_sign = jax.random.split(rng, 4)
    op = jnp.where(jax.random.bernoulli(of_try, TRIES), jax.random.randint(of_op, (), 0, len(OPS)), -1)
    magnitude = cfg.rand_augment_magnitude + cfg.rand_augment_deviation * jax.random.normal(of_magnitude)
    return op, jnp.clip(magnitude / 10, 0, 1), jax.random.rademacher(of_sign, (), jnp.float32)


def affine(op: jax.Array, magnitude: jax.Array, height: int, width: int) -> jax.Array:
    """The matrix [3, 3] from a point (x, y, 1) to where a geometric operation takes it from; else the identity.

    Points are measured from the upper left corner, as PIL does; magnitude is signed.
    """
    angle, shear_x, shear_y, right, down = (
        jnp.where(op == OPS.index(name), most * magnitude, 0.0)
        for name, most in zip(GEOMETRIC, (math.radians(30), 0.3, 0.3, 0.45 * width, 0.45 * height), strict=True)
    )
    cos, sin, x, y = jnp.cos(angle), jnp.sin(angle), width / 2, height / 2  # it turns around the middle
    rows = (cos, shear_x - sin, x - cos * x + sin * y + right), (sin + shear_y, cos, y - sin * x - cos * y + down)
    return jnp.array([*rows, (0, 0, 1)])


def warp(x_HWC: jax.Array, matrix_33: jax.Array) -> jax.Array:
    """The picture seen through an affine map, bilinear, with FILL outside."""
    (height, width), m = x_HWC.shape[:2], matrix_33
    x_HW, y_HW = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    from_x, from_y = (m[i, 0] * x_HW + m[i, 1] * y_HW + m[i, 2] for i in range(2))
    is_inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)

    def channel(x_HW: jax.Array) -> jax.Array:
        at = [from_y - 0.5, from_x - 0.5]
        return jax.scipy.ndimage.map_coordinates(x_HW, at, order=1, mode="nearest")

    return jnp.where(is_inside[:, :, None], jnp.round(jax.vmap(channel, 2, 2)(x_HWC)), FILL)


def recolor(x_HWC: jax.Array, op: jax.Array, magnitude: jax.Array, sign: jax.Array) -> jax.Array:
    """The picture after a color operation; itself where `op` is none."""
    factor = jnp.maximum(0.1, 1 + 0.9 * magnitude * sign)
    gray_HW1 = luminance(x_HWC)
    table_CV = levels(x_HWC, gray_HW1, op, magnitude, factor)
    y_HWC = jnp.take(table_CV.ravel(), entries(x_HWC), mode="clip")  # twice as fast as two indices are
    is_color, is_sharpness = (op == OPS.index(name) for name in ("color", "sharpness"))
    dull_HWC = jnp.where(is_color, gray_HW1, smooth(x_HWC))
    return jnp.where(is_color | is_sharpness, blend(dull_HWC, x_HWC, factor), y_HWC)


def levels(x_HWC: jax.Array, gray_HW1: jax.Array, op: jax.Array, magnitude: jax.Array, factor: jax.Array) -> jax.Array:
    """What an operation makes of each level of each channel: a table [C, 256]."""
    level_V = jnp.arange(256.0)
    low_C1, high_C1 = (f(x_HWC, axis=(0, 1))[:, None] for f in (jnp.min, jnp.max))
    stretched_CV = jnp.floor((level_V - low_C1) * (255 / jnp.maximum(high_C1 - low_C1, 1)) + 1e-3)
    mean = jnp.floor(jnp.sum(gray_HW1.astype(jnp.int32)) / gray_HW1.size + 0.5)
    step = jnp.exp2(8 - jnp.maximum(4 - jnp.floor(4 * magnitude), 1))  # at least one bit stays
    brighter_V = level_V + jnp.floor(110 * magnitude)
    tables = {
        "autocontrast": jnp.where(high_C1 > low_C1, stretched_CV, level_V),
        "equalize": equalized(x_HWC),
        "invert": 255 - level_V,
        "posterize": jnp.floor(level_V / step) * step,
        "solarize": jnp.where(level_V < 256 - jnp.floor(256 * magnitude), level_V, 255 - level_V),
        "solarize_add": jnp.where(level_V < 128, brighter_V, level_V),
        "contrast": blend(mean, level_V, factor),
        "brightness": blend(jnp.float32(0), level_V, factor),
    }
    each_OCV = jnp.stack([jnp.broadcast_to(table, (x_HWC.shape[2], 256)) for table in tables.values()])
    is_op_O = jnp.array([op == OPS.index(name) for name in tables], jnp.float32)
    # A contraction: what is elementwise XLA would compute anew for each pixel that looks it up.
    table_CV = level_V + jnp.einsum("o,ocv->cv", is_op_O, each_OCV - level_V, precision="highest")
    return jnp.clip(table_CV, 0, 255)


def entries(x_HWC: jax.Array) -> jax.Array:
    """Where each pixel's level stands in a table [C, 256], counted through all of it."""
    return x_HWC.astype(jnp.int32) + 256 * jnp.arange(x_HWC.shape[2])


def equalized(x_HWC: jax.Array) -> jax.Array:
    """The table [C, 256] that makes each channel's histogram even."""
    count_CV = jnp.zeros(256 * x_HWC.shape[2], jnp.int32).at[entries(x_HWC).ravel()].add(1).reshape(-1, 256)
    of_highest_C1 = jnp.take_along_axis(count_CV, jnp.max(x_HWC, axis=(0, 1)).astype(jnp.int32)[:, None], axis=1)
    step_C1 = (x_HWC.shape[0] * x_HWC.shape[1] - of_highest_C1) // 255
    below_CV = jnp.cumsum(count_CV, axis=1) - count_CV
    return jnp.where(step_C1 > 0, (step_C1 // 2 + below_CV) // jnp.maximum(step_C1, 1), jnp.arange(256)) * 1.0


def luminance(x_HWC: jax.Array) -> jax.Array:
    """Gray [H, W, 1], rounded as PIL does; every product and sum is exact in float32."""
    if x_HWC.shape[2] == 1:
        return x_HWC
    red, green, blue = (x_HWC[:, :, i : i + 1] for i in range(3))
    return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)


def smooth(x_HWC: jax.Array) -> jax.Array:
    """A mean of nine neighbors in which the middle one counts five times; borders stay."""
    inner_HWC = x_HWC[1:-1, 1:-1]
    sum_HWC = jax.lax.reduce_window(x_HWC, 0.0, jax.lax.add, (3, 3, 1), (1, 1, 1), "VALID") + 4 * inner_HWC
    return x_HWC.at[1:-1, 1:-1].set(jnp.floor(sum_HWC / 13 + 0.5))


def blend(dull: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
    """Towards what is dull (factor below 1), or away from it."""
    return jnp.floor(jnp.clip(dull + factor * (x - dull), 0, 255))


# What comes after.


def erased(rng: Any, sides: tuple[int, ...], probability: float) -> jax.Array:
    """A mask [H, W] of a rectangle of 2 to 33 % of a picture, empty but with this probability."""
    of_try, of_area, of_ratio, of_place = jax.random.split(rng, 4)
    area = jax.random.uniform(of_area, minval=0.02, maxval=1 / 3)
    ratio = jnp.exp(jax.random.uniform(of_ratio, minval=-LOG_ERASED, maxval=LOG_ERASED))
    sides_2 = jnp.array(sides)
    shape_2 = jnp.clip(jnp.round(jnp.sqrt(jnp.array([area * ratio, area / ratio])) * sides_2), 1, sides_2)
    first_2 = jnp.floor(jax.random.uniform(of_place, (2,)) * (sides_2 - shape_2 + 1))
    return rectangle(first_2, shape_2, sides) & jax.random.bernoulli(of_try, probability)


def rectangle(first_2: jax.Array, shape_2: jax.Array, sides: tuple[int, ...]) -> jax.Array:
    """A mask [H, W]."""
    at_H, at_W = (jnp.arange(side) - first_2[i] for i, side in enumerate(sides))
    return ((at_H >= 0) & (at_H < shape_2[0]))[:, None] & (at_W >= 0) & (at_W < shape_2[1])


def mix(
    rng: Any, images_BHWC: jax.Array, targets_BV: jax.Array, is_picture_B: jax.Array, cfg: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
    """Mixup or CutMix between each row and its neighbor: rows 0 and 1, 2 and 3, …; an odd last row stays.

    Data is shuffled, so neighbors are as good a choice as any, and they are on the same device. Each pair draws for
    itself which of the two, and how much of the other a row gets.
    """
    pairs, height, width = len(images_BHWC) // 2, *images_BHWC.shape[1:3]
    own_PHW = jax.vmap(lambda rng: part_kept(rng, (height, width), cfg))(row_rngs(rng, pairs))
    are_pictures_P = jnp.all(is_picture_B[: 2 * pairs].reshape(pairs, 2), axis=1)
    own_PHW = jnp.where(are_pictures_P[:, None, None], own_PHW, 1.0)

    def mixed(x_B: jax.Array, own_P: jax.Array) -> jax.Array:
        x_P2 = x_B[: 2 * pairs].reshape(pairs, 2, *x_B.shape[1:])
        y_P2 = own_P[:, None] * x_P2 + (1 - own_P[:, None]) * x_P2[:, ::-1]
        y_B = y_P2.reshape(2 * pairs, *x_B.shape[1:])
        return jnp.concatenate([y_B, x_B[2 * pairs :]]) if len(x_B) % 2 else y_B

    return mixed(images_BHWC, own_PHW[..., None]), mixed(targets_BV, jnp.mean(own_PHW, axis=(1, 2))[:, None])


def part_kept(rng: Any, sides: tuple[int, int], cfg: AugmentConfig) -> jax.Array:
    """How much of its own each pixel [H, W] keeps: the same for all (Mixup), or 0 in a rectangle, else 1 (CutMix)."""
    of_choice, of_mixup, of_cutmix, of_place = jax.random.split(rng, 4)
    cuts = jax.random.bernoulli(of_choice) if cfg.cutmix and cfg.mixup else jnp.bool_(cfg.cutmix > 0)
    kept = beta(of_mixup, cfg.mixup) if cfg.mixup else jnp.float32(1)
    outside = beta(of_cutmix, cfg.cutmix) if cfg.cutmix else jnp.float32(1)
    sides_2 = jnp.array(sides)
    shape_2 = jnp.floor(jnp.sqrt(1 - outside) * sides_2)
    first_2 = jnp.floor(jax.random.uniform(of_place, (2,)) * sides_2) - shape_2 // 2  # borders may cut some of it off
    is_cut_HW = rectangle(first_2, shape_2, sides)
    return jnp.where(cuts, jnp.where(is_cut_HW, 0.0, 1.0), kept)


def beta(rng: Any, alpha: float) -> jax.Array:
    """A draw from Beta(alpha, alpha), from a table of its quantiles.

    JAX's own draws and rejects until every row has one: of how long that takes devices must tell each other.
    """
    part_Q = np.linspace(0, 1, 4097)
    value_Q = scipy.special.betaincinv(alpha, alpha, part_Q)
    return jnp.interp(jax.random.uniform(rng), part_Q.astype(np.float32), value_Q.astype(np.float32))
