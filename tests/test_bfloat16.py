"""Laws of bfloat16 on a CPU: whatever float32 can do runs, and agrees to its rounding."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import corpus_overrides, tiny_config, tiny_linear_config
from tokenformer_jax import Sampling, TokenFormer
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.evaluation.perplexity import evaluate_split
from tokenformer_jax.evaluation.sampling import print_samples
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.shrink import shrink
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.official import export_official, import_official
from tokenformer_jax.storage.state_dicts import read_state_dict
from tokenformer_jax.storage.trained import load_trained

GREEDY = Sampling(temperature=0.0)
SMALLER = {"model__num_layers": 1, "model__qkv_tokens": 8, "model__out_tokens": 8, "model__ffn_tokens": 16}


@pytest.mark.parametrize("make, shapes", [(tiny_config, [(1, 1), (3, 9)]), (tiny_linear_config, [(2, 4)])])
def test_the_python_face_with_any_batch_and_length(make, shapes):
    cfg = make(model__num_layers=1).model
    whole = TokenFormer.init(cfg)
    half = dataclasses.replace(whole, cfg=dataclasses.replace(cfg, dtype="bfloat16"))
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, 9))
    for batch, length in shapes:
        some = ids[:batch, :length]
        np.testing.assert_allclose(half.logits(some), whole.logits(some), atol=0.05)
        drawn = half.generate(some, 3, GREEDY)  # each the argmax, but for rounding
        logits = whole.logits(jnp.concatenate([some, drawn[:, :2]], axis=1))[:, length - 1 :]
        chosen = jnp.take_along_axis(logits, drawn[..., None], axis=-1)[..., 0]
        assert (logits.max(-1) - chosen).max() < 0.05
    np.testing.assert_allclose(half.loss(ids[:, :-1], ids[:, 1:]), whole.loss(ids[:, :-1], ids[:, 1:]), atol=0.01)
    gradient, expected = (model.gradients(ids[:, :-1], ids[:, 1:])["embed"] for model in (half, whole))
    assert jnp.linalg.norm(gradient - expected) < 0.02 * jnp.linalg.norm(expected)
    if make is tiny_config:
        for other in (half.grow(ffn_tokens=120), half.shrink(ffn_tokens=50)):
            assert jnp.isfinite(other.logits(ids)).all()


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    corpus = corpus_overrides(tmp_path_factory.mktemp("bfloat16"))
    return tiny_config(**corpus, **SMALLER, model__dtype="bfloat16", steps=4)


@pytest.fixture(scope="module")
def run(cfg, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(cfg, workdir)
    return workdir


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 2, 2, 2)])
def test_evaluate_and_generate_on_one_device_and_on_eight(cfg, run, mesh, capsys):
    trained = load_trained(run, mesh=mesh)
    split = prepare(trained.cfg, trained.tokenizer).validation
    loss = evaluate_split(trained.step, trained.state, split, trained.cfg, max_batches=2)["loss"]
    assert 0 < loss < np.log(300)
    for samples in (1, 2):
        print_samples(trained, "key value", 4, samples, GREEDY, 0)
        out = capsys.readouterr().out
        assert out.count("key value") == samples


@pytest.mark.slow
def test_grow_and_go_on_on_eight_devices_and_shrink_on_one(cfg, run, tmp_path):
    mesh = {"mesh__fsdp": 4, "mesh__tensor": 2}
    sizes = {"model__qkv_tokens": 12, "model__out_tokens": 12, "model__ffn_tokens": 32}
    data = {"data__dataset": cfg.data.dataset, "data__path": cfg.data.path, "data__cache_dir": cfg.data.cache_dir}
    more = data | SMALLER | {"model__dtype": "bfloat16", "steps": 8}
    figures = grow(run, tiny_config(**more | sizes | mesh), tmp_path / "grown")
    assert figures["max_logit_difference"] < 1e-5
    train(tiny_config(**more | sizes | mesh), tmp_path / "grown")
    figures = shrink(tmp_path / "grown", tiny_config(**more | {"steps": 12}), tmp_path / "small")
    assert np.isfinite(figures["loss_after"])


def test_convert_both_ways(cfg, run, tmp_path):
    export_official(run, tmp_path / "model.npz")
    arrays = read_state_dict(tmp_path / "model.npz")
    import_official(arrays, cfg, tmp_path / "imported")
    for name, array in TokenFormer.load(tmp_path / "imported").to_official().items():
        np.testing.assert_array_equal(array, arrays[name])
