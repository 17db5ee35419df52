"""Laws of the public face, as a user of the package sees them."""

import dataclasses
import json
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers import DATA, corpus_overrides, tiny_config
from tokenformer_jax import Sampling, TokenFormer, UserError
from tokenformer_jax.data.tokenizer import train_tokenizer
from tokenformer_jax.evaluation.perplexity import evaluate_run
from tokenformer_jax.storage.trained import load_trained


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


# A model's life, from Python

SMALL = {"model__num_layers": 1, "model__qkv_tokens": 8, "model__out_tokens": 8, "model__ffn_tokens": 16, "steps": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder, with a trained run and the authors' weights."""
    home = tmp_path_factory.mktemp("home")
    cfg = tiny_config(**corpus_overrides(home), **SMALL)
    model = TokenFormer.train(cfg, home / "run")
    save_file({name: np.ascontiguousarray(a) for name, a in model.to_official().items()}, home / "model.safetensors")
    (home / "tokenizer.json").write_text(model.tokenizer.to_json())
    return home, cfg, model


def test_paths_may_begin_with_the_home_folder(home, monkeypatch):
    folder, cfg, model = home
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder.parent)
    loaded = TokenFormer.load("~/run")
    theirs = TokenFormer.from_official("~/model.safetensors", 4, context_length=16, tokenizer="~/tokenizer.json")
    loaded.save("~/saved", cfg)
    again = TokenFormer.train(cfg, "~/saved")
    ids = jnp.asarray([[1, 2, 3]])
    for other in (loaded, theirs, TokenFormer.load("~/saved", step=0)):
        np.testing.assert_allclose(other.logits(ids), model.logits(ids), atol=1e-5)
        assert other.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert jnp.abs(again.logits(ids) - model.logits(ids)).max() > 1e-3  # four steps more
    assert not (folder.parent / "~").exists()


def test_evaluate_gives_the_commands_figures(home, tmp_path):
    folder, cfg, model = home
    for split in ("validation", "train"):
        evaluate_run(load_trained(folder / "run"), tmp_path, split, tmp_path / "eval.json")
        expected = json.loads((tmp_path / "eval.json").read_text())
        figures = model.evaluate(cfg, split)
        assert figures == {name: pytest.approx(expected[name], rel=1e-6) for name in figures}
    averaged = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, average=0.9))
    assert model.evaluate(averaged) == model.evaluate(cfg)
    sharded = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, fsdp=4, tensor=2))
    assert model.evaluate(sharded)["loss"] == pytest.approx(model.evaluate(cfg)["loss"], rel=1e-5)


def test_a_grown_model_is_saved_and_trained_on(home, tmp_path):
    _, cfg, model = home
    larger = model.grow(ffn_tokens=32, recipe="split")
    larger.save(tmp_path / "larger", cfg)
    saved = TokenFormer.load(tmp_path / "larger")
    assert saved.cfg.ffn_tokens == 32 and saved.tau == larger.tau
    assert saved.evaluate(cfg)["loss"] == pytest.approx(model.evaluate(cfg)["loss"], rel=1e-5)
    on = dataclasses.replace(cfg, model=larger.cfg)
    assert TokenFormer.train(on, tmp_path / "larger").evaluate(cfg)["loss"] < saved.evaluate(cfg)["loss"]


@pytest.mark.parametrize("recipe", ["zero_keys", "isometric", "split", "zero_padding", "released", "random_keys"])
def test_a_model_grows_by_any_recipe(official, recipe):
    model, _, raw = official
    sizes = {name: 2 * getattr(model.cfg, name) for name in ("qkv_tokens", "out_tokens", "ffn_tokens")}
    larger = model.grow(**sizes, recipe=recipe)
    same = np.allclose(larger.logits(raw["tokens"]), model.logits(raw["tokens"]), atol=5e-5)
    assert same == (recipe not in ("released", "random_keys"))


def test_its_representation_is_a_line(official):
    model, _, _ = official
    text = repr(model)
    assert len(text) < 200 and "\n" not in text and "no tokenizer" in text
    assert f"{sum(x.size for x in jax.tree.leaves(model.params)):,} parameters" in text
    assert f"ffn {model.cfg.ffn_tokens}" in text
    assert "tokenizer of 257 ids" in repr(dataclasses.replace(model, tokenizer=train_tokenizer(["a"], 257)))
    assert model == model and model != dataclasses.replace(model) and hash(model)


def test_training_works_outside_of_the_main_thread(home, tmp_path):
    _, cfg, _ = home
    result = []
    thread = threading.Thread(target=lambda: result.append(TokenFormer.train(cfg, tmp_path / "run")))
    thread.start()
    thread.join()
    assert isinstance(result[0], TokenFormer)


