"""Laws of a ladder: rungs grow the model on its way, and a run that was cut anywhere ends as if it had not been."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import assert_trees_equal, corpus_overrides, random_batch, rows_of, tiny_config
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.ladder import Plateau, stages
from tokenformer_jax.growth.resize import Resize
from tokenformer_jax.running.log import Log
from tokenformer_jax.running.loop import train
from tokenformer_jax.running.signals import StopSignals
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.schedule import NewTokens
from tokenformer_jax.training.step import make_step, put_batch

pytestmark = pytest.mark.usefixtures("steps_are_shared")

RUNGS = (
    {"step": 6, "model": {"qkv_tokens": 32, "ffn_tokens": 128}, "mesh": {"fsdp": 4, "tensor": 2}},
    {"step": 12, "model": {"ffn_tokens": 192}, "batch_size": 16, "grow": {"recipe": "isometric"}},
)
LADDER = {"rungs": RUNGS, "steps": 18, "checkpoint_every": 4, "eval_every": 3, "log_every": 1, "mesh__fsdp": 8}


class Killed(Exception):
    """Stands in for a kill -9: nothing is saved, and nothing is tidied."""


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """The config of a ladder, and the workdir of its run from end to end."""
    folder = tmp_path_factory.mktemp("ladder")
    cfg = tiny_config(**LADDER, **corpus_overrides(folder))
    train(cfg, folder / "whole")
    return cfg, folder / "whole"


def test_a_run_climbs_its_rungs_and_tells_so(ladder):
    _, workdir = ladder
    rows = rows_of(workdir)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 19))
    growths = [row for row in rows if "growth" in row]
    assert [row["step"] for row in growths] == [6, 12]
    for row in growths:
        growth = row["growth"]
        assert growth["max_logit_difference"] <= 5e-6 * growth["max_logit"]
        assert growth["loss_after"] == pytest.approx(growth["loss_before"], abs=2e-6)
        before, after = (r["eval_loss"] for r in rows if "eval_loss" in r and r["step"] == row["step"])
        assert after == pytest.approx(before, abs=2e-6)  # evaluated on both sides
    record = Checkpoints(workdir / "checkpoints").record(18)
    assert [(g["step"], g["from"]["ffn"], g["to"]["ffn"]) for g in record.growth] == [(6, 96, 128), (12, 128, 192)]
    assert record.growth == [row["growth"] for row in growths]
    assert record.tokens == (6 * 8 + 6 * 8 + 6 * 16) * 16 and record.rung == 2
    rates = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    assert rates[6] < rates[5] and rates[7] == 0 and rates[9] > rates[7]  # each rung warms up anew


def test_the_last_model_of_each_rung_is_kept_and_can_be_used(ladder):
    _, workdir = ladder
    assert Checkpoints(workdir / "checkpoints").steps == [6, 12, 16, 18]
    sizes = {step: load_trained(workdir, step).state.params["blocks"]["ffn"]["keys"].shape[1] for step in (6, 12, 18)}
    assert sizes == {6: 96, 12: 128, 18: 192}


@pytest.mark.parametrize("kills", [(5, 11, 13), pytest.param((7, 15), marks=pytest.mark.slow)], ids=str)
def test_a_run_killed_on_both_sides_of_a_rung_ends_the_same(ladder, tmp_path, monkeypatch, kills):
    cfg, whole = ladder
    trained = Log.step

    def step(log, n, figures):
        trained(log, n, figures)
        if n in waiting:
            waiting.remove(n)
            raise Killed

    monkeypatch.setattr(Log, "step", step)
    waiting = list(kills)
    for _ in kills:
        with pytest.raises(Killed):
            train(cfg, tmp_path / "cut")
    train(cfg, tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(whole)
    ends = [load_trained(workdir).state for workdir in (tmp_path / "cut", whole)]
    assert_trees_equal(*ends)


def test_a_run_stopped_in_a_growth_ends_the_same(ladder, tmp_path, monkeypatch):
    cfg, whole = ladder
    apply = Resize.apply

    def killed(*args):
        apply(*args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Resize, "apply", killed)
        train(cfg, tmp_path / "cut")
    train(cfg, tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(whole)


def test_a_signal_stops_on_a_rung_and_the_run_goes_on(ladder, tmp_path, monkeypatch):
    cfg, whole = ladder
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "stop_after", lambda self, n: n == 6)  # the very step of the growth
        train(cfg, tmp_path / "cut")
    assert Checkpoints(tmp_path / "cut" / "checkpoints").steps[-1] == 6
    train(cfg, tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(whole)


def test_a_plateau_brings_the_next_rung_early_and_every_rung_keeps_its_length(ladder, tmp_path):
    cfg, _ = ladder
    changes = {"grow": dataclasses.replace(cfg.grow, patience=1, min_improvement=100.0)}  # nothing ever improves
    cfg = dataclasses.replace(cfg, eval_every=2, rungs=({**RUNGS[0], "step": 10}, {**RUNGS[1], "step": 15}), **changes)
    train(cfg, tmp_path / "early")
    rows = rows_of(tmp_path / "early")
    assert [row["step"] for row in rows if "growth" in row] == [4, 6]  # after the second evaluation of each rung
    assert rows[-1]["step"] == 6 + 18 - 15
    with (tmp_path / "early" / "metrics.jsonl").open() as file:
        assert json.loads(file.readline())["step"] == 1


def test_plateau():
    grow, plateau = tiny_config().grow, Plateau()
    for step, loss in enumerate((3.0, 2.5, 2.495, 2.6, 2.4), 1):
        plateau = plateau.after(step, loss, flops=1.0, min_improvement=0.01)
        assert plateau.stale == {3: 1, 4: 2}.get(step, 0)
        assert plateau.reached(dataclasses.replace(grow, patience=2)) == (step == 4)
        assert not plateau.reached(grow)
    assert plateau == Plateau(5, 2.4, seen=((1.0, 2.4),))


def test_the_slope_is_what_the_last_doubling_of_flops_brought():
    """Losses of a power law, whose slope is known; interpolated between evaluations that are not at half the FLOPs."""
    grow, plateau = tiny_config().grow, Plateau()
    for step in range(3, 40):
        plateau = plateau.after(step, 3.0 * step**-0.5, 1e15 * step, min_improvement=0.0)
        known = 3.0 * ((step / 2) ** -0.5 - step**-0.5)
        if step < 6:
            assert plateau.slope is None and not plateau.reached(dataclasses.replace(grow, slope=99.0))
        else:
            assert plateau.slope == pytest.approx(known, rel=0.02)
            for factor in (0.9, 1.1):
                assert plateau.reached(dataclasses.replace(grow, slope=factor * known)) == (factor > 1)
        assert not plateau.reached(grow)
    assert len(plateau.seen) <= 21  # no more than are needed
    assert Plateau(**json.loads(json.dumps(dataclasses.asdict(plateau)))).slope == plateau.slope  # as a record has it


@pytest.mark.slow
def test_a_slope_brings_the_next_rung_early(ladder, tmp_path):
    """Every fall is less than 100 nats, so a rung ends as soon as it has seen a doubling."""
    cfg, _ = ladder
    changes = {"grow": dataclasses.replace(cfg.grow, slope=100.0)}
    cfg = dataclasses.replace(cfg, eval_every=2, rungs=({**RUNGS[0], "step": 10}, {**RUNGS[1], "step": 15}), **changes)
    train(cfg, tmp_path / "early")
    rows = rows_of(tmp_path / "early")
    steps = [row["step"] for row in rows if "growth" in row]
    assert steps[0] == 4 and steps[1] > 6  # a rung sees its doubling once it has spent as much as all before


def test_frozen_tokens_wait_while_the_new_ones_learn():
    cfg = tiny_config()
    step = make_step(cfg, make_mesh(cfg.mesh), new_tokens=NewTokens({"ffn": 64}, step=0, freeze_steps=2))
    states = [step.init(jax.random.key(0))]
    for i in range(4):
        states.append(step.train(jax.tree.map(jnp.copy, states[-1]), put_batch(step, random_batch(cfg, i)))[0])

    def moved(name, tokens, before, after):
        pair = (states[i].params["blocks"][name]["keys"][:, tokens] for i in (before, after))
        return bool(np.any(np.subtract(*pair)))

    old, new = slice(0, 64), slice(64, None)
    assert not moved("ffn", old, 0, 2) and moved("ffn", new, 1, 2) and moved("query", old, 1, 2)
    assert moved("ffn", old, 2, 3)


@pytest.mark.parametrize(
    "rungs, message",
    [
        (({"model": {"ffn_tokens": 128}},), r"rungs\[0\].step = None: must be a step after 0"),
        (({"step": 9, "model": {"ffn_tokens": 128}},), "steps = 8: must be a step after 9"),
        (({"step": 4, "model": {"ffn_tokens": 64}},), r"rungs\[0\]: model.ffn_tokens = 64: the source has 96"),
        (({"step": 4, "model": {"num_layers": 3}},), r"rungs\[0\]: model.num_layers = 3: the source has 2"),
        (({"step": 4, "model": {"fn_tokens": 128}},), r"rungs\[0\]: .*fn_tokens.*did you mean 'ffn_tokens'"),
        (({"step": 4, "seed": 1},), r"rungs\[0\]: key 'seed' cannot change"),
        (({"step": 4, "batch_size": 16},), r"rungs\[0\]: model: no token count changes"),
        (({"step": 6, "model": {"ffn_tokens": 128}},), r"rungs\[0\]: optimizer.warmup_steps = 2: must be below"),
        (
            ({"step": 4, "model": {"ffn_tokens": 100}, "grow": {"recipe": "split"}},),
            r"rungs\[0\]: model.ffn_tokens = 100: grow.recipe = 'split' takes a multiple .* 96; use 96 or 192",
        ),
        (
            ({"step": 4, "model": {"ffn_tokens": 100}, "grow": {"recipe": "isometric"}},),
            "'isometric' takes the source's 96 or at least 128",
        ),
        (
            ({"step": 4, "model": {"ffn_tokens": 128}, "mesh": {"tensor": 3}},),
            r"rungs\[0\]: model.out_tokens = 40: must divide by mesh.tensor = 3",
        ),
    ],
)
def test_a_rung_that_cannot_be_is_named(rungs, message):
    with pytest.raises(UserError, match=message):
        stages(tiny_config(rungs=rungs))


def test_a_ladder_must_agree_with_how_it_grew(ladder):
    cfg, workdir = ladder
    other = ({**RUNGS[0], "model": {"qkv_tokens": 64, "ffn_tokens": 128}}, RUNGS[1])
    with pytest.raises(UserError, match=r"rungs\[1\].model.qkv_tokens = 64: .* has grown to 32"):
        train(dataclasses.replace(cfg, rungs=other), workdir)
    with pytest.raises(UserError, match=r"lists 1 rungs, but .* has grown to rung 2"):
        train(dataclasses.replace(cfg, rungs=RUNGS[:1]), workdir)
