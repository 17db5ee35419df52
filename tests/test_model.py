"""Laws of the public face, as a user of the package sees them."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import DATA, tiny_config
from tokenformer_jax import Sampling, TokenFormer, UserError


@pytest.fixture(scope="module", params=[("lm_2layer.npz", 4), ("lm_rot8.npz", 2)], ids=["2layer", "rot8"])
def official(request):
    """The authors' weights, and what they compute."""
    name, num_heads = request.param
    raw = dict(np.load(DATA / name, allow_pickle=False))
    weights = {key.removeprefix("sd/"): value for key, value in raw.items() if key.startswith("sd/")}
    return TokenFormer.from_official(weights, num_heads, context_length=32), weights, raw


def test_logits_loss_and_gradients_match_the_authors(official):
    model, _, raw = official
    np.testing.assert_allclose(model.logits(raw["tokens"]), raw["logits"], atol=2e-5)
    np.testing.assert_allclose(model.loss(raw["tokens"], raw["labels"]), raw["loss"], atol=1e-5)
    gradients = TokenFormer(model.cfg, model.gradients(raw["tokens"], raw["labels"]), model.tau).to_official()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, raw[f"grad/{name}"], atol=5e-6, err_msg=name)


def test_official_weights_come_back_bit_for_bit(official):
    model, weights, _ = official
    back = model.to_official()
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)


def test_grown_model_computes_the_same_and_is_not_official_yet(official):
    model, _, raw = official
    larger = model.grow(qkv_tokens=60, out_tokens=61, ffn_tokens=300)
    np.testing.assert_allclose(larger.logits(raw["tokens"]), model.logits(raw["tokens"]), atol=2e-5)
    assert larger.params["blocks"]["ffn"]["keys"].shape[1] == 300
    assert jnp.any(larger.params["blocks"]["ffn"]["values"][:, 250:])
    with pytest.raises(UserError, match="tau of query"):
        larger.to_official()
    with pytest.raises(UserError, match="ffn_tokens = 2"):
        model.grow(ffn_tokens=2)


def test_new_models_differ_by_seed_and_generate():
    cfg = tiny_config().model
    model, same, other = (TokenFormer.init(cfg, seed) for seed in (1, 1, 2))
    prompt = jnp.asarray([[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(model.logits(prompt), same.logits(prompt))
    assert jnp.abs(model.logits(prompt) - other.logits(prompt)).max() > 1e-3
    greedy = model.generate(prompt, 4, Sampling(temperature=0.0))
    assert greedy.shape == (2, 4)
    np.testing.assert_array_equal(greedy[:, 0], jnp.argmax(model.logits(prompt)[:, -1], axis=-1))
