"""Samples text from a trained model, with a KV cache.

python -m tokenformer_jax.generate --workdir=W --prompt='def main(' [--temperature=0.8] [--top_p=0.95]
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from tokenformer_jax.config import ModelConfig, UserError, run_command, workdir_flag
from tokenformer_jax.evaluate import load_trained, mesh_flag
from tokenformer_jax.sharding import platform
from tokenformer_jax.transformer import KVCache, Params, Tau, abstract_model, unstack


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature}: must be 0 (greedy) or above")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k}: must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: must be above 0 and at most 1 (off)")


def sample(logits_BV: jax.Array, key: jax.Array, how: Sampling) -> jax.Array:
    """Draws token ids [B] from float32 logits [B, V]: temperature, then top-k, then top-p (nucleus)."""
    if how.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)
    logits_BV = logits_BV / how.temperature
    if 0 < how.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, how.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if how.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        kept_BV = jnp.where(before_BV < how.top_p, sorted_BV, jnp.inf)  # the most likely one is always kept
        logits_BV = jnp.where(logits_BV < jnp.min(kept_BV, axis=-1, keepdims=True), -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1)


@functools.cache
def make_decoder(
    cfg: ModelConfig, how: Sampling, num_ids: int | None = None
) -> Callable[[Params, Tau, jax.Array, KVCache, jax.Array], tuple[jax.Array, KVCache]]:
    """A compiled function: (params, τ, tokens [B, L], cache, key) -> next tokens [B], cache.

    The blocks' parameters are stacked, or a list, from `unstack`. The cache is donated. Of the vocabulary only the
    first `num_ids` are drawn: the rest may be padding.
    """
    graphdef, _, _ = abstract_model(cfg)

    def decode(params: Params, tau: Tau, tokens_BL: jax.Array, cache: KVCache, key: jax.Array):
        layers = params["blocks"] if isinstance(params["blocks"], list) else None
        if layers:
            params = params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}  # which nothing reads
        model = nnx.merge(graphdef, params)
        x_BLD, cache = model.features(tokens_BL, tau, cache=cache, layers=layers)
        logits_BV = model.logits(x_BLD[:, -1:])[:, 0]
        return sample(logits_BV[:, :num_ids], key, how), cache

    return jax.jit(decode, donate_argnums=3)


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
) -> Iterator[jax.Array]:
    """Yields the next token ids [B] one position at a time, at most `max_tokens`; the same seed gives the same text.

    Raises:
      UserError: where prompt and continuation are longer than the context the model was trained on.
    """
    batch, length = prompt_BL.shape
    if max_tokens < 1:
        raise UserError(f"max_tokens = {max_tokens}: must be 1 or above")
    if length + max_tokens > cfg.context_length:
        raise UserError(
            f"max_tokens = {max_tokens}: with a prompt of {length} tokens that is longer than the model's context of "
            f"{cfg.context_length}; {max(cfg.context_length - length, 0)} would do"
        )
    decode = make_decoder(cfg, how, num_ids)
    key = jax.random.key(seed)
    stacked = platform() != "cpu"
    if not stacked:
        params = params | {"blocks": unstack(params["blocks"])}

    def stream() -> Iterator[jax.Array]:
        tokens_BL, cache = prompt_BL, KVCache.empty(cfg, batch, length + max_tokens, stacked)
        for i in range(max_tokens):
            tokens_B, cache = decode(params, tau, tokens_BL, cache, jax.random.fold_in(key, i))
            yield tokens_B
            tokens_BL = tokens_B[:, None]

    return stream()


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


def main() -> None:
    how = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    how.check()
    if _SAMPLES.value < 1:
        raise UserError(f"--samples={_SAMPLES.value}: must be 1 or above")
    if not 0 <= _SEED.value < 2**63:
        raise UserError(f"--seed={_SEED.value}: must lie between 0 and 2**63")
    run = load_trained(_WORKDIR(), _STEP.value, _MESH())
    tokenizer, end = run.tokenizer, run.tokenizer.end_of_text
    text = _PROMPT.value.encode(errors="surrogateescape").decode(errors="replace")  # a shell passes any bytes
    prompt_BL = jnp.tile(jnp.asarray([end, *tokenizer.encode(text)], jnp.int32), (_SAMPLES.value, 1))
    stream = generate(
        run.cfg.model,
        run.state.params,
        run.state.tau_now(),
        prompt_BL,
        _MAX_TOKENS.value,
        how=how,
        seed=_SEED.value,
        num_ids=tokenizer.vocab_size,
    )
    with jax.set_mesh(run.step.mesh):
        if _SAMPLES.value == 1:  # shown as it comes
            print(text, end="")
            ids = itertools.takewhile(lambda token: token != end, (int(tokens_B[0]) for tokens_B in stream))
            for piece in readable(tokenizer.decode, ids):
                print(piece, end="", flush=True)
            print()
            return
        rows, ended = [], np.zeros(_SAMPLES.value, bool)
        for tokens_B in stream:
            rows.append(np.asarray(tokens_B))
            ended |= rows[-1] == end
            if ended.all():
                break
    for i, column in enumerate(np.stack(rows, axis=1).tolist()):
        continuation = list(itertools.takewhile(lambda token: token != end, column))
        print(f"--- sample {i + 1} ---\n{text}{tokenizer.decode(continuation)}")


if __name__ == "__main__":
    _WORKDIR = workdir_flag()
    _PROMPT = flags.DEFINE_string("prompt", "", "text to continue")
    _MAX_TOKENS = flags.DEFINE_integer(
        "max_tokens", 128, "tokens to add at most; the end-of-text token ends it earlier"
    )
    _SAMPLES = flags.DEFINE_integer("samples", 1, "continuations to draw")
    _TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy")
    _TOP_K = flags.DEFINE_integer("top_k", 0, "draw from the k likeliest tokens only; 0 from all")
    _TOP_P = flags.DEFINE_float("top_p", 0.95, "draw from the likeliest tokens that hold this probability")
    _SEED = flags.DEFINE_integer("seed", 0, "of the sampling")
    _STEP = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")
    _MESH = mesh_flag()
    run_command(main)
