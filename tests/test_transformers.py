"""transformers loads the exported folder, without this project, and computes what we compute."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import assert_trees_equal, corpus_overrides, tiny_config
from tokenformer_jax.api import TokenFormer
from tokenformer_jax.evaluation.sampling import Sampling
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.hub import read_published
from tokenformer_jax.storage.hub_format import export_hub
from tokenformer_jax.storage.trained import load_trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers"),
]

TEXTS = ["key value <|endoftext|> norm", "  héé\n\n x", "", "token", "the <|endoftext|>"]
SCRIPT = """
import json, sys
for name in ("jax", "flax", "tokenformer_jax"):
    sys.modules[name] = None
import numpy as np, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

folder, texts = sys.argv[1], json.loads(sys.argv[2])
ids = torch.tensor(json.loads(sys.argv[3]))
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
found = {"encoded": [tokenizer(text).input_ids for text in texts]}
found["decoded"] = [tokenizer.decode(encoded) for encoded in found["encoded"]]
found["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
with torch.no_grad():
    out = model(ids, labels=ids)
    parts, cache = [], None
    for length in (5, 1, 3, ids.shape[1] - 9):  # through the cache
        done = sum(part.shape[1] for part in parts)
        step = model(ids[:, done : done + length], past_key_values=cache, use_cache=True)
        parts, cache = [*parts, step.logits], step[1]
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    np.savez("logits.npz", whole=out.logits, parts=torch.cat(parts, 1), last=model(ids, logits_to_keep=2).logits,
             half=half(ids).logits.float())
found["loss"] = out.loss.item()
how = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
prompt = ids[:, :6]
found["greedy"] = model.generate(prompt, **how)[:, 6:].tolist()
found["uncached"] = model.generate(prompt, use_cache=False, **how)[:, 6:].tolist()
found["static"] = model.generate(prompt, cache_implementation="static", **how)[:, 6:].tolist()
mask = torch.ones_like(prompt)
mask[1, :4], mask[2, :2] = 0, 0
found["padded"] = model.generate(prompt * mask, attention_mask=mask, **how)[:, 6:].tolist()
found["alone"] = [model.generate(row[seen == 1][None], **how)[0, -10:].tolist() for row, seen in zip(prompt, mask)]
model.save_pretrained("saved", max_shard_size="60KB")
tokenizer.save_pretrained("saved")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
found["spread"] = [p.std().item() for name, p in fresh.named_parameters() if "param_tokens" in name]
out = model(ids, labels=ids, use_cache=False)
out.loss.backward()
found["gradients"] = [float(p.grad.abs().sum()) for p in model.parameters()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, exported in the middle of the ramp of its growth."""
    folder = tmp_path_factory.mktemp("transformers")
    corpus = corpus_overrides(folder) | {"model__vocab_size": 400}
    train(tiny_config(**corpus, steps=30), folder / "small")
    sizes = {"model__qkv_tokens": 30, "model__ffn_tokens": 150, "model__pad_tokens_to": 8}
    cfg = tiny_config(**corpus, steps=40, grow__tau_ramp=1.0, **sizes)
    grow(folder / "small", cfg, folder / "W")
    train(dataclasses.replace(cfg, max_minutes=1e-9), folder / "W")  # stops after a step
    export_hub(folder / "W", folder / "out")
    return folder


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 300, (3, 16)).tolist()


@pytest.fixture(scope="module")
def found(folder, ids):
    environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, "-c", SCRIPT, str(folder / "out"), json.dumps(TEXTS), json.dumps(ids)]
    ended = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]) | dict(np.load(folder / "logits.npz"))


@pytest.fixture(scope="module")
def ours(folder):
    return TokenFormer.load(folder / "W")


def test_the_logits_are_ours_at_once_and_through_the_cache(found, ours, ids):
    assert ours.tau["ffn"] != np.sqrt(150)
    expected = np.asarray(ours.logits(ids))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found["whole"], expected, atol=2e-5)
    np.testing.assert_allclose(found["parts"], expected, atol=2e-5)
    np.testing.assert_allclose(found["last"], expected[:, -2:], atol=2e-5)
    np.testing.assert_allclose(found["half"], expected, atol=0.1)


def test_the_loss_is_ours(found, ours, ids):
    rows = np.asarray(ids)
    np.testing.assert_allclose(found["loss"], float(ours.loss(rows[:, :-1], rows[:, 1:])), atol=1e-5)
    assert min(found["gradients"]) > 0


def test_the_greedy_text_is_ours_with_any_cache_and_padding(found, ours, ids):
    prompt = np.asarray(ids)[:, :6]
    expected = np.asarray(ours.generate(prompt, 10, Sampling(temperature=0.0))).tolist()
    assert found["greedy"] == found["uncached"] == found["static"] == expected
    assert found["padded"] == found["alone"]


def test_the_tokenizer_is_ours(found, ours):
    assert found["encoded"] == [ours.tokenizer.encode(text) for text in TEXTS]
    assert found["decoded"] == TEXTS
    assert found["special"] == [ours.tokenizer.end_of_text] * 3


def test_a_new_model_is_random(found):
    assert min(found["spread"]) > 0.01


def test_what_transformers_saves_in_parts_comes_back_bit_for_bit(found, folder):
    assert (folder / "saved" / "model.safetensors.index.json").exists()
    saved, out = (read_published(str(folder / name)) for name in ("saved", "out"))
    assert_trees_equal(saved.arrays, out.arrays)
    assert saved.tau == out.tau and saved.known == out.known
    assert saved.config(saved.known).model == load_trained(folder / "W").cfg.model
