"""Laws of scoring requests: each score is the model's own, whatever stands beside it in a batch, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import scoring_run
from tokenformer_jax.data.batches import eval_batches
from tokenformer_jax.data.tokens import InMemory, TokenSplit
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.perplexity import evaluate_split
from tokenformer_jax.evaluation.sampling import Sampling, generate
from tokenformer_jax.evaluation.scoring import Prompt, Scored, Scorer, batches, padded_length
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.nn.loss import log_likelihoods

CONTEXT = 64
END = 0


@pytest.fixture(scope="module")
def run():
    return scoring_run()


def requests(seed=0, count=40, longest=CONTEXT + 1):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    return [Scored(rng.integers(0, 300, n).tolist(), int(rng.integers(1, n))) for n in lengths]


@functools.cache
def forward():
    model = scoring_run()
    graphdef, tau = abstract_model(model.cfg.model)[0], model.state.tau_now()
    return jax.jit(lambda ids_BL: jax.nn.log_softmax(nnx.merge(graphdef, model.state.params)(ids_BL, tau)[0]))


def log_probabilities(ids):
    """Of each id but the first, by all logits of these ids alone, and whether it is the likeliest."""
    padded_L = np.zeros(CONTEXT, np.int32)
    padded_L[: len(ids) - 1] = ids[:-1]
    found_LV = np.asarray(forward()(padded_L[None])[0, : len(ids) - 1])
    return found_LV[np.arange(len(ids) - 1), ids[1:]], found_LV.argmax(-1) == ids[1:]


def test_a_score_is_that_of_the_models_logits(run):
    asked = requests()
    for request, score in zip(asked, Scorer(run).score(asked), strict=True):
        scores_L, are_likeliest_L = log_probabilities(request.ids)
        assert score.log_likelihood == pytest.approx(float(scores_L[-request.last :].sum()), rel=2e-6, abs=2e-5)
        assert score.is_greedy == are_likeliest_L[-request.last :].all()


def test_greedy_requests_are_found(run):
    how = Sampling(0.0)
    ids = [3, 1, 4]
    stream = generate(run.cfg.model, run.state.params, run.state.tau_now(), jnp.asarray([ids]), 6, how=how)
    greedy = [*ids, *np.concatenate(list(stream))[:, 0].tolist()]
    other = [*greedy[:-1], (greedy[-1] + 1) % 300]
    scores = Scorer(run).score([Scored(greedy, 6), Scored(other, 6), Scored(greedy, 1), Scored([END], 0)])
    assert [score.is_greedy for score in scores] == [True, False, True, True]
    assert scores[3].log_likelihood == 0


@pytest.mark.parametrize("batch_size", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_batch_size_and_order_change_no_score(run, batch_size):
    asked = requests(1)
    scores = np.array(Scorer(run, 8).score(asked))
    order = np.random.default_rng(2).permutation(len(asked))
    others = np.array(Scorer(run, batch_size).score([asked[i] for i in order]))
    np.testing.assert_allclose(others, scores[order], rtol=1e-5)


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, pytest.param({"data": 8}, marks=pytest.mark.slow)])
def test_a_mesh_changes_no_score(run, mesh):
    asked = requests(3)
    spread = Scorer(scoring_run(**{f"mesh__{axis}": size for axis, size in mesh.items()}), 8)
    np.testing.assert_allclose(np.array(spread.score(asked)), np.array(Scorer(run).score(asked)), rtol=1e-5)
    assert all(rows % spread.shards == 0 for rows, _ in spread.shapes)


def test_what_is_longer_than_the_context_keeps_its_end(run):
    long = np.random.default_rng(4).integers(0, 300, 3 * CONTEXT).tolist()
    end = long[-CONTEXT - 1 :]
    few, all_of_it, end_few, whole_end = Scorer(run).score(
        [Scored(long, 5), Scored(long, 3 * CONTEXT - 1), Scored(end, 5), Scored(end, CONTEXT)]
    )
    assert few.log_likelihood == pytest.approx(end_few.log_likelihood, rel=1e-6)
    assert all_of_it.log_likelihood == pytest.approx(whole_end.log_likelihood, rel=1e-6)


def test_the_score_of_a_text_is_minus_its_loss(run):
    ids = [END, *np.random.default_rng(5).integers(1, 300, CONTEXT).tolist()]
    split = TokenSplit([InMemory(np.array(ids, np.uint16))], 100, 1, END, "x")
    figures = evaluate_split(run.step, run.state, split, run.cfg)
    (score,) = Scorer(run).score([Scored(ids, CONTEXT)])
    assert -score.log_likelihood == pytest.approx(figures["loss"] * CONTEXT, rel=1e-6)


def test_a_broken_model_is_named(run):
    params = run.state.params | {"norm_scale": run.state.params["norm_scale"] * np.nan}
    broken = dataclasses.replace(run, state=run.state._replace(params=params))
    with pytest.raises(UserError, match="not finite"):
        Scorer(broken).score(requests(count=3))


def test_batches_are_few_shapes_and_hold_each_request_once():
    lengths = np.random.default_rng(0).integers(1, 2049, 5000).tolist()
    found = list(batches(lengths, tokens=16 * 2048, longest=2048, shards=8))
    assert sorted(member for batch in found for member in batch.members) == list(range(5000))
    for batch in found:
        assert max(lengths[i] for i in batch.members) <= batch.length and len(batch.members) <= batch.rows
        assert batch.rows % 8 == 0 and batch.rows * batch.length <= 16 * 2048
    shapes = {(batch.rows, batch.length) for batch in found}
    assert len(shapes) <= 16
    assert sum(lengths) >= 0.8 * sum(batch.rows * batch.length for batch in found)


def test_lengths_are_rounded_up_to_few():
    found = [padded_length(n, 1000) for n in range(1, 1001)]
    assert sorted(set(found)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000]
    assert all(n <= length for n, length in enumerate(found, 1))


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 4}])
def test_prompts_of_several_lengths_go_on_as_each_alone(run, mesh):
    rng = np.random.default_rng(6)
    prompts = [Prompt(rng.integers(1, 300, n).tolist(), 9, Sampling(0.0)) for n in (1, 17, 56)]
    spread = scoring_run(**{f"mesh__{axis}": size for axis, size in mesh.items()})
    found = Scorer(spread).generate(prompts, end=-7, is_done=lambda number, ids: number == 1 and len(ids) == 4)
    for number, (prompt, ids) in enumerate(zip(prompts, found, strict=True)):
        stream = generate(
            run.cfg.model,
            run.state.params,
            run.state.tau_now(),
            jnp.asarray([prompt.ids]),
            9,
            how=prompt.how,
            num_ids=run.tokenizer.vocab_size,
        )
        assert ids == np.concatenate(list(stream))[: 4 if number == 1 else 9, 0].tolist()


def test_an_end_of_text_ends_an_answer(run):
    prompts = [Prompt([5, 6, 7], 12, Sampling(0.0))]
    (whole,) = Scorer(run).generate(prompts, end=-7, is_done=lambda *_: False)
    end = whole[5]
    (cut,) = Scorer(run).generate(prompts, end=end, is_done=lambda *_: False)
    assert cut == whole[: whole.index(end)]


def test_log_likelihoods_in_parts_are_those_of_all_logits(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    h_BLD, table_VD = jax.random.normal(keys[0], (3, 12, 16)), jax.random.normal(keys[1], (50, 16))
    targets_BL = jax.random.randint(keys[2], (3, 12), 0, 50)
    logits_BLV = h_BLD @ table_VD.T
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), targets_BL[..., None], axis=-1)[..., 0]
    for most in (2**28, 3 * 4 * 50):
        monkeypatch.setattr("tokenformer_jax.nn.loss.LOGITS", most)
        scores_BL, likeliest_BL = jax.jit(lambda *args: log_likelihoods(*args))(h_BLD, table_VD, targets_BL)
        np.testing.assert_allclose(scores_BL, expected, rtol=1e-5)
        np.testing.assert_array_equal(likeliest_BL, logits_BLV.argmax(-1) == targets_BL)


@pytest.mark.parametrize("num_tokens", [2, 64, 65, 66, 129, 200])
@pytest.mark.parametrize("stride", [0, 1, 7, 64])
def test_windows_of_any_stride_predict_every_token_once(num_tokens, stride):
    split = TokenSplit([InMemory(np.arange(num_tokens, dtype=np.uint16))], 1, 1, 999, "x")
    found = eval_batches(split, 3, CONTEXT, stride=stride)
    targets, context = [], []
    for batch in found:
        counts = batch.weights_BL == 1
        targets += batch.targets_BL[counts].tolist()
        context += (np.arange(CONTEXT) + np.zeros((3, 1), int))[counts].tolist()
        np.testing.assert_array_equal(batch.targets_BL[counts], batch.tokens_BL[counts] + 1)
    assert sorted(targets) == list(range(1, num_tokens))
    if stride:
        assert all(seen >= CONTEXT - stride for target, seen in zip(targets, context, strict=True) if target > CONTEXT)


def test_a_stride_sees_more_context_and_weighs_each_token_once(run):
    tokens = np.random.default_rng(7).integers(0, 300, 150).astype(np.uint16)
    split = TokenSplit([InMemory(tokens)], 300, 1, 999, "x")
    disjoint, sliding = (evaluate_split(run.step, run.state, split, run.cfg, stride=s) for s in (0, 16))
    assert disjoint["tokens"] == sliding["tokens"] == 149
    total = 0.0
    for target in range(1, 150):
        begin = 0 if target <= CONTEXT else -(-(target - CONTEXT) // 16) * 16
        total -= float(log_probabilities(tokens[begin : target + 1])[0][-1])
    assert sliding["loss"] == pytest.approx(total / 149, rel=1e-5)
