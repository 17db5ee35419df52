"""The task of an image classifier: to name the class of an image. `tasks.Task` says what each part is for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.data import image_batches
from tokenformer_jax.data.augment import augment
from tokenformer_jax.data.image_batches import ImageBatch
from tokenformer_jax.data.images import ImageData, open_images
from tokenformer_jax.data.pictures import Pictures
from tokenformer_jax.devices.sharding import this_process
from tokenformer_jax.image_config import UNCHANGED
from tokenformer_jax.nn import vision
from tokenformer_jax.nn.layers import subkey
from tokenformer_jax.training.language import block_flops

AUGMENTS = 2**31 + 1  # folded into the seed; see `step.MASKS`


class ImageClassification:
    """The `tasks.Task` of image classifiers."""

    abstract_model = staticmethod(vision.abstract_model)
    init_params = staticmethod(vision.init_params)

    def output_loss(self, outputs: jax.Array, batch: ImageBatch) -> jax.Array:
        loss_B = optax.softmax_cross_entropy_with_integer_labels(outputs, batch.targets[:, 0])
        weights_B = batch.weights_BL[:, 0]
        return jnp.sum(loss_B * weights_B) / jnp.maximum(jnp.sum(weights_B), 1.0)

    def abstract_batch(self, cfg: Config, sharding: NamedSharding) -> ImageBatch:
        rows, model = cfg.batch_size, cfg.model
        arrays = (
            ((rows, model.image_size, model.image_size, model.image_channels), jnp.uint8),
            ((rows, 1), jnp.int32),
            ((rows, 1), jnp.float32),
        )
        abstract: Any = (jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays)
        return ImageBatch(*abstract)

    def augmented(self, batch: ImageBatch, cfg: Config, step: jax.Array) -> ImageBatch:
        if cfg.augment == UNCHANGED:
            return batch
        rng = subkey(subkey(jax.random.key(cfg.seed), AUGMENTS), step)
        labels_B = jnp.where(batch.weights_BL[:, 0] > 0, batch.targets[:, 0], -1)
        made: Any = augment(rng, jnp.asarray(batch.images_BHWC), labels_B, cfg.augment, cfg.model.num_classes)
        return batch._replace(images_BHWC=made[0], targets=made[1])

    def prepare(self, cfg: Config, assets: Mapping[str, str] | None = None) -> ImageData:
        return open_images(cfg)

    def identity(self, data: ImageData, cfg: Config) -> str:
        return image_batches.data_identity(data.train, cfg)

    def train_batches(self, data: ImageData, cfg: Config, mesh: Mesh) -> Any:
        return image_batches.train_batches(data.train, cfg, **this_process(mesh))

    def eval_batches(
        self,
        split: Pictures,
        cfg: Config,
        mesh: Mesh,
        rows: int,
        max_batches: int = 0,
        length: int = 0,
        stride: int = 0,
    ) -> image_batches.EvalImages:
        return image_batches.eval_batches(split, rows, max_batches=max_batches, **this_process(mesh))

    def training_examples(
        self, data: ImageData, cfg: Config, mesh: Mesh, examples: Sequence[int]
    ) -> Iterator[tuple[ImageBatch, str]]:
        yield from image_batches.training_examples(data.train, cfg, examples, **this_process(mesh))

    def tokens_per_step(self, cfg: Config) -> int:
        return cfg.batch_size * cfg.model.positions

    def train_flops_per_token(self, cfg: ModelConfig) -> float:
        return train_flops_per_image(cfg) / cfg.positions

    def describe_data(self, data: ImageData) -> str:
        return f"{len(data.train):,} training images of {len(data.train.class_names)} classes"

    def parts(self, split: Pictures) -> dict[str, Any]:
        return {}

    def joint_figures(self, split: Pictures, each: Mapping[str, dict[str, float]]) -> dict[str, float]:
        raise NotImplementedError("a split of images has no parts")

    def figures(self, split: Pictures, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss` in nats an image, `top1` and `top5`: parts of the images whose label is first, or among five."""
        images = max(sums["weights"], 1.0)
        return {
            "loss": sums["nll"] / images,
            "top1": sums["top1"] / images,
            "top5": sums["top5"] / images,
            "images": sums["weights"],
        }

    def report(self, figures: dict[str, float], split_name: str) -> str:
        return (
            f"{figures['images']:,.0f} images of the {split_name} split: loss {figures['loss']:.4f} nats, "
            f"top-1 {figures['top1']:.2%}, top-5 {figures['top5']:.2%}"
        )

    def describe(self, figures: dict[str, float]) -> str:
        return (
            f"validation loss {figures['loss']:.4f}, top-1 {figures['top1']:.2%}, top-5 {figures['top5']:.2%} of "
            f"{figures['images']:,.0f} images"
        )


def train_flops_per_image(cfg: ModelConfig) -> float:
    """Model FLOPs of forward and backward for one image: 6 a weight and position, 12 · layers · L² · D for attention.

    The gradient to the pixels, which nothing needs, is not counted; nor is rematerialization.
    """
    of_patches = 4.0 * cfg.num_patches * cfg.patch_size**2 * cfg.image_channels * cfg.embed_dim
    return cfg.positions * block_flops(cfg) + of_patches + 6.0 * cfg.num_classes * cfg.embed_dim
