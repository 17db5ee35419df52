"""What adapters are measured against: a LoRA of as many parameters, a Transformer of as many, and domains of text."""

import argparse

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.adapters import config, new_parameters, new_tokens, summary
from benchmarks.domains import token_ids
from benchmarks.lora import adapt, init_lora, rank
from tests.helpers import random_batch, tiny_linear_config
from tokenformer_jax.data.tokenizer import train_tokenizer
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.layers import count_params


def test_lora_adds_nothing_at_first_and_all_of_it_can_learn():
    cfg = tiny_linear_config()
    graphdef, batch = abstract_model(cfg.model)[0], random_batch(cfg)
    params = init_params(cfg.model, jax.random.key(0))
    lora = init_lora(cfg.model, 3, jax.random.key(1))

    def loss(lora):
        return adapt(nnx.merge(graphdef, params), lora).loss_sums(batch, {}, cfg)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(lora)
    assert value == nnx.merge(graphdef, params).loss_sums(batch, {}, cfg)[0]
    assert all(np.all(np.any(part["b"], axis=(1, 2))) and not np.any(part["a"]) for part in grads.values())


@pytest.mark.parametrize("preset", ["pile:150m", "ladder:1b4"])
def test_contenders_have_as_many_parameters(preset):
    args = argparse.Namespace(preset=preset, batch=1, part=1 / 16, dtype="", remat="")
    large, small = config(preset, False, args)
    plain, _ = config(preset, True, args)
    sizes = [count_params(abstract_model(model)[1]) for model in (large.model, small, plain.model)]
    new = new_parameters(args)
    assert sizes[0] - sizes[1] == new and sizes[1] == sizes[2]
    lora = jax.eval_shape(lambda: init_lora(plain.model, rank(plain.model, new), jax.random.key(0)))
    assert count_params(lora) == pytest.approx(new, rel=0.1)
    assert new_tokens(768, 1 / 16) == 48 and new_tokens(64, 1 / 16) == 16


def test_the_summary_compares_medians():
    def row(contender, seconds, **more):
        sizes = {"params": 4, "learned_params": 1, "planned_bytes": seconds * 10, "peak_bytes": seconds * 20}
        return {"preset": "p", "contender": contender, "step_seconds": seconds} | sizes | more

    rows = [
        row("full", 3),
        row("new", 2),
        row("full", 5),
        row("full", 4),
        {"preset": "p", "contender": "lora", "error": "x"},
    ]
    found = summary(rows)["p"]
    assert found["full"]["step_seconds"] == 4 and found["new_over_full"]["step_seconds"] == 0.5
    assert set(found) == {"full", "new", "new_over_full"}


def test_a_domain_is_cut_into_two_parts():
    learn, evaluate = token_ids("c", train_tokenizer(["int main(void) { return 0; }\n" * 20], 300))
    assert len(learn) > 18 * len(evaluate) > 0 and learn.dtype == np.int32 and learn.max() < 300
