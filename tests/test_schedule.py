"""Laws of the learning rate: its phases, one schedule over a ladder, branches off a run, and rates of new tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_trees_equal, corpus_overrides, random_batch, rows_of, tiny_config
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.ladder import stages
from tokenformer_jax.growth.resize import Resize
from tokenformer_jax.running.branch import branch
from tokenformer_jax.running.loop import train
from tokenformer_jax.running.signals import StopSignals
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.schedule import NewTokens, learning_rate
from tokenformer_jax.training.step import make_step, put_batch

pytestmark = pytest.mark.usefixtures("steps_are_shared")

PEAK, FINAL = 1e-2, 1e-3


@pytest.mark.parametrize("start", [0, 7])
@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(
    "keys, fallen",  # how much of the way to the final rate is done at a step of 20
    [
        ({"schedule": "cosine"}, lambda t, warmup: (1 - math.cos(math.pi * (t - warmup) / (20 - warmup))) / 2),
        ({"schedule": "constant"}, lambda t, warmup: 0.0),
        ({"schedule": "wsd", "decay_fraction": 0.4}, lambda t, warmup: max(0, t - 12) / 8),
        ({"schedule": "wsd", "decay_fraction": 0.4, "decay": "sqrt"}, lambda t, warmup: math.sqrt(max(0, t - 12) / 8)),
        ({"schedule": "wsd", "decay_fraction": 0.0}, lambda t, warmup: 0.0),
        ({"schedule": "wsd", "decay_fraction": 1.0}, lambda t, warmup: (t - warmup) / (20 - warmup)),
    ],
)
def test_the_rate_warms_up_and_then_follows_its_schedule(keys, fallen, warmup, start):
    cfg = tiny_config(
        optimizer__peak_learning_rate=PEAK, optimizer__final_learning_rate=FINAL, optimizer__warmup_steps=warmup
    ).optimizer
    rate = jax.jit(learning_rate(dataclasses.replace(cfg, **keys), start + 20, start))
    for t in range(20):
        expected = PEAK * t / warmup if t < warmup else PEAK + (FINAL - PEAK) * fallen(t, warmup)
        assert float(rate(start + t)) == pytest.approx(expected, rel=1e-5), t


def test_the_final_rate_may_be_0_and_is_reached_at_the_end():
    cfg = dataclasses.replace(tiny_config(optimizer__final_learning_rate=0.0).optimizer, schedule="wsd")
    assert float(learning_rate(cfg, 20)(20)) == 0 < float(learning_rate(cfg, 20)(19))


RUNGS = ({"step": 6, "model": {"ffn_tokens": 128}}, {"step": 9, "model": {"qkv_tokens": 32}})
ONE_SCHEDULE = {
    **{"rungs": RUNGS, "steps": 16, "grow__restart_schedule": False},
    **{"optimizer__schedule": "wsd", "optimizer__decay_fraction": 0.25, "optimizer__final_learning_rate": 0.0},
    **{"checkpoint_every": 20, "eval_every": 0, "log_every": 1},
}


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    """A ladder under one schedule; its workdir, and the moments on both sides of each growth."""
    folder, sides = tmp_path_factory.mktemp("schedule"), []
    cfg = tiny_config(**ONE_SCHEDULE, **corpus_overrides(folder))
    apply = Resize.apply

    def seen(self, source, validation):
        before = jax.device_get(source.opt_state)
        new, figures = apply(self, source, validation)
        sides.append((before, jax.device_get(new.opt_state)))
        return new, figures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resize, "apply", seen)
        train(cfg, folder / "whole")
    return cfg, folder / "whole", sides


def test_a_rung_in_the_stable_phase_changes_neither_rate_nor_moments(climbed):
    _, workdir, sides = climbed
    rates = [row["learning_rate"] for row in rows_of(workdir) if "loss" in row]
    expected = [0, 0.5 * PEAK, *[PEAK] * 11, *(PEAK * (1 - t / 4) for t in (1, 2, 3))]  # two warm up, four decay
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert len(sides) == len(RUNGS)
    for before, after in sides:

        def kept(old, new):
            np.testing.assert_array_equal(new[tuple(map(slice, np.shape(old)))] if np.ndim(old) else new, old)

        jax.tree.map(kept, before, after)
    assert Checkpoints(workdir / "checkpoints").record(16).schedule_start == 0


@pytest.mark.parametrize(
    "stop", [*(pytest.param(at, marks=pytest.mark.slow) for at in (1, 7)), 14], ids=["warm-up", "stable", "decay"]
)
def test_a_run_that_is_stopped_in_any_phase_ends_the_same(climbed, tmp_path, monkeypatch, stop):
    cfg, whole, _ = climbed
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "stop_after", lambda self, n: n == stop)
        assert not train(cfg, tmp_path / "cut")
    assert train(cfg, tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(whole)
    assert_trees_equal(*(load_trained(workdir).state for workdir in (tmp_path / "cut", whole)))


@pytest.mark.slow
def test_a_rung_may_have_a_peak_of_its_own_and_restart_or_not(tmp_path):
    rungs = (
        {**RUNGS[0], "optimizer": {"peak_learning_rate": PEAK / 2}},
        {**RUNGS[1], "grow": {"restart_schedule": True}, "optimizer": {"warmup_steps": 1}},
    )
    cfg = tiny_config(**ONE_SCHEDULE | {"rungs": rungs}, **corpus_overrides(tmp_path))
    train(cfg, tmp_path / "run")
    rates = [row["learning_rate"] for row in rows_of(tmp_path / "run") if "loss" in row]
    # The first schedule ends at step 9, where the second rung restarts: it decays over the last two steps of that.
    expected = [0, 0.5 * PEAK, *[PEAK] * 4, PEAK / 2, PEAK / 2, PEAK / 4, 0, *[PEAK / 2] * 5, PEAK / 4]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"rungs": ({**RUNGS[0], "optimizer": {"schedule": "constant"}},)},
            "optimizer.schedule = 'constant': the stage",
        ),
        ({"rungs": ({**RUNGS[0], "optimizer": {"decay": "sqrt"}},)}, "optimizer.decay = 'sqrt': the stage before has"),
        ({"grow__patience": 2, "optimizer__schedule": "cosine"}, "grow.patience = 2: .*use optimizer.schedule = 'wsd'"),
        ({"optimizer__schedule": "linear"}, "optimizer.schedule = 'linear': must be one of cosine, wsd, constant"),
        ({"optimizer__decay_fraction": 1.5}, "optimizer.decay_fraction = 1.5: must lie between 0 and 1"),
        ({"grow__new_tokens_rate": 0.0}, "grow.new_tokens_rate = 0.0: must be above 0"),
    ],
)
def test_what_is_no_schedule_is_named(keys, message):
    with pytest.raises(UserError, match=message):
        stages(tiny_config(**ONE_SCHEDULE | keys))


def test_a_branch_ends_as_the_run_that_was_planned_to_end_there(climbed, tmp_path, monkeypatch):
    """Off a ladder's trunk at a constant rate, on its second rung, and stopped on its way."""
    planned, whole, _ = climbed
    optimizer = dataclasses.replace(planned.optimizer, schedule="constant")
    cfg = dataclasses.replace(planned, steps=14, checkpoint_every=4, checkpoints_kept=9, optimizer=optimizer)
    train(cfg, tmp_path / "trunk")
    made = branch(tmp_path / "trunk", 12, tmp_path / "branch")
    assert made.steps == 16 and made.optimizer == planned.optimizer
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "stop_after", lambda self, n: n == 14)
        assert not train(made, tmp_path / "branch")
    assert branch(tmp_path / "trunk", 12, tmp_path / "branch") == made  # as the same command says once more
    assert train(made, tmp_path / "branch")
    assert_trees_equal(*(load_trained(workdir).state for workdir in (tmp_path / "branch", whole)))
    assert branch(tmp_path / "trunk", 12, tmp_path / "longer", 0.5).steps == 24

    with pytest.raises(UserError, match=r"=13: .* holds the steps 4, 6, 8, 9, 12, 14"):
        branch(tmp_path / "trunk", 13, tmp_path / "other")
    for other in ((tmp_path / "trunk", 9), (tmp_path / "trunk", 12, 0.3), (whole, 9)):
        with pytest.raises(UserError, match="holds a run that did not leave"):
            branch(*other[:2], tmp_path / "branch", *other[2:])
    with pytest.raises(UserError, match="holds a run that did not leave"):
        branch(tmp_path / "trunk", 12, tmp_path / "trunk")
    with pytest.raises(UserError, match=r"--decay_fraction=1: must be above 0 and below 1; use 0.2"):
        branch(tmp_path / "trunk", 12, tmp_path / "other", 1.0)
    with pytest.raises(UserError, match=r"--decay_from=16: the learning rate of .* is 0 there, not at its peak"):
        branch(whole, 16, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_branch_off_a_rung_with_a_schedule_of_its_own_decays_too(tmp_path):
    rungs = ({**RUNGS[0], "optimizer": {"schedule": "constant", "decay_fraction": 0.5, "warmup_steps": 1}},)
    cfg = tiny_config(rungs=rungs, steps=14, log_every=1, checkpoint_every=4, **corpus_overrides(tmp_path))
    train(dataclasses.replace(cfg, checkpoints_kept=9), tmp_path / "trunk")
    made = branch(tmp_path / "trunk", 12, tmp_path / "branch")
    assert made.steps == 12 + (12 - 6)  # half of the rung's schedule
    train(made, tmp_path / "branch")
    rates = [row["learning_rate"] for row in rows_of(tmp_path / "branch") if "loss" in row]
    final = made.optimizer.final_learning_rate
    np.testing.assert_allclose(rates, [PEAK + (final - PEAK) * t / 6 for t in range(6)], rtol=1e-5)


@pytest.mark.slow
def test_a_branch_does_not_end_before_tau_has_its_target(tmp_path):
    keys = ONE_SCHEDULE | {"optimizer__schedule": "constant", "rungs": RUNGS[:1], "steps": 12, "grow__tau_ramp": 1.0}
    train(tiny_config(**keys | {"checkpoint_every": 4}, **corpus_overrides(tmp_path)), tmp_path / "trunk")
    with pytest.raises(UserError, match="=8: the branch would end at step 11, before τ reaches its target at step 12"):
        branch(tmp_path / "trunk", 8, tmp_path / "branch")
    assert branch(tmp_path / "trunk", 8, tmp_path / "branch", 0.4).steps == 13


def test_new_tokens_learn_at_a_rate_of_their_own():
    cfg = tiny_config()
    mesh = make_mesh(cfg.mesh)
    new = NewTokens({"ffn": 64}, step=0, rate=0.5, warmup=4)
    plain, scaled = make_step(cfg, mesh), make_step(cfg, mesh, new_tokens=new)
    state = plain.init(jax.random.key(0))
    state, _ = plain.train(state, put_batch(plain, random_batch(cfg)))  # the rate of the first step is 0
    batch = put_batch(plain, random_batch(cfg, 1))
    results = [step.train(jax.tree.map(jnp.copy, state), batch)[0] for step in (plain, scaled)]
    full, own = (
        jax.tree.map(lambda after, before: np.asarray(after) - np.asarray(before), result.params, state.params)
        for result in results
    )
    for name, tokens in (("ffn", 64), ("query", None)):  # the older ones, and a projection that did not grow
        moved = (tree["blocks"][name]["keys"][:, :tokens] for tree in (own, full))
        np.testing.assert_allclose(*moved, atol=1e-8)
    of_new = [moved["blocks"]["ffn"]["values"][:, 64:] for moved in (own, full)]
    np.testing.assert_allclose(of_new[0], of_new[1] * 0.5 * 2 / 4, atol=1e-7)  # the second of four steps of warm-up
    assert np.abs(of_new[0]).max() > 1e-5
