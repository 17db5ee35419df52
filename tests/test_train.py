"""Laws of a run: it resumes bit for bit, on the same mesh or another, and stops cleanly."""

import dataclasses
import json
import os
import re
import signal
import threading
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.commands import call
from tests.helpers import (
    assert_trees_equal,
    corpus_overrides,
    rows_of,
    step_of,
    tiny_config,
    write_config,
    write_corpus,
)
from tokenformer_jax.cli import STOPPED
from tokenformer_jax.config import validate
from tokenformer_jax.errors import UserError
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.metrics_file import read_metrics
from tokenformer_jax.storage.record import Record
from tokenformer_jax.storage.workdir import load_config

pytestmark = pytest.mark.usefixtures("steps_are_shared")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    every = {"log_every": 1, "eval_every": 3, "checkpoint_every": 2}
    return tiny_config(**corpus_overrides(folder), **every)


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(cfg, workdir)
    return workdir


def final_state(cfg, workdir):
    step = step_of(cfg)
    checkpoints = Checkpoints(workdir / "checkpoints")
    return jax.device_get(checkpoints.restore(checkpoints.choose(None), step.abstract_state))


def test_run_learns_and_leaves_what_the_design_says(cfg, whole):
    rows = read_metrics(whole)
    train_rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train_rows] == list(range(1, 9))
    names = {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second", "params", "train_flops"}
    assert names <= set(train_rows[0])
    assert [row["tokens"] for row in train_rows] == [n * 8 * 16 for n in range(1, 9)]
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [3, 6, 8]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] < np.log(300)
    assert evaluations[0]["eval_perplexity"] == pytest.approx(np.exp(evaluations[0]["eval_loss"]))
    assert load_config(whole / "config.json") == cfg
    assert json.loads((whole / "environment.json").read_text())["packages"]["jax"] == jax.__version__
    assert list((whole / "tensorboard").iterdir())
    assert Checkpoints(whole / "checkpoints").steps == [6, 8]


@pytest.mark.parametrize("step", [2, 3])
def test_stopped_and_resumed_run_is_bit_identical(cfg, whole, tmp_path, monkeypatch, step):
    """Also where the stop falls on a step whose evaluation is still due."""
    with monkeypatch.context() as patch:
        patch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", lambda self, n: n == step)
        train(cfg, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps[-1] == step
    train(cfg, tmp_path)
    key = lambda row: (row["step"], "eval_loss" in row)  # noqa: E731
    assert sorted(rows_of(tmp_path), key=key) == sorted(rows_of(whole), key=key)
    assert_trees_equal(final_state(cfg, tmp_path), final_state(cfg, whole))


def test_run_killed_after_a_checkpoint_drops_the_rows_it_repeats(cfg, whole, tmp_path):
    class Killed(BaseException):
        pass

    def die(self, n):
        if n == 5:
            self_checkpoints[0].wait()
            raise Killed
        return False

    self_checkpoints = []
    original = Checkpoints.__init__

    def remember(self, *args, **kwargs):
        self_checkpoints.append(self)
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "__init__", remember)
        patch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", die)
        with pytest.raises(Killed):
            train(cfg, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # cut short
    train(cfg, tmp_path)
    assert rows_of(tmp_path) == rows_of(whole)


def test_checkpoint_restores_on_any_mesh_bit_for_bit(cfg, whole):
    alone = final_state(cfg, whole)
    for mesh in [(8, 1, 1), (1, 2, 4), (2, 2, 2)]:
        sharded = dataclasses.replace(
            cfg, mesh=dataclasses.replace(cfg.mesh, data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
        )
        assert_trees_equal(final_state(sharded, whole), alone)


def test_signal_saves_and_returns(cfg, tmp_path):
    long = dataclasses.replace(cfg, steps=100_000, checkpoint_every=0, eval_every=0)

    def send():
        while not (tmp_path / "metrics.jsonl").exists() or not read_metrics(tmp_path):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert not train(long, tmp_path)
    sender.join()
    assert 0 < Checkpoints(tmp_path / "checkpoints").steps[-1] < 100_000
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("minutes", [1e-9, pytest.param(1e-300, marks=pytest.mark.slow)])
def test_the_end_of_max_minutes_saves_and_the_same_call_goes_on(cfg, whole, tmp_path, minutes, capsys):
    short = dataclasses.replace(cfg, max_minutes=minutes)
    for step in range(1, 3):  # each call does what it can
        assert not train(short, tmp_path)
        assert Checkpoints(tmp_path / "checkpoints").steps[-1] == step
        assert f"stopped after max_minutes = {minutes:g} and saved at step {step}" in capsys.readouterr().err
    assert train(dataclasses.replace(cfg, max_minutes=1e9), tmp_path)
    assert rows_of(tmp_path) == rows_of(whole)


def test_a_stopped_command_is_told_from_a_finished_one_by_its_exit_code(cfg, tmp_path):
    config = write_config(tmp_path / "config.py", cfg)
    flags = config, f"--workdir={tmp_path}/run"
    stopped = call("train", *flags, "--config.max_minutes=1e-9")
    assert stopped.returncode == STOPPED and "saved at step" in stopped.stderr
    assert call("train", *flags).returncode == 0
    for minutes in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="max_minutes"):
            validate(dataclasses.replace(cfg, max_minutes=minutes))


def test_finished_run_has_nothing_to_do(cfg, whole):
    before = rows_of(whole)
    assert train(cfg, whole)
    assert rows_of(whole) == before


def test_a_longer_run_goes_on(cfg, whole, tmp_path):
    train(dataclasses.replace(cfg, steps=4), tmp_path)
    train(dataclasses.replace(cfg, steps=6), tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_workdir_of_another_model_is_refused(cfg, whole):
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, ffn_tokens=128))
    with pytest.raises(UserError, match=r"model\.ffn_tokens = 128"):
        train(other, whole)