IDS = np.zeros((2, 3), int)
WRONG = [
    (lambda m, c: m.generate(np.zeros((1, 0), int), 2), r"prompt_BL: has shape \[1, 0\]; use \[B, L\]"),
    (lambda m, c: m.generate(np.zeros(3, int), 2), r"prompt_BL: has shape \[3\]"),
    (lambda m, c: m.generate(np.zeros((0, 3), int), 2), r"prompt_BL: has shape \[0, 3\]"),
    (lambda m, c: m.generate(np.zeros((1, 1, 3), int), 2), r"prompt_BL: has shape \[1, 1, 3\]"),
    (lambda m, c: m.generate(np.zeros((1, 3)), 2), "prompt_BL: is float32; token ids are integers"),
    (lambda m, c: m.generate([[1, 2], [3]], 2), "prompt_BL: must be an array of token ids"),
    (lambda m, c: m.generate("The", 2), "prompt_BL: must be an array of token ids"),
    (lambda m, c: m.generate([[1, 300]], 2), r"prompt_BL: holds ids from 1 to 300; the model's are 0 to 299"),
    (lambda m, c: m.generate([[-1]], 2), "prompt_BL: holds ids from -1"),
    (lambda m, c: m.generate(IDS, 2.5), r"max_tokens = 2\.5"),
    (lambda m, c: m.generate(IDS, 0), "max_tokens = 0"),
    (lambda m, c: m.generate(IDS, 2, seed=-1), "seed = -1"),
    (lambda m, c: m.generate(IDS, 2, Sampling(temperature=float("nan"))), "temperature = nan"),
    (lambda m, c: m.generate(IDS, 2, Sampling(top_k=2.5)), r"top_k = 2\.5"),
    (lambda m, c: m.logits(np.zeros(3, int)), r"tokens_BL: has shape \[3\]"),
    (lambda m, c: m.logits([[999]]), "tokens_BL: holds ids from 999"),
    (lambda m, c: m.loss(IDS, IDS[:, 1:]), r"targets_BL: has shape \[2, 2\]; use that of tokens_BL, \[2, 3\]"),
    (lambda m, c: m.loss(IDS, IDS + 0.5), "targets_BL: is float32"),
    (lambda m, c: m.gradients(IDS - 1, IDS), "tokens_BL: holds ids from -1"),
    (lambda m, c: m.grow(ffn_tokens=99.5), r"ffn_tokens = 99\.5: must be a whole number"),
    (lambda m, c: m.grow(ffn_tokens=99, recipe="splits"), "recipe = 'splits': must be one of zero_keys"),
    (lambda m, c: m.grow(ffn_tokens=17, recipe="split"), "model.ffn_tokens = 17: .* use 16 or 32"),
    (lambda m, c: m.grow(ffn_tokens=99, seed=0.5), r"seed = 0\.5"),
    (lambda m, c: m.shrink(qkv_tokens="8"), "qkv_tokens = '8'"),
    (lambda m, c: m.evaluate(c.model), "cfg: must be a Config, not ModelConfig"),
    (lambda m, c: m.evaluate(c, "test"), "split=test: must be one of train, validation"),
    (lambda m, c: m.save("w", {}), "cfg: must be a Config, not dict"),
    (lambda m, c: TokenFormer.train(None, "w"), "cfg: must be a Config, not NoneType"),
    (lambda m, c: TokenFormer.init(c), "cfg: must be a ModelConfig, not Config; a Config has one as its .model"),
    (lambda m, c: TokenFormer.init(c.model, seed=-3), "seed = -3"),
    (lambda m, c: TokenFormer.load("~/no/such"), "no/such/config.json: not found"),
    (lambda m, c: TokenFormer.from_official("~/no.npz", 4), "no.npz: there is no such file"),
    (lambda m, c: TokenFormer.from_official(m.to_official(), 4, tokenizer="~/no.json"), "no.json"),
    (
        lambda m, c: TokenFormer.from_official(m.to_official(), 4, tokenizer=train_tokenizer(["ab cd ef"] * 9, 301)),
        None,
    ),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_cannot_be_used_is_named(home, number, tmp_path, monkeypatch):
    _, cfg, model = home
    monkeypatch.chdir(tmp_path)
    wrong, message = WRONG[number]
    if message is None:  # fits
        wrong(model, cfg)
        return
    with pytest.raises(UserError) as error:
        wrong(model, cfg)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), error.value
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_with_too_many_ids_is_refused(official):
    model, weights, _ = official
    with pytest.raises(UserError, match=rf"tokenizer: has 257 ids, but .* embeds {model.cfg.vocab_size};"):
        TokenFormer.from_official(
            weights, model.cfg.num_heads, context_length=32, tokenizer=train_tokenizer(["a"], 257)
        )


def test_ids_are_only_looked_at_where_they_are_there(official):
    model, _, raw = official
    np.testing.assert_allclose(jax.jit(model.logits)(raw["tokens"]), model.logits(raw["tokens"]), atol=1e-5)
