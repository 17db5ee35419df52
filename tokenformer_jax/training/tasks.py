"""What a kind of model does in its own way: network, loss, data and figures. `config.task` names one.

Step, loop, checkpoints, growth and plan know a model by its task alone. A new task is a class like `language.Language`
in a file of its own, an entry of TASKS, and a name in the config's choices.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.training.images import ImageClassification
from tokenformer_jax.training.language import Language
from tokenformer_jax.training.nested import sizes


class Prepared(Protocol):
    """The data of a run."""

    @property
    def train(self) -> Any:
        """The split to learn from."""

    @property
    def validation(self) -> Any:
        """The split to evaluate on."""

    @property
    def assets(self) -> dict[str, str]:
        """What a checkpoint must hold so that the same data can be prepared again, such as the tokenizer; by name."""


class Task(Protocol):
    # The network: an nnx.Module whose Pattentions stand in `blocks`, stacked over layers. Its methods `loss_sums`,
    # `sums` and `outputs` take a batch, τ and the config. They give the sums of losses (nats) and of weights; these and
    # what else an evaluation adds up, by name, its `nll` and `weights` among it; and logits.

    def abstract_model(self, cfg: ModelConfig) -> tuple[Any, Params, Params]:
        """The network's graphdef, the tree of ShapeDtypeStructs and the tree of their logical axes."""

    def init_params(self, cfg: ModelConfig, key: jax.Array) -> Params:
        """Draws all parameters."""

    # The loss.

    def output_loss(self, outputs: jax.Array, batch: Any) -> jax.Array:
        """The mean loss that logits have, in nats."""

    def abstract_batch(self, cfg: Config, sharding: NamedSharding) -> Any:
        """A training batch as ShapeDtypeStructs. It has an array `weights_BL`: what counts, and 0 for padding."""

    def augmented(self, batch: Any, cfg: Config, step: jax.Array) -> Any:
        """What a training step learns from in place of a batch, on the device: a function of seed and step."""

    # The data.

    def prepare(self, cfg: Config, assets: Mapping[str, str] | None = None) -> Prepared:
        """Opens the data, made before with these assets or made now. Raises a UserError where it cannot be used."""

    def identity(self, data: Any, cfg: Config) -> str:
        """What a position in the training data refers to."""

    def train_batches(self, data: Any, cfg: Config, mesh: Mesh) -> Any:
        """An endless iterator over this process's rows of training batches, whose state is its `next_index`."""

    def eval_batches(
        self, split: Any, cfg: Config, mesh: Mesh, rows: int, max_batches: int = 0, length: int = 0, stride: int = 0
    ) -> Sequence[Any]:
        """Batches of so many rows with all of a split once, or `max_batches` spread over it; of at most this length.

        With a stride, a text's windows overlap by the rest of the length.
        """

    def training_examples(
        self, data: Any, cfg: Config, mesh: Mesh, examples: Sequence[int]
    ) -> Iterator[tuple[Any, str]]:
        """By number in the order of training: each in a batch padded otherwise, and what it is, in words."""

    # The figures.

    def tokens_per_step(self, cfg: Config) -> int:
        """Positions that a step learns from."""

    def train_flops_per_token(self, cfg: ModelConfig) -> float:
        """Model FLOPs of forward and backward."""

    def describe_data(self, data: Any) -> str:
        """The size of the training data, in words."""

    def figures(self, split: Any, sums: Mapping[str, float]) -> dict[str, float]:
        """What an evaluation reports of the network's `sums` over a split, its `loss` among it."""

    def parts(self, split: Any) -> dict[str, Any]:
        """What of a split is evaluated apart, by name; empty where it is evaluated as one."""

    def joint_figures(self, split: Any, each: Mapping[str, dict[str, float]]) -> dict[str, float]:
        """What an evaluation reports of the figures of these parts."""

    def describe(self, figures: dict[str, float]) -> str:
        """An evaluation in words, within a run."""

    def report(self, figures: dict[str, float], split_name: str) -> str:
        """An evaluation of all of a split in words."""


TASKS: dict[str, Task] = {"language": Language(), "image_classification": ImageClassification()}


def task_of(cfg: Config) -> Task:
    return TASKS[cfg.task]


def flops_per_token(cfg: Config) -> float:
    """Model FLOPs of forward and backward; of a nested model the mean over its sizes."""
    each = [task_of(cfg).train_flops_per_token(size) for size in sizes(cfg.model)]
    return sum(each) / len(each)
