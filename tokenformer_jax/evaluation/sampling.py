"""Samples text from a model, with a KV cache."""

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.errors import UserError
from tokenformer_jax.nn.attention import KVCache, UnstackedKVCache
from tokenformer_jax.nn.backends import stacks_layers_to_decode, turn_values
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import Tau, unstack
from tokenformer_jax.storage.trained import Trained

SMALLEST = float(np.finfo(np.float32).tiny)  # what is smaller is 0 to a device
HOTTEST = 1e30  # evens out all logits; a device lacks the inverse of far higher ones
BLOCK = 8  # tokens that one program computes, since starting it can take as long as a token of a small model
BROKEN = -1  # in the place of a token id whose logits are not finite
BROKEN_MODEL = (
    "the model is broken: its logits are not finite; the checkpoint of an earlier step may be good "
    "(--step, of generate and evaluate)"
)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: must be 0 (greedy) or above")
        if not isinstance(self.top_k, numbers.Integral) or self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: must be a whole number, 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be above 0 and at most 1 (off)")


def sample(logits_BV: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """Draws token ids [B] from float32 logits [B, V]: temperature, then top-k, then top-p (nucleus)."""
    if how.temperature < SMALLEST:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV -= jnp.max(logits_BV, axis=-1, keepdims=True)  # so that the largest stays finite
    logits_BV /= min(how.temperature, HOTTEST)
    if 0 < how.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, how.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if how.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        is_kept_BV = (before_BV < how.top_p).at[:, 0].set(True)  # also where top_p is 0 in float32
        kept_BV = jnp.where(is_kept_BV, sorted_BV, jnp.inf)
        logits_BV = jnp.where(logits_BV < jnp.min(kept_BV, axis=-1, keepdims=True), -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1)


@functools.cache
def make_decoder(
    cfg: ModelConfig, how: Sampling, num_ids: int | None = None
) -> Callable[[Params, Tau, jax.Array, KVCache, jax.Array], tuple[jax.Array, KVCache]]:
    """A compiled function: (params, τ, tokens [B, L] or [B], cache, key) -> next tokens [B] (or BROKEN), cache.

    The blocks' parameters are stacked, or a list, from `decoding_params`. The cache is donated. Of the vocabulary only
    the first `num_ids` are drawn: the rest may be padding.
    """
    graphdef, _, _ = abstract_model(cfg)

    def decode(params: Params, tau: Tau, tokens: jax.Array, cache: KVCache, key: jax.Array):
        layers = params["blocks"] if isinstance(params["blocks"], list) else None
        if layers:
            layers = turn_values(layers)
            params = params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}  # which nothing reads
        model = nnx.merge(graphdef, params)
        x_BLD, cache = model.features(tokens.reshape(len(tokens), -1), tau, cache=cache, layers=layers)
        logits_BV = model.logits(x_BLD[:, -1:])[:, 0, :num_ids]
        is_finite_B = jnp.isfinite(logits_BV).all(axis=-1)
        return jnp.where(is_finite_B, sample(logits_BV, key, how), BROKEN), cache

    return jax.jit(decode, donate_argnums=3)


@functools.cache
def make_loop(
    cfg: ModelConfig, how: Sampling, num_ids: int | None, count: int
) -> Callable[[Params, Tau, jax.Array, KVCache, jax.Array, int], tuple[jax.Array, KVCache]]:
    """A compiled function: (params, τ, tokens [B], cache, key, first) -> the next `count` ids [L, B], cache.

    Position i is drawn with `fold_in(key, i)`; `first` is the first of them.
    """
    decode = make_decoder(cfg, how, num_ids)

    def loop(params: Params, tau: Tau, tokens_B: jax.Array, cache: KVCache, key: jax.Array, first: int):
        def one(carry: tuple[jax.Array, KVCache], i: jax.Array):
            tokens_B, cache = decode(params, tau, *carry, jax.random.fold_in(key, i))
            return (tokens_B, cache), tokens_B

        (_, cache), ids_LB = jax.lax.scan(one, (tokens_B, cache), first + jnp.arange(count))
        return ids_LB, cache

    return jax.jit(loop, donate_argnums=3)


@functools.partial(jax.jit, static_argnums=0)
def decoding_params(cfg: ModelConfig, params: Params) -> Params:
    """Parameters as a next token reads them: cast once, and where the platform wants it each layer's own, in a list.

    The final norm's scale and bias, the only vectors, are computed with in float32 and stay so.
    """
    params = jax.tree.map(lambda x: x.astype(cfg.dtype) if x.ndim > 1 else x, params)
    return params if stacks_layers_to_decode() else params | {"blocks": turn_values(unstack(params["blocks"]))}


