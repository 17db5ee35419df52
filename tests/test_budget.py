"""A budget in tokens or FLOPs ends a run where as many steps would, on a ladder, after growth and when resumed."""

import dataclasses
import json

import pytest

from tests.commands import call, call_well, complaint
from tests.helpers import assert_trees_equal, corpus_overrides, rows_of, tiny_config, write_config
from tokenformer_jax.config import read_config
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.ladder import stages, with_budget
from tokenformer_jax.running.loop import train
from tokenformer_jax.running.signals import StopSignals
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.language import train_flops_per_token

pytestmark = pytest.mark.usefixtures("steps_are_shared")

TOKENS = 8 * 16  # of a step
RUNGS = (
    {"step": 4, "model": {"ffn_tokens": 128}},
    {"step": 8, "model": {"ffn_tokens": 192}, "batch_size": 16},
)
LAST = {"model__ffn_tokens": 192, "batch_size": 16}


def planned(**overrides):
    return [stage.steps for stage in with_budget(stages(tiny_config(**overrides)))]


def flops(**overrides):
    """Of a step."""
    cfg = tiny_config(**overrides)
    return cfg.batch_size * 16 * train_flops_per_token(cfg.model)


@pytest.mark.parametrize("steps", [3, 8, 143_000, 10**9])
@pytest.mark.parametrize("over, more", [(0, 0), (0.3, 1), (1, 1), (TOKENS - 1, 1), (TOKENS, 1), (TOKENS + 1, 2)])
def test_tokens_are_rounded_up_to_whole_steps(steps, over, more):
    assert planned(train_tokens=float(steps * TOKENS + over)) == [steps + more]


@pytest.mark.parametrize("steps", [3, 8, 143_000, 10**9])
@pytest.mark.parametrize("part, more", [(0, 0), (0.01, 1), (0.99, 1), (1, 1), (1.01, 2)])
def test_flops_are_rounded_up_to_whole_steps(steps, part, more):
    assert planned(train_flops=(steps + part) * flops()) == [steps + more]


def test_a_run_for_as_many_flops_as_its_rows_add_up_to_is_as_long():
    each, total = flops(), 0.0
    for steps in range(1, 100_001):
        total += each  # rounded, as the sums of a run that saves after every step
        if steps in (3, 10, 99, 1000, 9999, 100_000):
            assert planned(train_flops=total) == [steps]