def test_workdir_with_other_files_is_refused(cfg, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        train(cfg, tmp_path)


def test_non_finite_loss_stops_the_run_and_is_not_saved(cfg, tmp_path):
    wild = dataclasses.replace(
        cfg, optimizer=dataclasses.replace(cfg.optimizer, peak_learning_rate=1e38, warmup_steps=0)
    )
    with pytest.raises(UserError, match=r"(loss|grad_norm) (nan|inf)"):
        train(wild, tmp_path)
    assert not Checkpoints(tmp_path / "checkpoints", keep=1).steps


def truncate(checkpoint):
    for path in (checkpoint / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-100])


def test_damaged_newest_checkpoint_is_set_aside_for_an_older_one(cfg, whole, tmp_path, capsys):
    train(dataclasses.replace(cfg, steps=4), tmp_path)
    truncate(tmp_path / "checkpoints" / "4")
    train(cfg, tmp_path)
    said = capsys.readouterr().err
    assert re.search(r"checkpoints/4: step, params.* damaged \(.*\); step 2 is used instead", said)
    assert "damaged checkpoint of step 4 was moved to" in said
    assert len(list((tmp_path / "damaged_checkpoints").iterdir())) == 1
    assert Checkpoints(tmp_path / "checkpoints").steps == [6, 8]
    rows = [row for row in rows_of(tmp_path) if row["step"] > 4]
    assert [row["step"] for row in rows if "loss" in row] == [5, 6, 7, 8]


def test_damaged_only_checkpoint_is_named(cfg, tmp_path):
    train(dataclasses.replace(cfg, steps=3, checkpoint_every=0), tmp_path)
    truncate(tmp_path / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"checkpoints/3: step, params.* and \d+ more damaged"):
        train(cfg, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps == [3]


def test_resuming_on_other_data_or_in_another_order_is_refused(cfg, whole, tmp_path):
    with pytest.raises(UserError, match=r"config\.seed: .* was trained on tokens"):
        train(dataclasses.replace(cfg, seed=1), whole)
    data = dataclasses.replace(cfg.data, path=str(write_corpus(tmp_path / "text", seed=1)))
    with pytest.raises(UserError, match=r"config\.data"):
        train(dataclasses.replace(cfg, data=data), whole)


def test_run_goes_on_with_another_mesh_batch_size_and_rematerialization(cfg, tmp_path):
    train(dataclasses.replace(cfg, steps=4), tmp_path)
    other = dataclasses.replace(
        cfg,
        batch_size=16,
        mesh=dataclasses.replace(cfg.mesh, fsdp=4, tensor=2),
        model=dataclasses.replace(cfg.model, remat="full"),
    )
    train(dataclasses.replace(other, steps=6), tmp_path)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert [row["tokens"] for row in rows] == [128, 256, 384, 512, 768, 1024]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_save_may_copy_from_the_device(tmp_path):
    """On a CPU only arrays that are not read in place, such as int4, are copied: they stand in for a GPU's."""
    state = {"x": jnp.arange(4, dtype=jnp.int4)}
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    data = iter(grain.MapDataset.range(3).to_iter_dataset())
    with jax.transfer_guard("disallow"):
        checkpoints.save(1, state, data, {}, Record({}, "", 1))
        checkpoints.wait()
    assert checkpoints.steps == [1]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmore")

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    monkeypatch.setattr("orbax.checkpoint.v1.training.Checkpointer.save_checkpointables_async", fail)
    data = iter(grain.MapDataset.range(3).to_iter_dataset())
    with pytest.raises(UserError, match=r"cannot be written \(RESOURCE_EXHAUSTED: No space left on device\)$"):
        checkpoints.save(1, {"x": jnp.ones(3)}, data, {}, Record({}, "", 1))