def empty_cache(cfg: ModelConfig, batch: int, size: int) -> Any:
    """A cache that goes with `decoding_params`."""
    return (KVCache if stacks_layers_to_decode() else UnstackedKVCache).empty(cfg, batch, size)


def generate(
    cfg: ModelConfig,
    params: Params,
    tau: Tau,
    prompt_BL: jax.Array,
    max_tokens: int,
    *,
    how: Sampling,
    seed: int = 0,
    num_ids: int | None = None,
    padding_B: jax.Array | None = None,
    block: int = BLOCK,
) -> Iterator[jax.Array]:
    """Yields `max_tokens` next token ids [L, B], the first one alone, then `block` at a time; the seed decides them.

    The devices compute a block while the one before is read. An id is BROKEN where the logits are not finite; `checked`
    tells. Of prompts of several lengths the shorter ones begin with padding, whose lengths are `padding_B`.

    Raises:
      UserError: where prompt and continuation are longer than the context the model was trained on.
    """
    batch, length = prompt_BL.shape
    if not isinstance(max_tokens, numbers.Integral) or max_tokens < 1:
        raise UserError(f"max_tokens = {max_tokens}: must be a whole number, 1 or above")
    if length > cfg.context_length:
        raise UserError(f"prompt: has {length} tokens, more than the model's context; use at most {cfg.context_length}")
    longest = cfg.context_length - length + 1  # the last token is not read again
    if max_tokens > longest:
        raise UserError(
            f"max_tokens = {max_tokens}: with a prompt of {length} tokens that is longer than the model's context of "
            f"{cfg.context_length}; use {longest}"
        )
    count = min(block, max_tokens - 1)
    blocks = -(-(max_tokens - 1) // max(count, 1))
    key = jax.random.key(seed)
    params = decoding_params(cfg, params)

    def stream() -> Iterator[jax.Array]:
        cache = empty_cache(cfg, batch, length + blocks * count)._replace(padding=padding_B)
        tokens_B, cache = make_decoder(cfg, how, num_ids)(params, tau, prompt_BL, cache, jax.random.fold_in(key, 0))
        ids_LB = tokens_B[None]
        for first in range(1, max_tokens, max(count, 1)):
            following, cache = make_loop(cfg, how, num_ids, count)(params, tau, ids_LB[-1], cache, key, first)
            yield ids_LB
            ids_LB = following[: max_tokens - first]
        yield ids_LB

    return stream()


def checked(ids: jax.Array) -> np.ndarray:
    """The ids, on the host. Raises a UserError where one is BROKEN."""
    found = np.asarray(ids)
    if (found == BROKEN).any():
        raise UserError(BROKEN_MODEL)
    return found


def readable(decode: Callable[[list[int]], str], ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they come; a character that takes several is held back until it is whole."""
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = decode(seen)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield decode(seen)[len(shown) :]


def print_samples(run: Trained, text: str, max_tokens: int, samples: int, how: Sampling, seed: int) -> None:
    """Prints continuations of a text: a single one as it comes, several when all have ended."""
    tokenizer, end = run.tokenizer, run.tokenizer.end_of_text
    text = text.encode(errors="surrogateescape").decode(errors="replace")  # a shell passes any bytes
    prompt, longest = tokenizer.encode(text), run.cfg.model.context_length - 1  # after the end of another text
    if len(prompt) > longest:
        raise UserError(f"--prompt: has {len(prompt)} tokens, more than the model's context; use at most {longest}")
    prompt_BL = jnp.tile(jnp.asarray([end, *prompt], jnp.int32), (samples, 1))
    stream = generate(
        run.cfg.model,
        run.state.params,
        run.state.tau_now(),
        prompt_BL,
        max_tokens,
        how=how,
        seed=seed,
        num_ids=tokenizer.vocab_size,
        block=1 if samples == 1 else BLOCK,  # a reader sees each token at once
    )
    with jax.set_mesh(run.step.mesh):
        if samples == 1:
            ids = itertools.takewhile(lambda token: token != end, (int(checked(ids_LB)[0, 0]) for ids_LB in stream))
            pieces = readable(functools.partial(tokenizer.continuation, prompt), ids)
            print(text + next(pieces), end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
            return
        rows, ended = [], np.zeros(samples, bool)
        for ids_LB in map(checked, stream):
            rows.append(ids_LB)
            ended |= (ids_LB == end).any(axis=0)
            if ended.all():
                break
    for i, column in enumerate(np.concatenate(rows).T.tolist()):
        continuation = list(itertools.takewhile(lambda token: token != end, column))
        print(f"--- sample {i + 1} ---\n{text}{tokenizer.continuation(prompt, continuation)}")