@pytest.mark.parametrize("steps", [9, 18, 1000])
def test_a_ladders_last_rung_ends_where_all_rungs_have_spent_the_budget(steps):
    small, middle, large = (flops(**changes) for changes in ({}, {"model__ffn_tokens": 128}, LAST))
    without_warmup = {"rungs": RUNGS, "optimizer__warmup_steps": 0}
    assert planned(train_tokens=8.0 * TOKENS + (steps - 8) * 2 * TOKENS, **without_warmup) == [4, 8, steps]
    assert planned(train_flops=4 * small + 4 * middle + (steps - 8) * large, **without_warmup) == [4, 8, steps]
    assert planned(train_flops=4 * small + 4 * middle + (steps - 8.5) * large, **without_warmup) == [4, 8, steps]


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train_tokens": -1.0}, "train_tokens = -1.0: must be 0 or above"),
        ({"train_flops": float("inf")}, "train_flops = inf: must be 0 or above"),
        ({"train_tokens": 1e6, "train_flops": 1e15}, r"train_tokens = 1e\+06 and train_flops = 1e\+15: .*use one"),
        ({"train_tokens": 127.0}, "train_tokens = 127: is less than one step's 128 tokens; use that or more"),
        ({"train_flops": 1e3}, "train_flops = 1000: is less than one step's .* flops; use that or more"),
        ({"train_tokens": 256.0}, "optimizer.warmup_steps = 2: must be below the 2 steps that train_tokens = 256"),
        (
            {"train_tokens": 8.0 * TOKENS, "rungs": RUNGS},
            "train_tokens = 1024: the rungs before the last take 1024 tokens; use more",
        ),
        (
            {"train_tokens": 12.0 * TOKENS, "rungs": RUNGS},
            "optimizer.warmup_steps = 2: must be below the 2 steps that train_tokens = 1536 leaves",
        ),
        ({"train_tokens": 1e6, "rungs": ({"step": "4"},)}, r"rungs\[0\].step = '4': must be a step after 0"),
        (
            {"train_tokens": 1e6, "rungs": ({"step": 4, "model": {"ffn_tokens": 128}, "train_tokens": 1e5},)},
            "key 'train_tokens' cannot change",
        ),
    ],
)
def test_a_budget_that_cannot_be_is_named(overrides, message):
    with pytest.raises(UserError, match=message):
        planned(**overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config of 8 steps, and the workdir of its run."""
    folder = tmp_path_factory.mktemp("budget")
    cfg = tiny_config(**corpus_overrides(folder), log_every=1, eval_every=4, checkpoint_every=3)
    train(cfg, folder / "whole")
    return cfg, folder / "whole"


def assert_same_run(workdir, other):
    assert rows_of(workdir) == rows_of(other)
    assert_trees_equal(*(load_trained(folder).state for folder in (workdir, other)))


@pytest.mark.parametrize("key", ["train_tokens", "train_flops"])
def test_a_budget_trains_as_its_steps_do_and_resumes_to_the_same_bits(whole, tmp_path, monkeypatch, capsys, key):
    cfg, workdir = whole
    spent = rows_of(workdir)[-1][{"train_tokens": "tokens"}.get(key, key)]
    same = dataclasses.replace(cfg, steps=1000, **{key: float(spent)})
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "stop_after", lambda self, n: n == 5)
        assert not train(same, tmp_path / "run")
    assert train(same, tmp_path / "run")
    assert_same_run(tmp_path / "run", workdir)
    assert "from step 0 to step 8" in capsys.readouterr().err
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["steps"] == 8 and written[key] == spent  # what it came to, for people and tools

    less = dataclasses.replace(same, **{key: 0.7 * spent})
    assert train(less, tmp_path / "run")
    said = capsys.readouterr().err
    assert "nothing to do" in said and f"{key} = {0.7 * spent:.15g} (steps = 6) asks for less" in said
    assert f"{key} = {2 * spent:.15g}, for instance, goes on" in said
    assert_same_run(tmp_path / "run", workdir)


def test_a_grown_run_counts_what_the_small_one_spent(whole, tmp_path, capsys):
    cfg, source = whole
    larger = dataclasses.replace(cfg.model, ffn_tokens=128)
    spent = rows_of(source)[-1]["train_flops"]
    each = cfg.batch_size * 16 * train_flops_per_token(larger)
    budget = dataclasses.replace(cfg, model=larger, train_flops=spent + 3.5 * each)
    steps = dataclasses.replace(cfg, model=larger, steps=12)
    for name, one in {"budget": budget, "steps": steps}.items():
        grow(source, one, tmp_path / name)
        train(one, tmp_path / name)
    assert_same_run(tmp_path / "budget", tmp_path / "steps")
    assert Checkpoints(tmp_path / "budget" / "checkpoints").steps[-1] == 12
    with pytest.raises(UserError, match=r"train_tokens = 1000 \(steps = 8\): the source was trained for 8 already"):
        grow(source, dataclasses.replace(cfg, model=larger, train_tokens=1000.0), tmp_path / "less")
    with pytest.raises(
        UserError, match=r"warmup_steps = 2: must be below the 1 steps from the source's 8 to train_tok"
    ):
        grow(source, dataclasses.replace(cfg, model=larger, train_tokens=1025.0), tmp_path / "less")


@pytest.mark.slow
def test_a_rung_that_begins_early_leaves_more_to_the_last(whole, tmp_path, monkeypatch):
    cfg, _ = whole
    patient = dataclasses.replace(cfg.grow, patience=1, min_improvement=100.0)  # nothing ever improves
    cfg = dataclasses.replace(cfg, grow=patient, eval_every=2, rungs=({"step": 6, "model": {"ffn_tokens": 128}},))
    cfg = dataclasses.replace(cfg, train_tokens=9.5 * TOKENS)
    train(cfg, tmp_path / "whole")
    rows = rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows if "growth" in row] == [4]
    assert rows[-1]["step"] == 10 and rows[-1]["tokens"] == 10 * TOKENS
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "stop_after", lambda self, n: n == 7)
        assert not train(cfg, tmp_path / "cut")
    assert train(cfg, tmp_path / "cut")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_batch_that_changes_on_the_way_is_counted_as_it_was(whole, tmp_path, monkeypatch):
    cfg, _ = whole
    cfg = dataclasses.replace(cfg, train_tokens=8.0 * TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "stop_after", lambda self, n: n == 4)
        assert not train(cfg, tmp_path / "run")
    train(dataclasses.replace(cfg, batch_size=16), tmp_path / "run")
    assert rows_of(tmp_path / "run")[-1]["step"] == 6


def test_configs_of_before_have_no_budget():
    tree = dataclasses.asdict(tiny_config())
    del tree["train_tokens"], tree["train_flops"]
    assert not read_config(tree).budget


def test_the_command_takes_a_budget_and_refuses_two_lengths(whole, tmp_path):
    config = write_config(tmp_path / "config.py", whole[0])
    call_well("train", config, "--config.train_tokens=1.024e3", f"--workdir={tmp_path}/w")
    assert Checkpoints(tmp_path / "w" / "checkpoints").steps[-1] == 8
    for flags, message in {
        ("--config.steps=9", "--config.train_tokens=1e4"): "--config.steps=9: config.train_tokens = 10000 says where",
        ("--config.train_flops=1e12", "--config.train_tokens=1e4"): "train_tokens = 10000 and train_flops = 1e+12",
        ("--config.train_tokens=-5",): "train_tokens = -5.0: must be 0 or above",
        ("--config.train_tokens=5",): "train_tokens = 5: is less than one step's 128 tokens",
        ("--config.train_tokens=many",): "config.train_tokens",
    }.items():
        assert message in complaint(call("train", config, *flags, f"--workdir={tmp_path}/n"))
        assert not (tmp_path / "n" / "checkpoints").exists() or not Checkpoints(tmp_path / "n" / "checkpoints").steps
