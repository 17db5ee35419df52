"""Log-likelihoods and greedy text of many requests, in batches of a few shapes, so that few programs are compiled."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.devices.progress import Progress
from tokenformer_jax.devices.sharding import batch_sharding, replicated
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.sampling import BROKEN_MODEL, Sampling, checked, generate
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import Tau
from tokenformer_jax.storage.trained import Trained

SHORTEST = 16  # length of a batch


class Scored(NamedTuple):
    """Ids whose last ones are to be predicted from those before them."""

    ids: Sequence[int]
    last: int  # how many are predicted; fewer than all


class Score(NamedTuple):
    log_likelihood: float  # in nats, of all predicted ids together
    is_greedy: bool  # whether none is likelier than any of them


class Prompt(NamedTuple):
    ids: Sequence[int]
    max_tokens: int
    how: Sampling


class Batch(NamedTuple):
    """Requests that are computed together."""

    members: list[int]  # numbers of the requests
    rows: int  # at least as many as members
    length: int


def padded_length(length: int, longest: int) -> int:
    """The length that a request is padded to: one of 16, 24, 32, 48, 64, …, or the longest there is."""
    size = SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, longest)


def batches(lengths: Sequence[int], tokens: int, longest: int, shards: int = 1, more: int = 0) -> Iterator[Batch]:
    """Batches of requests of like length, the longest first, so that what does not fit in memory fails at once.

    Args:
      lengths: of the requests, at most `longest`.
      tokens: that a batch has at most, unless one request for each shard has more.
      longest: length of a batch.
      shards: devices, or groups of them, that the rows are spread over.
      more: tokens of a row beside its length.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        length = padded_length(lengths[order[0]], longest)
        rows = min(max(tokens // (length + more) // shards, 1), -(-len(order) // shards)) * shards
        yield Batch(order[:rows], rows, length)
        order = order[rows:]


@functools.partial(jax.jit, static_argnums=(0, 6))
def _score(
    cfg: ModelConfig,
    params: Params,
    tau: Tau,
    tokens_BL: jax.Array,
    targets_BL: jax.Array,
    is_scored_BL: jax.Array,
    whole: Any,
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihoods [B] of the scored targets, and whether no id is likelier than one of them, on every device."""
    model = nnx.merge(abstract_model(cfg)[0], params)
    scores_BL, are_likeliest_BL = model.log_likelihoods(tokens_BL, targets_BL, tau)
    scores_B = jnp.sum(jnp.where(is_scored_BL, scores_BL, 0.0), axis=1)
    return jax.lax.with_sharding_constraint(
        (scores_B, jnp.all(are_likeliest_BL | ~is_scored_BL, axis=1)), (whole, whole)
    )


@functools.partial(jax.jit, static_argnums=1)
def _replicate(x: jax.Array, whole: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, whole)


class Scorer:
    """A trained model on its mesh. All processes call its methods with the same requests, and get the same results.

    A batch has as many tokens as `batch_size` rows of the model's context; of shorter requests it has more rows.
    """

    def __init__(self, run: Trained, batch_size: int = 0, context_length: int = 0):
        self.run, self.cfg, self.mesh = run, run.cfg.model, run.step.mesh
        self.context_length = context_length or self.cfg.context_length
        self.shards = run.cfg.mesh.batch_shards
        self.tokens = (batch_size or run.cfg.batch_size // run.cfg.accumulation) * self.context_length
        self.tau = jax.device_get(run.state.tau_now())
        self.shapes: set[tuple[int, ...]] = set()  # of batches so far: a program each

    def plan(self, requests: Sequence[Scored]) -> Iterator[Batch]:
        """The batches that requests are scored in."""
        lengths = [min(len(ids) - 1, self.context_length) for ids, _ in requests]
        return batches(lengths, self.tokens, self.context_length, self.shards)

    def score(self, requests: Sequence[Scored]) -> list[Score]:
        """The scores of requests, in their order.

        Of ids that are more than the context and one, the last ones count; of predicted ids those that are left.
        """
        cuts = [ids[-self.context_length - 1 :] for ids, _ in requests]
        found: list[Score] = [Score(0.0, True)] * len(requests)
        bar, done = Progress(0, len(requests), "request"), 0
        waiting: list[tuple[Batch, Any]] = []

        def take() -> None:
            nonlocal done
            batch, scores = waiting.pop(0)
            log_likelihoods, greedy = (x.tolist() for x in jax.device_get(scores))
            if not all(map(math.isfinite, log_likelihoods)):
                raise UserError(BROKEN_MODEL)
            for row, number in enumerate(batch.members):
                found[number] = Score(log_likelihoods[row], greedy[row])
            done += len(batch.members)
            bar.update(done)

        for batch in self.plan(requests):
            ids_BL = np.zeros((batch.rows, batch.length + 1), np.int32)
            is_scored_BL = np.zeros((batch.rows, batch.length), bool)
            for row, number in enumerate(batch.members):
                ids = cuts[number]
                ids_BL[row, : len(ids)] = ids
                is_scored_BL[row, max(0, len(ids) - 1 - requests[number].last) : len(ids) - 1] = True
            arrays = [self._put(rows) for rows in (ids_BL[:, :-1], ids_BL[:, 1:], is_scored_BL)]
            self.shapes.add((batch.rows, batch.length))
            with jax.set_mesh(self.mesh):
                scores = _score(self.cfg, self.run.state.params, self.tau, *arrays, replicated(self.mesh))
            waiting.append((batch, scores))
            if len(waiting) > 1:  # one behind, so that the devices stay busy
                take()
        while waiting:
            take()
        bar.close()
        return found

    def generate(
        self, prompts: Sequence[Prompt], end: int, is_done: Callable[[int, list[int]], bool]
    ) -> list[list[int]]:
        """The ids that continue each prompt, up to `end`, to its `max_tokens`, or until `is_done(number, ids)`.

        A prompt and its `max_tokens` must fit into the context.
        """
        found: list[list[int]] = [[] for _ in prompts]
        bar, done = Progress(0, len(prompts), "request"), 0
        groups: dict[Any, list[int]] = {}
        for number, prompt in enumerate(prompts):
            groups.setdefault(prompt[1:], []).append(number)
        for (max_tokens, how), group in groups.items():
            lengths = [len(prompts[number].ids) for number in group]
            longest = self.context_length + 1 - max_tokens  # the last token is not read again
            for batch in batches(lengths, self.tokens, longest, self.shards, more=max_tokens):
                members = [group[member] for member in batch.members]
                prompt_BL = np.full((batch.rows, batch.length), end, np.int32)
                padding_B = np.zeros(batch.rows, np.int32)
                for row, number in enumerate(members):
                    padding_B[row] = batch.length - len(prompts[number].ids)
                    prompt_BL[row, padding_B[row] :] = prompts[number].ids
                unfinished = dict(enumerate(members))
                with jax.set_mesh(self.mesh):
                    for ids_B in self._continuations(prompt_BL, padding_B, max_tokens, how):
                        for row, number in list(unfinished.items()):
                            if ids_B[row] != end:
                                found[number].append(int(ids_B[row]))
                            if ids_B[row] == end or is_done(number, found[number]):
                                del unfinished[row]
                        if not unfinished:
                            break
                done += len(members)
                bar.update(done)
        bar.close()
        return found

    def _continuations(
        self, prompt_BL: np.ndarray, padding_B: np.ndarray, max_tokens: int, how: Sampling
    ) -> Iterator[np.ndarray]:
        """The next ids [B], again and again, under the mesh."""
        stream = generate(
            self.cfg,
            self.run.state.params,
            self.tau,
            self._put(prompt_BL),
            max_tokens,
            how=how,
            num_ids=self.run.tokenizer.vocab_size,
            padding_B=self._put(padding_B),
        )
        for ids_LB in stream:
            yield from checked(ids_LB if ids_LB.is_fully_addressable else _replicate(ids_LB, replicated(self.mesh)))

    def _put(self, rows: np.ndarray) -> jax.Array:
        """Rows that all processes have -> an array that is spread over the mesh."""
        return jax.make_array_from_callback(rows.shape, batch_sharding(self.mesh), lambda place: rows[place])
