"""How much each parameter token contributes: the mean of |Θ|·‖value‖ over the positions of a text.

That is the mean length of what the token adds to its projection's output.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.config import Config, ModelConfig
from tokenformer_jax.devices.progress import Progress
from tokenformer_jax.devices.sharding import replicated
from tokenformer_jax.errors import UserError
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import Tau
from tokenformer_jax.nn.watch import Seen, seen, watch
from tokenformer_jax.training.state import TrainState
from tokenformer_jax.training.step import OnMesh, Step, put_batch
from tokenformer_jax.training.tasks import Prepared, task_of

Sums = dict[str, Any]  # `nll` and `weights` of `loss_sums`, and by projection what is `watch.Seen`


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the parameter tokens do on a text of so many tokens, on which the model has this loss (nats a token)."""

    contributions: dict[str, np.ndarray]  # float32 [Y, N] by projection
    parts: dict[str, np.ndarray]  # the mean part in what scores are normalized by, likewise; a layer's sum is 1
    loss: float
    tokens: float


def contributions(
    step: Step, state: TrainState, split: Any, cfg: Config, *, max_batches: int = 0, progress: bool = False
) -> Measured:
    """Measures all of a split once, or `max_batches` batches spread over it, on the step's mesh.

    The sums are float32, and stay on the devices. Scores are those of the model, in its dtype. Of a language model each
    position counts that predicts a token; of an image all do, each as a part of it.

    Raises:
      UserError: the model has no parameter tokens.
    """
    check_has_tokens(cfg.model)
    task = task_of(cfg)
    batches = task.eval_batches(split, cfg, step.mesh, cfg.batch_size // cfg.accumulation, max_batches)
    whole = replicated(step.mesh)
    add = OnMesh(jax.jit(functools.partial(add_batch, cfg), out_shardings=whole), step.mesh)
    sums = jax.device_put(no_sums(cfg.model), whole)
    bar = Progress(0, len(batches), "batch") if progress else None
    for i, batch in enumerate(batches):
        before, sums = sums, add(sums, state, put_batch(step, batch))
        jax.block_until_ready(before)  # one behind, so that the devices stay busy
        if bar:
            bar.update(i + 1)
    if bar:
        bar.close()
    lengths = jax.jit(value_lengths, out_shardings=whole)(state.params)
    return measured(*jax.device_get((sums, lengths)))


def check_has_tokens(model: ModelConfig) -> None:
    if model.projection == "linear":
        raise UserError("model.projection = 'linear': a plain Transformer has no parameter tokens; use a TokenFormer")


def no_sums(model: ModelConfig) -> Sums:
    zeros = {name: np.zeros((model.num_layers, count), np.float32) for name, count in model.tokens.items()}
    return {"nll": np.float32(0), "weights": np.float32(0), "seen": {name: Seen(x, x) for name, x in zeros.items()}}


def add_batch(cfg: Config, sums: Sums, state: TrainState, batch: Any) -> Sums:
    return jax.tree.map(jnp.add, sums, batch_sums(cfg, state.params, state.tau_now(), batch))


def batch_sums(cfg: Config, params: Params, tau: Tau, batch: Any) -> Sums:
    """What a batch adds; positions of weight 0, which are padding, do not count."""
    model = nnx.merge(task_of(cfg).abstract_model(cfg.model)[0], params)
    watch(model.blocks, batch.weights_BL)
    nll, weights = model.loss_sums(batch, tau, cfg)
    return {"nll": nll, "weights": weights, "seen": seen(model.blocks)}


def value_lengths(params: Params) -> dict[str, jax.Array]:
    """‖value‖ of each token, [Y, N] by projection."""
    return {name: jnp.linalg.norm(tokens["values"], axis=-1) for name, tokens in params["blocks"].items()}


def measured(sums: Sums, lengths: Mapping[str, Any]) -> Measured:
    """Means of sums; `lengths` are the `value_lengths`."""
    count = sums["weights"]
    means = {name: np.asarray(of.weights * lengths[name] / count) for name, of in sums["seen"].items()}
    parts = {name: np.asarray(of.parts / count) for name, of in sums["seen"].items()}
    return Measured(means, parts, float(sums["nll"] / count), float(count))


def open_text(cfg: Config, assets: Mapping[str, str], path: str) -> Any:
    """The split of a file, folder, glob or URL of text, with a run's tokenizer: its documents that training would read.

    Raises:
      UserError: it cannot be read, or holds too little text.
    """
    if "tokenizer" not in assets:
        raise UserError(f"--text={path}: the model reads no text; leave it out")
    own: Any = {"dataset": "text_files", "path": path, "sources": (), "train_split": "train"}
    data = dataclasses.replace(cfg.data, **own, validation_split="train")
    try:
        prepared: Prepared = task_of(cfg).prepare(dataclasses.replace(cfg, data=data), assets)
    except UserError as error:  # which names keys of a training config
        said = re.sub(r"^data\.(path|train_split) = '.*?': ", "", str(error)).replace("--config.data.path", "--text")
        raise UserError(f"--text={path}: {said}") from None
    return prepared.train
