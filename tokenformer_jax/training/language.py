"""The task of a language model: to predict each next token of a text. `tasks.Task` says what each part is for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.data import batches
from tokenformer_jax.data.batches import Batch
from tokenformer_jax.data.mixture import prepare
from tokenformer_jax.data.tokenizer import tokenizer_from_json
from tokenformer_jax.data.tokens import Corpus, TokenSplit
from tokenformer_jax.devices.sharding import this_process
from tokenformer_jax.nn import language


class Language:
    """The `tasks.Task` of language models."""

    abstract_model = staticmethod(language.abstract_model)
    init_params = staticmethod(language.init_params)

    def output_loss(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        loss_BL = optax.softmax_cross_entropy_with_integer_labels(outputs, batch.targets_BL)
        return jnp.sum(loss_BL * batch.weights_BL) / jnp.sum(batch.weights_BL)

    def abstract_batch(self, cfg: Config, sharding: NamedSharding) -> Batch:
        shape = cfg.batch_size, cfg.model.context_length
        dtypes: Any = dict.fromkeys(Batch._fields, jnp.int32) | {"weights_BL": jnp.float32}
        arrays: Any = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
        return Batch(**arrays)

    def augmented(self, batch: Batch, cfg: Config, step: jax.Array) -> Batch:
        return batch

    def prepare(self, cfg: Config, assets: Mapping[str, str] | None = None) -> Corpus:
        return prepare(cfg, tokenizer_from_json(assets["tokenizer"]) if assets else None)

    def check_assets(self, found: Mapping[str, str], known: Mapping[str, str]) -> None:
        """They are the same: the data were prepared with what is known."""

    def identity(self, corpus: Corpus, cfg: Config) -> str:
        return batches.data_identity(corpus.train, cfg)

    def train_batches(self, corpus: Corpus, cfg: Config, mesh: Mesh) -> Any:
        return batches.train_batches(corpus.train, cfg, **this_process(mesh))

    def eval_batches(
        self,
        split: TokenSplit,
        cfg: Config,
        mesh: Mesh,
        rows: int,
        max_batches: int = 0,
        length: int = 0,
        stride: int = 0,
    ) -> batches.EvalBatches:
        length = min(length or cfg.model.context_length, cfg.model.context_length)
        here = this_process(mesh)
        return batches.eval_batches(split, rows, length, max_batches=max_batches, stride=stride, **here)

    def training_examples(
        self, corpus: Corpus, cfg: Config, mesh: Mesh, examples: Sequence[int]
    ) -> Iterator[tuple[Batch, str]]:
        for batch in batches.training_examples(corpus.train, cfg, examples, **this_process(mesh)):
            yield batch, corpus.tokenizer.decode(batch.tokens_BL[0].tolist())  # on process 0 its row is the first

    def tokens_per_step(self, cfg: Config) -> int:
        return cfg.batch_size * cfg.model.context_length

    def train_flops_per_token(self, cfg: ModelConfig) -> float:
        return train_flops_per_token(cfg)

    def describe_data(self, corpus: Corpus) -> str:
        parts = [f"{part.name} {part.weight:.3g} of {part.split.num_tokens:,}" for part in corpus.train.parts]
        return f"{corpus.train.num_tokens:,} training tokens{_listed(parts)}"

    def parts(self, split: TokenSplit) -> dict[str, TokenSplit]:
        return {part.name: part.split for part in split.parts}

    def joint_figures(self, split: TokenSplit, each: Mapping[str, dict[str, float]]) -> dict[str, float]:
        """Means by the weights of the mixture, and each source's `loss_NAME`."""

        def mean(name: str) -> float:
            return math.fsum(part.weight * each[part.name][name] for part in split.parts)

        loss = mean("loss")
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": mean("bits_per_byte"),
            "tokens": math.fsum(figures["tokens"] for figures in each.values()),
            **{f"loss_{name}": figures["loss"] for name, figures in each.items()},
        }

    def figures(self, split: TokenSplit, sums: Mapping[str, float]) -> dict[str, float]:
        """`loss` in nats a token, `perplexity` = exp(loss), `bits_per_byte` of the UTF-8 text, `tokens` predicted."""
        loss = sums["nll"] / sums["weights"]
        tokens_per_byte = (split.num_tokens - 1) / split.num_bytes  # the first token has nothing that predicts it
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) * tokens_per_byte,
            "tokens": sums["weights"],
        }

    def report(self, figures: dict[str, float], split_name: str) -> str:
        return (
            f"{figures['tokens']:,.0f} tokens of the {split_name} split: loss {figures['loss']:.4f} nats, "
            f"perplexity {figures['perplexity']:.5g}, {figures['bits_per_byte']:.4f} bits per byte"
        )

    def describe(self, figures: dict[str, float]) -> str:
        each = [f"{name.removeprefix('loss_')} {loss:.4f}" for name, loss in figures.items() if name[:5] == "loss_"]
        return (
            f"validation loss {figures['loss']:.4f}{_listed(each)}, perplexity "
            f"{figures['perplexity']:.4g}, {figures['bits_per_byte']:.4f} bits per byte"
        )


def _listed(parts: list[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def train_flops_per_token(cfg: ModelConfig) -> float:
    """Model FLOPs of forward and backward for one token: 6 a weight, and 12 · layers · L · D for attention.

    The attention's L × L product is counted whole, as is customary; rematerialization is not counted.
    """
    return block_flops(cfg) + 6.0 * cfg.embed_dim * cfg.vocab_size


def block_flops(cfg: ModelConfig) -> float:
    """Those of the blocks, for one position of a text or an image."""
    per_layer = 4 * cfg.embed_dim + 2 * cfg.ffn_tokens  # a plain Transformer's rows of width D
    if cfg.projection == "pattention":
        per_layer = 2 * sum(cfg.tokens.values())  # a key and a value each
    return 6.0 * cfg.embed_dim * cfg.num_layers * (per_layer + 2 * cfg.positions)
