"""Laws of crashes: a run that is killed at any moment, and started again, ends as if it never had been."""

import json
import random
import time

import pytest

from tests.commands import start
from tests.helpers import assert_trees_equal, corpus_overrides, rows_of, tiny_config, write_config
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.metrics_file import read_metrics

STEPS, RUNG = 40, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config of two rungs, and a run of it that nobody killed."""
    folder = tmp_path_factory.mktemp("crashes")
    cfg = tiny_config(
        **corpus_overrides(folder),
        log_every=1,
        eval_every=5,
        checkpoint_every=3,
        steps=STEPS,
        grow__patience=9,  # never reached, but what counts towards it must come out the same
        rungs=(
            {"step": RUNG, "model": {"ffn_tokens": 128, "out_tokens": 48}},
            {"step": RUNG + 9, "model": {"ffn_tokens": 144}, "grow": {"train": "new"}},
        ),
    )
    write_config(folder / "config.py", cfg)
    began = time.monotonic()
    process = begin(folder, "whole")
    process.join(300)
    assert process.exitcode == 0, (folder / "stderr").read_text()
    (folder / "seconds").write_text(str(time.monotonic() - began))
    return folder


def begin(folder, name):
    return start(str(folder), "train", f"--config={folder}/config.py", f"--workdir={folder}/{name}")


def after(seconds):
    """A moment so long after the start."""
    return lambda workdir, began, before: time.monotonic() - began > seconds


def appears(pattern):
    """The moment at which a path is made: of a save as it begins (*tmp*), or is given its name."""
    return lambda workdir, began, before: any(str(path) not in before for path in workdir.glob(pattern))


def reached(step, seconds=0.0):
    """The moment at which a step is reported, or shortly after it: an evaluation, a save or a growth is on."""
    seen = []

    def is_now(workdir, began, before):
        path = workdir / "metrics.jsonl"
        if not seen and path.exists() and any(row["step"] >= step for row in read_metrics(workdir)):
            seen.append(time.monotonic())
        return seen and time.monotonic() - seen[0] >= seconds

    return is_now


def run_killed(folder, name, moments):
    """Starts a run again and again and kills it at those moments, then lets it end. Returns how many struck."""
    kills, workdir = 0, folder / name
    for moment in moments:
        before, began = {str(path) for path in workdir.glob("checkpoints/*")}, time.monotonic()
        process = begin(folder, name)
        while process.exitcode is None and not moment(workdir, began, before):
            time.sleep(0.002)
        kills += process.exitcode is None
        process.kill()
        process.join()
    process = begin(folder, name)
    process.join(300)
    assert process.exitcode == 0, (folder / "stderr").read_text()
    return kills


def figures(workdir):
    rows = rows_of(workdir)
    for row in rows:
        if "growth" in row:
            row["growth"] = {k: v for k, v in row["growth"].items() if "seconds" not in k}
    return rows


def assert_same_run(folder, name):
    assert figures(folder / name) == figures(folder / "whole")
    theirs, ours = (Checkpoints(folder / run / "checkpoints")._saved(STEPS) for run in ("whole", name))
    assert theirs == ours  # the fingerprints of every array: parameters, moments, counts
    records = [Checkpoints(folder / run / "checkpoints").record(STEPS) for run in ("whole", name)]
    assert_trees_equal(records[0].plateau, records[1].plateau)


def test_a_run_killed_in_a_save_and_on_a_rung_ends_the_same(folder):
    moments = [appears("checkpoints/*tmp*"), reached(RUNG), appears("checkpoints/3*")]
    assert run_killed(folder, "few", moments) == 3
    assert_same_run(folder, "few")


@pytest.mark.slow
def test_thirty_kills_at_chosen_and_random_moments(folder, capsys):
    """Ends with a line of figures, for docs/reliability.md."""
    whole = float((folder / "seconds").read_text())
    chance = random.Random(0)
    runs, kills = 0, 0
    while kills < 30:
        moments = [
            after(chance.uniform(0.2, 0.7) * whole),
            appears("checkpoints/*tmp*"),
            reached(chance.choice((5, 10, 15)), chance.uniform(0, 0.1)),
            appears("checkpoints/1[0-9]"),
            reached(RUNG, chance.uniform(0, 1.5)),
            after(chance.uniform(0.3, 0.9) * whole),
            reached(chance.randrange(RUNG + 1, STEPS), chance.uniform(0, 0.05)),
            appears("checkpoints/*tmp*"),
        ]
        kills += run_killed(folder, f"run{runs}", moments)
        assert_same_run(folder, f"run{runs}")
        runs += 1
    with capsys.disabled():
        print("\n" + json.dumps({"kills": kills, "runs": runs, "runs_equal_to_the_unkilled": runs}))
