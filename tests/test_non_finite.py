"""Laws of steps that are not finite: none learns; the run ends, passes over them or goes back, as the config says."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.commands import call_well
from tests.helpers import (
    assert_trees_equal,
    corpus_overrides,
    random_batch,
    rows_of,
    step_of,
    tiny_config,
)
from tokenformer_jax.errors import UserError
from tokenformer_jax.running.loop import train
from tokenformer_jax.running.run import open_run
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.metrics_file import read_metrics
from tokenformer_jax.training.non_finite import what_is_bad
from tokenformer_jax.training.step import put_batch

pytestmark = pytest.mark.usefixtures("steps_are_shared")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("non_finite")
    every = {"log_every": 1, "eval_every": 4, "checkpoint_every": 2}
    return tiny_config(**corpus_overrides(folder), **every)


@pytest.fixture
def poison(cfg, tmp_path, monkeypatch):
    """Makes batches, by their number in the order of training, poisonous: as a fault of a device or the data would."""

    def choose(*numbers, weight=np.nan):
        order = open_run(cfg, tmp_path / "order").data
        rows = [next(order).tokens_BL for _ in range(12)]

        def put(step, batch):
            if any(np.array_equal(batch.tokens_BL, rows[number]) for number in numbers):
                batch = batch._replace(weights_BL=batch.weights_BL * np.float32(weight))
            return put_batch(step, batch)

        monkeypatch.setattr("tokenformer_jax.running.loop.put_batch", put)

    return choose


def test_what_is_not_finite_changes_neither_parameters_nor_moments():
    cfg = tiny_config()
    step = step_of(cfg)
    state, _ = step.train(step.init(jax.random.key(0)), put_batch(step, random_batch(cfg)))
    for weight in (np.nan, np.inf):
        bad = random_batch(cfg)
        bad = put_batch(step, bad._replace(weights_BL=np.full_like(bad.weights_BL, weight)))
        after, metrics = step.train(copy(state), bad)
        assert not np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
        assert int(after.step) == int(state.step) + 1
        assert_trees_equal(after.params, state.params)
        for moments in ("mu", "nu"):
            assert_trees_equal(getattr(after.opt_state[0], moments), getattr(state.opt_state[0], moments))
    good, _ = step.train(copy(state), put_batch(step, random_batch(cfg, seed=1)))
    assert np.abs(good.params["embed"] - state.params["embed"]).max() > 0


def copy(state):
    return jax.tree.map(jnp.copy, state)


def test_by_default_the_run_ends_and_names_step_examples_and_arrays(cfg, tmp_path, poison):
    poison(4)
    with pytest.raises(UserError) as error:
        train(cfg, tmp_path / "run")
    line = str(error.value)
    assert re.search(r"^step 5: loss nan, grad_norm nan, and the largest gradients are those of \S+ \(nan\), ", line)
    assert "--examples=32:40 shows the batch" in line
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps == [2, 4]


def test_the_examples_of_a_step_can_be_looked_at(cfg, tmp_path):
    train(dataclasses.replace(cfg, steps=4), tmp_path / "run")
    out = call_well("evaluate", f"--workdir={tmp_path}/run", "--examples=32:40")
    run = open_run(cfg, tmp_path / "run")
    batch = next(run.data)
    texts = [run.corpus.tokenizer.decode(tokens.tolist()) for tokens in batch.tokens_BL]
    assert re.findall(r"--- example (\d+), loss \d\.\d+ nats\n", out) == [str(n) for n in range(32, 40)]
    assert [text.rstrip("\n") for text in re.split(r"--- example .*\n", out)[1:]] == [t.rstrip("\n") for t in texts]


def test_skipping_goes_on_with_the_next_batch(cfg, tmp_path, poison):
    poison(2, 4)
    cfg = dataclasses.replace(cfg, non_finite="skip")
    train(cfg, tmp_path / "run")
    said = {row["step"]: row["skipped"]["examples"] for row in rows_of(tmp_path / "run") if "skipped" in row}
    assert said == {3: [16, 24], 5: [32, 40]}
    losses = {row["step"]: row["loss"] for row in rows_of(tmp_path / "run") if "loss" in row}
    assert sorted(losses) == [1, 2, 4, 6, 7, 8] and losses[8] < losses[1]


def test_skipping_too_many_in_a_row_ends_the_run(cfg, tmp_path, poison):
    poison(2, 3, 4)
    cfg = dataclasses.replace(cfg, non_finite="skip", non_finite_limit=2)
    with pytest.raises(UserError, match=r"^step 5: "):
        train(cfg, tmp_path / "run")
    poison(2, 3)
    train(cfg, tmp_path / "another")


def test_rolling_back_goes_on_behind_the_bad_batch_also_when_killed(cfg, tmp_path, poison, monkeypatch):
    poison(3, 5)
    cfg = dataclasses.replace(cfg, non_finite="rollback", steps=10)
    train(cfg, tmp_path / "run")
    run = open_run(cfg, tmp_path / "run")
    # Step 4 reads batch 3: back to step 2, whose next step reads batch 4 and the one after it batch 5: back again.
    assert [(r["from"], r["to"], r["examples"]) for r in run.record.rollbacks] == [(4, 2, [24, 32]), (4, 2, [40, 48])]
    assert run.data.get_state()["next_index"] == 6 + 8  # eight steps after batch 5
    assert sum("rollback" in row for row in rows_of(tmp_path / "run")) == 2
    assert [row["step"] for row in rows_of(tmp_path / "run") if "loss" in row] == list(range(1, 11))

    class Killed(BaseException):
        pass

    def die(self, n):
        if len(read_metrics(tmp_path / "killed")) > 6:
            raise Killed
        return False

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", die)
        train(cfg, tmp_path / "killed")
    train(cfg, tmp_path / "killed")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "run")


def test_rolling_back_too_often_ends_the_run(cfg, tmp_path, poison):
    poison(3, 5)
    with pytest.raises(UserError, match=r"^step 4: "):
        train(dataclasses.replace(cfg, non_finite="rollback", non_finite_limit=1), tmp_path / "run")


def test_a_spike_of_the_loss_counts_when_asked_for(cfg, tmp_path, poison, monkeypatch):
    monkeypatch.setattr("tokenformer_jax.training.non_finite.SPIKE_WINDOW", 4)
    monkeypatch.setattr("tokenformer_jax.running.run.SPIKE_WINDOW", 4)
    cfg = dataclasses.replace(cfg, loss_spike=3.0, non_finite="rollback")
    train(cfg, tmp_path / "smooth")
    assert not open_run(cfg, tmp_path / "smooth").record.rollbacks

    def spiked(loss, *others):
        return what_is_bad(loss + (4.0 if int(np.round(loss * 1e6)) == spike else 0.0), *others)

    spike = next(int(np.round(row["loss"] * 1e6)) for row in rows_of(tmp_path / "smooth") if row["step"] == 7)
    monkeypatch.setattr("tokenformer_jax.running.loop.what_is_bad", spiked)
    train(cfg, tmp_path / "run")
    (rollback,) = open_run(cfg, tmp_path / "run").record.rollbacks
    assert (rollback["from"], rollback["to"]) == (7, 6) and "nats above" in rollback["why"]
    with pytest.raises(UserError, match=r"step 7: loss .* nats above"):
        train(dataclasses.replace(cfg, non_finite="raise"), tmp_path / "raising")
