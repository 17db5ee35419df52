"""The PyTorch model computes what ours does, from a file that `convert` writes."""

import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from tests.commands import ROOT, call_well
from tests.helpers import golden_model, tiny_config, write_corpus
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.official import check_tau, to_official
from tokenformer_jax.storage.state_dicts import write_state_dict
from tokenformer_jax.storage.trained import load_trained

torch = pytest.importorskip("torch")

from tokenformer_jax.pytorch import NORMALIZERS, TokenFormer  # noqa: E402


def logits(cfg, params, tau, tokens):
    return np.asarray(nnx.merge(abstract_model(cfg)[0], params)(tokens, tau)[0])


def theirs(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).numpy()


def options(cfg):
    return {key: getattr(cfg, key) for key in ("num_heads", "rotary_fraction", "normalizer")}


def random_tokens(cfg):
    return np.random.default_rng(0).integers(0, cfg.vocab_size, (3, cfg.context_length))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"rotary_fraction": 0.0},
        {"rotary_fraction": 1.0, "num_layers": 1},
        {"qkv_tokens": 8, "out_tokens": 8, "ffn_tokens": 32, "tau_tokens": 8},  # √n and √(4n), which are √N here
        {"pad_tokens_to": 16, "tau_tokens": 0, "qkv_tokens": 16, "out_tokens": 48},  # which pads nothing
    ],
    ids=str,
)
def test_every_model_that_can_be_exported_has_the_same_logits(tmp_path, normalizer, model):
    if normalizer == "softmax":
        model = model | {"pad_tokens_to": 0}
    cfg = tiny_config(model__normalizer=normalizer, **{f"model__{key}": value for key, value in model.items()}).model
    check_tau(initial_tau(cfg), cfg, "the model")  # else export_official refuses it
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), abstract_model(cfg)[1])
    tokens = random_tokens(cfg)
    expected = logits(cfg, params, initial_tau(cfg), tokens)
    assert expected.std() > 0.1
    for ending in (".safetensors", ".pt"):
        write_state_dict(tmp_path / f"model{ending}", to_official(params))
        found = TokenFormer.load(tmp_path / f"model{ending}", **options(cfg))
        np.testing.assert_allclose(theirs(found, tokens), expected, rtol=0, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["lm_2layer.npz", "lm_rot8.npz"])
def test_the_authors_names_and_numbers_are_its_own(name):
    cfg, _, _, raw = golden_model(name)
    tensors = {key.removeprefix("sd/"): torch.tensor(array) for key, array in raw.items() if key.startswith("sd/")}
    model = TokenFormer.of_state_dict(tensors, **options(cfg.model))
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in tensors.items()}
    np.testing.assert_allclose(theirs(model, raw["tokens"]), raw["logits"], atol=2e-5)


def test_a_grown_run_is_loaded_as_convert_says(tmp_path):
    write_corpus(tmp_path / "text")
    data = {"data__dataset": "text_files", "data__path": str(tmp_path / "text"), "data__cache_dir": str(tmp_path)}
    train(tiny_config(**data, steps=3), tmp_path / "small")
    cfg = tiny_config(**data, steps=6, model__qkv_tokens=30, model__ffn_tokens=150, grow__tau_ramp=0.5)
    grow(tmp_path / "small", cfg, tmp_path / "large")
    train(cfg, tmp_path / "large")
    said = call_well("convert", f"--to_torch={tmp_path}/model.safetensors", f"--workdir={tmp_path}/large")
    call = re.search(
        r"^in PyTorch: tokenformer_jax\.pytorch\.TokenFormer\.load\('(.*)', num_heads=4, (.*)\)$", said, re.M
    )
    assert call[2] == "rotary_fraction=0.25, normalizer='l2_norm_gelu'"
    run, tokens = load_trained(tmp_path / "large"), random_tokens(cfg.model)
    expected = logits(run.cfg.model, run.state.params, run.state.tau_now(), tokens)
    np.testing.assert_allclose(theirs(TokenFormer.load(call[1], num_heads=4), tokens), expected, atol=2e-5)


