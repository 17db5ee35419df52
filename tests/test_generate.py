"""Laws of sampling and of generation with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from tests.helpers import tiny_config
from tokenformer_jax.data.tokenizer import Tokenizer, train_tokenizer
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.sampling import BROKEN, Sampling, checked, generate, readable, sample
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.transformer import initial_tau


@pytest.fixture(scope="module")
def model():
    cfg = tiny_config().model
    params = jax.tree.map(lambda x: 5 * x, init_params(cfg, jax.random.key(1)))
    return cfg, params, initial_tau(cfg)


def continuation(model, prompt, count, **how):
    cfg, params, tau = model
    options = {name: how.pop(name) for name in ("seed", "block") if name in how}
    blocks = generate(cfg, params, tau, jnp.asarray([prompt]), count, how=Sampling(**how), **options)
    return np.concatenate(list(blocks))[:, 0].tolist()


def test_greedy_decoding_equals_the_argmax_of_full_forwards(model):
    cfg, params, tau = model
    forward = jax.jit(lambda tokens: nnx.merge(abstract_model(cfg)[0], params)(tokens, tau)[0])
    tokens = [3, 1, 4, 1, 5]
    for _ in range(9):
        padded = jnp.zeros((1, cfg.context_length), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
        tokens.append(int(jnp.argmax(forward(padded)[0, len(tokens) - 1])))
    assert continuation(model, tokens[:5], 9, temperature=0.0) == tokens[5:]


def test_the_seed_decides(model):
    assert continuation(model, [1], 12, seed=3) == continuation(model, [1], 12, seed=3)
    assert continuation(model, [1], 12, seed=3) != continuation(model, [1], 12, seed=4)


def draws(logits, how, count=4000):
    batch = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    return np.bincount(np.asarray(sample(batch, jax.random.key(0), how)), minlength=len(logits)) / count


LOGITS = np.log([0.5, 0.25, 0.15, 0.1])


@pytest.mark.parametrize(
    "how, expected",
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.7), [2 / 3, 1 / 3, 0, 0]),  # the smallest set that holds 0.7
        (Sampling(top_p=0.01), [1, 0, 0, 0]),
        (Sampling(temperature=0.0), [1, 0, 0, 0]),
        (Sampling(top_k=99), [0.5, 0.25, 0.15, 0.1]),
    ],
)
def test_sampled_frequencies(how, expected):
    np.testing.assert_allclose(draws(LOGITS, how), expected, atol=0.03)
    assert (draws(LOGITS, how)[np.asarray(expected) == 0] == 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_block_s_size_changes_no_token(model, temperature):
    one = continuation(model, [3, 1, 4], 12, temperature=temperature, seed=4, block=1)
    assert len(one) == 12 and len(set(one)) > 2
    for block in (2, 5, 11, 40):
        assert continuation(model, [3, 1, 4], 12, temperature=temperature, seed=4, block=block) == one
    assert continuation(model, [3, 1, 4], 1, temperature=temperature, seed=4) == one[:1]


def test_excluded_ids_are_never_drawn(model):
    cfg, params, tau = model
    tokens = generate(cfg, params, tau, jnp.zeros((4, 1), jnp.int32), 15, how=Sampling(), num_ids=5)
    assert max(int(t.max()) for t in tokens) < 5


def test_longer_than_the_context_is_refused(model):
    with pytest.raises(UserError, match=r"max_tokens = 15.* use 14"):
        continuation(model, [1, 2, 3], 15)


@pytest.mark.parametrize("length", [1, 15, 16])
def test_the_advised_number_of_tokens_fills_the_context_and_is_drawn(model, length):
    prompt = list(range(length))
    most = 17 - length  # the context's 16, and the token after it
    assert len(continuation(model, prompt, most, temperature=0.0)) == most
    with pytest.raises(UserError, match=f"; use {most}"):
        continuation(model, prompt, most + 1)
    with pytest.raises(UserError, match=r"prompt: has 17 tokens, .* use at most 16$"):
        continuation(model, list(range(17)), 1)


def test_the_last_token_is_the_argmax_after_a_full_context(model):
    cfg, params, tau = model
    prompt = list(range(cfg.context_length))
    logits = nnx.merge(abstract_model(cfg)[0], params)(jnp.asarray([prompt]), tau)[0]
    assert continuation(model, prompt, 1, temperature=0.0) == [int(jnp.argmax(logits[0, -1]))]


@pytest.mark.parametrize(
    "how",
    [Sampling(temperature=t) for t in (1e-45, 1e-39, 1e-38, 2e-38, 1e-30)]
    + [Sampling(top_p=p) for p in (1e-45, 1e-39, 1e-300)]
    + [Sampling(temperature=1e-39, top_k=2, top_p=1e-45)],
)
def test_what_a_device_takes_for_zero_is_greedy(how):
    how.check()
    for scale in (1.0, 1e4, -3.0):
        np.testing.assert_array_equal(draws(LOGITS * scale, how, 50), np.eye(4)[np.argmax(LOGITS * scale)])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_broken_model_says_so(model, value):
    cfg, params, tau = model
    broken = params | {"norm_scale": params["norm_scale"] * value, "norm_bias": params["norm_bias"] - value}
    for batch in (1, 3):
        tokens = list(generate(cfg, broken, tau, jnp.ones((batch, 2), jnp.int32), 3, how=Sampling()))
        if value == 1e30:  # large, and finite
            assert all(checked(t).min() >= 0 for t in tokens)
            continue
        assert all((np.asarray(t) == BROKEN).all() for t in tokens)
        with pytest.raises(UserError, match="the model is broken: its logits are not finite"):
            checked(tokens[0])


def metaspace(vocabulary):
    """A tokenizer that marks the space in front of a word and drops that of the first; with fallback to bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *vocabulary]
    bpe = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, byte_fallback=True)
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    bpe.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(), tokenizers.decoders.Fuse()]
    )
    bpe.add_special_tokens(["</s>"])
    return Tokenizer(bpe)


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("The", "The on"),
        ("The", "Theon"),
        ("The on", "The on the on"),
        ("", "The on"),
        ("The", "The € on"),  # by bytes, some of which may end the prompt
        ("The €", "The €€ on"),
        ("on\ufffd", "on\ufffd on"),
    ],
)
def test_a_continuation_is_decoded_behind_its_prompt(prompt, text):
    tokenizer = metaspace(["\u2581The", "\u2581on", "on", "\u2581the", "\u2581", "The", "the"])
    before, whole = tokenizer.encode(prompt), tokenizer.encode(text)
    assert tokenizer.decode(whole) == text
    assert whole[: len(before)] == before
    ids = whole[len(before) :]
    assert prompt + tokenizer.continuation(before, ids) == text
    pieces = list(readable(lambda ids: tokenizer.continuation(before, ids), ids))
    assert prompt + "".join(pieces) == text


def test_a_character_that_the_prompt_began_is_finished():
    for tokenizer in (train_tokenizer(["a"], 257), metaspace(["\u2581a", "a"])):
        ids = tokenizer.encode("a€")
        assert tokenizer.continuation(ids[:-1], ids[-1:]) in ("€", "a€"[1:])


def test_text_is_shown_as_it_comes_in_whole_characters_and_once():
    tokenizer = train_tokenizer(["a"], 257)  # a token for each byte
    for text in ["€uro", "aé€b", "plain"]:
        pieces = list(readable(tokenizer.decode, tokenizer.encode(text)))
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) == len(text) + 1
    assert "".join(readable(tokenizer.decode, tokenizer.encode("a€")[:-1])).startswith("a\ufffd")  # never whole
    assert list(readable(tokenizer.decode, [])) == [""]
