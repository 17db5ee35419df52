"""What a config says of images: how training changes them, and what an image classifier's sizes must be."""

import dataclasses
from typing import Annotated, Any

from tokenformer_jax.rules import BelowOne, Fraction, NotNegativeFloat, NotNegativeInt, Rule, divisors, require

PartOfOne = Annotated[float, Rule(lambda value: 0 < value <= 1, "must be above 0, and 1 at most")]


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What training does to images; all of it is off by default."""

    smallest_crop: BelowOne = 0.0
    center: PartOfOne = 1.0
    flip: bool = False
    rand_augment_layers: NotNegativeInt = 0
    rand_augment_magnitude: NotNegativeFloat = 9.0
    rand_augment_deviation: NotNegativeFloat = 0.5
    erasing: Fraction = 0.0
    mixup: NotNegativeFloat = 0.0
    cutmix: NotNegativeFloat = 0.0
    label_smoothing: BelowOne = 0.0


UNCHANGED = AugmentConfig()


def check_text(model: Any) -> None:
    for key in ("vocab_size", "context_length"):
        require(getattr(model, key) > 0, f"model.{key}", getattr(model, key), "must be above 0")
    for key in ("patch_size", "image_channels", "num_classes"):
        require(getattr(model, key) == 0, f"model.{key}", getattr(model, key), "a text has none; set it to 0")


def check_image(model: Any) -> None:
    size, patch = model.image_size, model.patch_size
    require(patch > 0, "model.patch_size", patch, "must be above 0")
    require(
        size % patch == 0,
        "model.patch_size",
        patch,
        f"must divide model.image_size = {size}; use {divisors(size, patch)}",
    )
    require(model.image_channels in (1, 3), "model.image_channels", model.image_channels, "must be 1 (gray) or 3 (RGB)")
    require(model.num_classes > 1, "model.num_classes", model.num_classes, "must be 2 or above")
    for key in ("vocab_size", "context_length"):
        require(getattr(model, key) == 0, f"model.{key}", getattr(model, key), "an image has none; set it to 0")
    require(
        model.rotary_fraction == 0,
        "model.rotary_fraction",
        model.rotary_fraction,
        "positions of an image are learned; set it to 0",
    )