def test_longer_texts_than_those_of_training_are_taken():
    cfg = tiny_config().model
    params, tokens = init_params(cfg, jax.random.key(0)), np.arange(64).reshape(1, 64)
    tensors = {name: torch.tensor(array) for name, array in to_official(params).items()}
    model = TokenFormer.of_state_dict(tensors, cfg.num_heads)
    np.testing.assert_allclose(theirs(model, tokens), logits(cfg, params, initial_tau(cfg), tokens), atol=1e-5)


def test_any_tau_and_a_cache_of_keys_and_values():
    """What no official file holds, and `modeling_tokenformer.py` uses."""
    cfg = tiny_config(model__normalizer="gelu_l2_norm", model__gelu="tanh").model
    params, tokens = init_params(cfg, jax.random.key(0)), random_tokens(cfg)
    tau = initial_tau(cfg) | {"value": 3.0, "ffn": 7.5}
    tensors = {name: torch.tensor(array) for name, array in to_official(params).items()}
    model = TokenFormer.of_state_dict(tensors, **options(cfg), gelu="tanh", tau=tau)
    expected = logits(cfg, params, tau, tokens)
    np.testing.assert_allclose(theirs(model, tokens), expected, atol=1e-5)

    kept = [()] * cfg.num_layers

    def cache(layer):
        def after_those_before(*new):
            kept[layer] = [torch.cat(both, 2) for both in zip(kept[layer], new, strict=True)] if kept[layer] else new
            return kept[layer]

        return after_those_before

    for first, last in ((0, 5), (5, 6), (6, 16)):
        positions = torch.arange(first, last)[None]
        mask = positions[0, :, None] >= torch.arange(last)
        with torch.no_grad():
            found = model.sequential(torch.tensor(tokens[:, first:last]), positions, mask, cache, slice(-1, None))
        np.testing.assert_allclose(found[:, 0], expected[:, last - 1], atol=1e-5)


def test_other_state_dicts_are_refused(tmp_path):
    tensors = {
        name: torch.tensor(a) for name, a in to_official(init_params(tiny_config().model, jax.random.key(0))).items()
    }
    with pytest.raises(ValueError, match=r"no state dict under the authors' names.*lacks sequential\.0"):
        TokenFormer.of_state_dict({"transformer.wte.weight": torch.ones(2, 2)}, 4)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*sequential\.2\.bias"):
        TokenFormer.of_state_dict(tensors | {"sequential.2.bias": torch.ones(2)}, 4)
    with pytest.raises(RuntimeError, match=r"Missing key.*sequential\.5\.norm\.bias"):
        TokenFormer.of_state_dict({k: v for k, v in tensors.items() if k != "sequential.5.norm.bias"}, 4)
    with pytest.raises(ValueError, match="num_heads = 5: must divide embed_dim = 32"):
        TokenFormer.of_state_dict(tensors, 5)


def test_a_copy_of_the_file_needs_neither_the_project_nor_jax(tmp_path):
    shutil.copy(ROOT / "tokenformer_jax/pytorch.py", tmp_path / "copied.py")
    write_state_dict(tmp_path / "m.safetensors", to_official(init_params(tiny_config().model, jax.random.key(0))))
    script = """
import sys
for name in ("jax", "flax", "tokenformer_jax"):
    sys.modules[name] = None
import torch, copied
print(list(copied.TokenFormer.load("m.safetensors", num_heads=4)(torch.zeros(1, 3, dtype=torch.long)).shape))
"""
    line = [sys.executable, "-c", script]
    ended = subprocess.run(line, cwd=tmp_path, env={"PYTHONPATH": "."}, capture_output=True, text=True)
    assert ended.stdout.strip() == "[1, 3, 300]", ended.stderr
