"""Laws of sampling and of generation with a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import tiny_config
from tokenformer_jax.data.tokenizer import train_tokenizer
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.sampling import Sampling, generate, readable, sample
from tokenformer_jax.nn.language import abstract_model, init_params, initial_tau


@pytest.fixture(scope="module")
def model():
    cfg = tiny_config().model
    params = jax.tree.map(lambda x: 5 * x, init_params(cfg, jax.random.key(1)))
    return cfg, params, initial_tau(cfg)


def continuation(model, prompt, count, **how):
    cfg, params, tau = model
    seed = how.pop("seed", 0)
    tokens = generate(cfg, params, tau, jnp.asarray([prompt]), count, how=Sampling(**how), seed=seed)
    return [int(t[0]) for t in tokens]


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


def test_excluded_ids_are_never_drawn(model):
    cfg, params, tau = model
    tokens = generate(cfg, params, tau, jnp.zeros((4, 1), jnp.int32), 15, how=Sampling(), num_ids=5)
    assert max(int(t.max()) for t in tokens) < 5


def test_longer_than_the_context_is_refused(model):
    with pytest.raises(UserError, match=r"max_tokens = 14.* 13 would do"):
        continuation(model, [1, 2, 3], 14)


def test_text_is_shown_as_it_comes_in_whole_characters_and_once():
    tokenizer = train_tokenizer(["a"], 257)  # a token for each byte
    for text in ["€uro", "aé€b", "plain"]:
        pieces = list(readable(tokenizer.decode, tokenizer.encode(text)))
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) == len(text) + 1
    assert "".join(readable(tokenizer.decode, tokenizer.encode("a€")[:-1])).startswith("a\ufffd")  # never whole
    assert list(readable(tokenizer.decode, [])) == [""]
