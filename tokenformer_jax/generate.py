"""Samples text from a trained model, with a KV cache.

python -m tokenformer_jax.generate --workdir=W --prompt='def main(' [--temperature=0.8] [--top_p=0.95]
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from tokenformer_jax.config import ModelConfig, UserError, run_command, workdir_flag
from tokenformer_jax.evaluate import load_trained, mesh_flag
from tokenformer_jax.transformer import KVCache, Params, Tau, abstract_model


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature={self.temperature}: must be 0 (greedy) or above")
        if self.top_k < 0:
            raise UserError(f"--top_k={self.top_k}: must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p={self.top_p}: must be above 0 and at most 1 (off)")


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


def make_decoder(
    cfg: ModelConfig, how: Sampling, allowed_V: jax.Array | None = None
) -> Callable[[Params, Tau, jax.Array, KVCache, jax.Array], tuple[jax.Array, KVCache]]:
    """A compiled function: (params, τ, tokens [B, L], cache, key) -> next tokens [B], cache.

    The cache is donated. `allowed_V`, booleans, excludes ids, such as those of the vocabulary's padding.
    """
    graphdef, _, _ = abstract_model(cfg)

    def decode(params: Params, tau: Tau, tokens_BL: jax.Array, cache: KVCache, key: jax.Array):
        model = nnx.merge(graphdef, params)
        x_BLD, cache = model.features(tokens_BL, tau, cache=cache)
        logits_BV = model.logits(x_BLD[:, -1:])[:, 0]
        if allowed_V is not None:
            logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
        return sample(logits_BV, key, how), cache

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
    allowed_V: jax.Array | None = None,
) -> Iterator[jax.Array]:
    """Yields the next token ids [B] one position at a time, at most `max_tokens`; the same seed gives the same text.

    Raises:
      UserError: where prompt and continuation are longer than the context the model was trained on.
    """
    batch, length = prompt_BL.shape
    if length + max_tokens > cfg.context_length:
        raise UserError(
            f"--max_tokens={max_tokens}: with a prompt of {length} tokens that is longer than the model's context of "
            f"{cfg.context_length}; {max(cfg.context_length - length, 0)} would do"
        )
    decode = make_decoder(cfg, how, allowed_V)
    cache = KVCache.empty(cfg, batch, length + max_tokens)
    tokens_BL, key = prompt_BL, jax.random.key(seed)
    for i in range(max_tokens):
        tokens_B, cache = decode(params, tau, tokens_BL, cache, jax.random.fold_in(key, i))
        yield tokens_B
        tokens_BL = tokens_B[:, None]


def main() -> None:
    how = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    how.check()
    for flag in (_MAX_TOKENS, _SAMPLES):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value}: must be 1 or above")
    run = load_trained(_WORKDIR(), _STEP.value, _MESH())
    tokenizer = run.tokenizer
    prompt = [tokenizer.end_of_text, *tokenizer.encode(_PROMPT.value)]
    prompt_BL = jnp.tile(jnp.asarray(prompt, jnp.int32), (_SAMPLES.value, 1))
    ids_V = jnp.arange(run.cfg.model.vocab_size)
    streamed = _SAMPLES.value == 1
    texts: list[list[int]] = [[] for _ in range(_SAMPLES.value)]
    shown = ""
    with jax.set_mesh(run.step.mesh):
        stream = generate(
            run.cfg.model,
            run.state.params,
            run.state.tau_now(),
            prompt_BL,
            _MAX_TOKENS.value,
            how=how,
            seed=_SEED.value,
            allowed_V=ids_V < tokenizer.vocab_size,
        )
        for tokens_B in stream:
            for text, token in zip(texts, tokens_B.tolist(), strict=True):
                if not text or text[-1] != tokenizer.end_of_text:
                    text.append(token)
            if all(text[-1] == tokenizer.end_of_text for text in texts):
                break
            if streamed:
                decoded = tokenizer.decode(texts[0])
                if not decoded.endswith("\ufffd"):  # a character may take several tokens
                    print((_PROMPT.value if not shown else "") + decoded[len(shown) :], end="", flush=True)
                    shown = decoded
    if streamed:
        print()
        return
    for i, text in enumerate(texts):
        decoded = tokenizer.decode([token for token in text if token != tokenizer.end_of_text])
        print(f"--- sample {i + 1} ---\n{_PROMPT.value}{decoded}")


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
