"""The Python face of image classifiers: one object of config, parameters and τ, with what one does with a model."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.buckets import bucket_errors
from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.data.images import class_names
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.perplexity import choose_split, evaluate_split
from tokenformer_jax.files import run_path
from tokenformer_jax.nn import vision
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.resizable import Resizable, check_config, check_model, check_seed
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.step import make_step
from tokenformer_jax.training.tasks import task_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenFormerClassifier(Resizable):
    """An image classifier. Methods compute; none changes it.

    `params` is a nested dict of float32 arrays; those of a block are stacked over layers. A UserError names the
    argument that cannot be used.
    """

    class_names: tuple[str, ...] = ()

    @staticmethod
    def network() -> Any:
        return vision

    def checked(self, inputs: Any) -> jax.Array:
        return self._images(inputs)

    def __repr__(self) -> str:
        cfg, tokens = self.cfg, ", ".join(f"{name} {count}" for name, count in self.cfg.unpadded_tokens.items())
        return (
            f"TokenFormerClassifier({count_params(self.params):,} parameters: {cfg.num_layers} layers of width "
            f"{cfg.embed_dim}, parameter tokens {tokens or 'none'}, {cfg.image_size} x {cfg.image_size} pixels in "
            f"patches of {cfg.patch_size}, {cfg.num_classes} classes, {cfg.dtype})"
        )

    @classmethod
    def init(cls, cfg: ModelConfig, seed: int = 0) -> "TokenFormerClassifier":
        """A new model.

        >>> model = TokenFormerClassifier.init(read_config(imagenet.get_config("b16").to_dict()).model)
        """
        check_model(cfg)
        if not cfg.image_size:
            raise UserError("cfg.image_size = 0: this model reads text; use TokenFormer")
        check_seed(seed)
        params = jax.jit(vision.init_params, static_argnums=0)(cfg, jax.random.key(seed))
        return cls(cfg, params, initial_tau(cfg), tuple(map(str, range(cfg.num_classes))))

    @classmethod
    def load(cls, workdir: str | os.PathLike[str], step: int | None = None) -> "TokenFormerClassifier":
        """The newest (or given) checkpoint of a workdir of train or grow; the mean of its weights where it has one.

        Raises UserError where there is none, or it cannot be read.

        >>> model = TokenFormerClassifier.load("runs/digits/grown")
        """
        folder = run_path(workdir, "workdir")
        with bucket_errors(folder):
            run = load_trained(folder, step)
        if not run.cfg.model.image_size:
            raise UserError(f"workdir: {workdir} holds a model that reads text; use TokenFormer")
        tau = run.state.tau_values()
        return cls(run.cfg.model, run.state.params, tau, tuple(class_names(run.assets)))

    @classmethod
    def train(cls, cfg: Config, workdir: str | pathlib.Path) -> "TokenFormerClassifier":
        """Trains as the command `train` does, or goes on with what the workdir holds; the model of its last step.

        >>> model = TokenFormerClassifier.train(read_config(digits.get_config("small").to_dict()), "runs/mine")
        """
        check_config(cfg)
        folder = run_path(workdir, "workdir")
        with bucket_errors(folder):
            train(cfg, folder)
        return cls.load(folder)

    def evaluate(self, cfg: Config, split: str = "validation") -> dict[str, float]:
        """Loss in nats an image, top-1 and top-5 on a split of a config's data, every image once.

        >>> model.evaluate(cfg)["top1"]
        """
        cfg = self.fitted(cfg)
        step, data = make_step(cfg, make_mesh(cfg.mesh)), task_of(cfg).prepare(cfg)
        abstract = step.abstract_state._replace(opt_state=(), average=())
        state = jax.device_put(self.state(), jax.tree.map(lambda a: a.sharding, abstract))
        return evaluate_split(step, state, choose_split(data, split), cfg)

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
        if array.dtype != jnp.uint8 and not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"images_BHWC: is {array.dtype}; use uint8, or floats in [-1, 1]")
        return array


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, params: Any, tau: dict[str, float], images_BHWC: jax.Array) -> jax.Array:
    return nnx.merge(vision.abstract_model(cfg)[0], params)(images_BHWC, tau)
