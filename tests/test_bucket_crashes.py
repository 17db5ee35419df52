"""Laws of crashes of runs in a bucket: kills at any moment, and outages of the bucket."""

import json
import os
import random
import re
import signal
import time

import pytest

from tests.commands import start
from tests.gcs_emulator import emulated
from tests.helpers import corpus_overrides, rows_of, tiny_config, write_config
from tests.test_processes import finish, start_pod
from tokenformer_jax.files import run_path
from tokenformer_jax.storage.checkpoints import Checkpoints, describe

pytestmark = pytest.mark.slow

STEPS, RUNG = 40, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config of two rungs, and a run of it in a folder, that nobody killed."""
    folder = tmp_path_factory.mktemp("bucket_crashes")
    cfg = tiny_config(
        **corpus_overrides(folder),
        log_every=1,
        eval_every=5,
        checkpoint_every=3,
        steps=STEPS,
        rungs=({"step": RUNG, "model": {"ffn_tokens": 128, "out_tokens": 48}},),
    )
    write_config(folder / "config.py", cfg)
    process = start(str(folder), "train", f"--config={folder}/config.py", f"--workdir={folder}/whole")
    process.join(300)
    assert process.exitcode == 0, (folder / "stderr").read_text()
    return folder


@pytest.fixture(scope="module")
def bucket():
    with emulated("runs") as emulator:
        yield emulator


def begin(folder, bucket, name, **environment):
    args = f"--config={folder}/config.py", f"--workdir=gs://runs/{name}"
    return start(str(folder), "train", *args, **bucket.environment, **environment)


def end(folder, process):
    process.join(400)
    assert process.exitcode == 0, (folder / "stderr").read_text()


def appears(bucket, process, pattern, before=()):
    """Waits until there is an object of such a name that was not there before; whether the process still runs then."""
    while process.exitcode is None:
        if any(re.search(pattern, found) for found in set(bucket.names("runs")) - set(before)):
            return True
        time.sleep(0.002)
    return False


def assert_same_run(folder, name):
    ours, theirs = run_path(f"gs://runs/{name}", ""), folder / "whole"
    assert figures(ours) == figures(theirs)
    assert Checkpoints(ours / "checkpoints")._saved(STEPS) == Checkpoints(theirs / "checkpoints")._saved(STEPS)


def figures(workdir):
    rows = rows_of(workdir)
    for row in rows:
        if "growth" in row:
            row["growth"] = {k: v for k, v in row["growth"].items() if "seconds" not in k}
    return rows


def test_ten_kills_of_a_run_in_a_bucket(folder, bucket, capsys):
    """Ends with a line of figures, for docs/reliability.md."""
    chance, kills, runs = random.Random(0), 0, 0
    while kills < 10:
        name = f"killed{runs}"
        for pattern, seconds in (
            (r"config\.json", chance.uniform(0, 2)),
            (r"checkpoints/\d+/state/", 0.0),
            (r"checkpoints/\d+/commit_success", 0.0),
            (rf"checkpoints/{RUNG}/", chance.uniform(0, 1.5)),
            (r"checkpoints/(2[1-9]|3\d)/record/", chance.uniform(0, 0.05)),
        ):
            before = bucket.names("runs") if "config" not in pattern else ()
            process = begin(folder, bucket, name)
            if appears(bucket, process, f"{name}/{pattern}", before):
                time.sleep(seconds)
            kills += process.exitcode is None
            process.kill()
            process.join()
        end(folder, begin(folder, bucket, name))
        assert_same_run(folder, name)
        runs += 1
    with capsys.disabled():
        print("\n" + json.dumps({"kills": kills, "runs": runs, "runs_equal_to_the_unkilled": runs}))


@pytest.mark.parametrize("pattern", [r"checkpoints/9/state/", r"checkpoints/12/commit_success"])
def test_an_outage_of_30_seconds_is_survived(folder, bucket, pattern):
    """It begins in a save, and after one."""
    name = f"outage{len(pattern)}"
    process = begin(folder, bucket, name)
    assert appears(bucket, process, f"{name}/{pattern}")
    bucket.stop()
    time.sleep(30)
    assert process.exitcode is None, (folder / "stderr").read_text()
    bucket.start()
    end(folder, process)
    assert_same_run(folder, name)


@pytest.mark.parametrize("pattern", [r"checkpoints/9/state/", r"checkpoints/12/commit_success"])
def test_an_outage_that_lasts_ends_in_one_line(folder, bucket, pattern, capsys):
    """Of so many seconds as PATIENCE says, 20 if it does not."""
    name, patience = f"lasting{len(pattern)}", os.environ.get("PATIENCE", "20")
    process = begin(folder, bucket, name, TOKENFORMER_BUCKET_PATIENCE=patience)
    assert appears(bucket, process, f"{name}/{pattern}")
    bucket.stop()
    began = time.monotonic()
    process.join(600)
    seconds = time.monotonic() - began
    bucket.start()
    said = (folder / "stderr").read_text()
    assert process.exitcode == 2 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"error: gs://runs/{name}") and said.count("error:") == 1
    checkpoints = Checkpoints(run_path(f"gs://runs/{name}", "") / "checkpoints")
    assert checkpoints.steps[-1] >= 6 and describe(checkpoints, checkpoints.steps[-1])[1] == {}
    end(folder, begin(folder, bucket, name))
    assert_same_run(folder, name)
    with capsys.disabled():
        print("\n" + json.dumps({"patience": float(patience), "seconds": round(seconds), "line": last}))


def test_two_processes_of_a_run_are_one_writer(folder, bucket, tmp_path):
    """They prepare into the bucket, train there and are killed; those of another run would be refused."""
    flags = [f"--config={folder}/config.py", "--workdir=gs://runs/two", "--config.data.cache_dir=gs://runs/two_cache"]
    flags += ["--config.mesh.data=2"]
    for step in (12, None):
        log = tmp_path / "log"
        processes = start_pod(2, log, "train", *flags)
        if step:
            while f"two/checkpoints/{step}/commit_success.txt" not in bucket.names("runs"):
                assert processes.poll() is None, log.read_text()
                time.sleep(0.05)
            os.killpg(processes.pid, signal.SIGKILL)
            processes.wait()
        else:
            assert finish(processes) == 0, log.read_text()
    rows, others = (figures(place) for place in (run_path("gs://runs/two", ""), folder / "whole"))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        if "loss" in row:
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
