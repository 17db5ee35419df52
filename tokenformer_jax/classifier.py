"""The Python face of image classifiers: one object of config, parameters and τ, with what one does with a model."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.any_tokenformer import AnyTokenFormer
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.data.images import class_names
from tokenformer_jax.errors import UserError
from tokenformer_jax.nn import vision


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenFormerClassifier(AnyTokenFormer):
    """An image classifier. Methods compute; none changes it.

    `params` is a nested dict of float32 arrays; those of a block are stacked over layers. A UserError names the
    argument that cannot be used.
    """

    class_names: tuple[str, ...] = ()
    sees_images: ClassVar[bool] = True

    @staticmethod
    def network() -> Any:
        return vision

    def checked(self, inputs: Any) -> jax.Array:
        return self._images(inputs)

    def reads(self) -> str:
        cfg = self.cfg
        return f"{cfg.image_size} x {cfg.image_size} pixels in patches of {cfg.patch_size}, {cfg.num_classes} classes"

    @staticmethod
    def fields_of(assets: Mapping[str, str]) -> tuple[Any, ...]:
        return (tuple(class_names(assets)),)

    @classmethod
    def init(cls, cfg: ModelConfig, seed: int = 0) -> Self:
        """A new model with the authors' initialization; its classes are called "0", "1", ….

        >>> model = TokenFormerClassifier.init(read_config(imagenet.get_config("b16").to_dict()).model)
        """
        model = super().init(cfg, seed)
        return dataclasses.replace(model, class_names=tuple(map(str, range(cfg.num_classes))))

    def logits(self, images_BHWC: Any) -> jax.Array:
        """float32 [B, V] of V classes, of uint8 images [B, size, size, channels] (floats: in [-1, 1]).

        >>> model.logits(images)
        """
        return _logits(self.cfg, self.params, self.tau, self._images(images_BHWC))

    def probabilities(self, images_BHWC: Any) -> jax.Array:
        """float32 [B, V], which sum to 1 over V classes; images as for `logits`.

        >>> model.probabilities(images).max(axis=1)
        """
        return jax.nn.softmax(self.logits(images_BHWC))

    def classify(self, images_BHWC: Any) -> list[str]:
        """The likeliest class of each image.

        >>> model.classify(images)
        """
        return [self.class_names[i] for i in np.asarray(jnp.argmax(self.logits(images_BHWC), axis=1))]

    def _images(self, images: Any) -> jax.Array:
        size, channels = self.cfg.image_size, self.cfg.image_channels
        try:
            array = jnp.asarray(images)
        except (TypeError, ValueError):
            raise UserError("images_BHWC: must be an array of images, all of the same size") from None
        if array.ndim != 4 or array.shape[1:] != (size, size, channels) or not len(array):
            raise UserError(f"images_BHWC: has shape {list(array.shape)}; use [B, {size}, {size}, {channels}]")
        is_float = jnp.issubdtype(array.dtype, jnp.floating)
        if array.dtype != jnp.uint8 and not is_float:
            raise UserError(f"images_BHWC: is {array.dtype}; use uint8, or floats in [-1, 1]")
        if is_float and not (jnp.abs(array) <= 1).all():
            raise UserError("images_BHWC: has floats beyond [-1, 1]; use uint8, or pixels / 127.5 - 1")
        return array


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, params: Any, tau: dict[str, float], images_BHWC: jax.Array) -> jax.Array:
    return nnx.merge(vision.abstract_model(cfg)[0], params)(images_BHWC, tau)
