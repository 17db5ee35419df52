"""Laws of several processes: they compute what one does, and a run that was killed ends as if it had not been.

They are started as users start them on one machine, by launch/local_pod.sh.
"""

import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.helpers import assert_trees_equal, tiny_config, write_corpus
from tokenformer_jax.evaluate import load_trained
from tokenformer_jax.metrics import read_metrics
from tokenformer_jax.train import train

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = """
from tests.helpers import tiny_tree

def get_config():
    return tiny_tree(**{overrides!r})
"""
LADDER = {
    "rungs": (
        {"step": 6, "model": {"qkv_tokens": 32, "ffn_tokens": 128}, "mesh": {"fsdp": 1, "data": 2}},
        {"step": 12, "model": {"ffn_tokens": 192}, "batch_size": 16, "mesh": {"fsdp": 2, "data": 1}},
    ),
    "steps": 18,
    "checkpoint_every": 4,
    "eval_every": 6,
    "log_every": 1,
    "mesh__fsdp": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config, and the workdir `whole` of its run from end to end by two processes of one device each."""
    folder = tmp_path_factory.mktemp("processes")
    data = {"data__dataset": "text_files", "data__path": str(write_corpus(folder / "text"))}
    overrides = LADDER | data | {"data__cache_dir": str(folder / "cache")}
    (folder / "config.py").write_text(CONFIG.format(overrides=overrides))
    assert finish(start(folder, "whole")) == 0
    return folder, tiny_config(**overrides)


def start(folder, name):
    """Two processes that train the ladder in a workdir."""
    command = ["bash", "launch/local_pod.sh", "2", "python", "-m", "tokenformer_jax.train"]
    command += [f"--config={folder}/config.py", f"--workdir={folder}/{name}"]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    log = (folder / f"{name}.log").open("a")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, stdout=log, start_new_session=True)


def finish(processes, seconds=400):
    try:
        return processes.wait(seconds)
    finally:
        if processes.poll() is None:
            os.killpg(processes.pid, signal.SIGKILL)


def wait_for(processes, workdir, step):
    """Returns once the run has reported the step."""
    for _ in range(4000):
        rows = read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
        if any(row["step"] >= step and "loss" in row for row in rows):
            return
        assert processes.poll() is None
        time.sleep(0.1)
    raise AssertionError(f"no step {step}")


def rows_of(workdir):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(workdir)]


def test_two_processes_compute_what_one_does(folder):
    folder, cfg = folder
    train(cfg, folder / "one")
    theirs, ours = rows_of(folder / "whole"), rows_of(folder / "one")
    assert [sorted(row) for row in theirs] == [sorted(row) for row in ours]
    tolerances = {"loss": 1e-5, "eval_loss": 1e-5, "grad_norm": 1e-3, "tokens": 0, "train_flops": 0}
    for name, tolerance in tolerances.items():
        pair = ([row[name] for row in rows if name in row] for rows in (theirs, ours))
        np.testing.assert_allclose(*pair, rtol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(5, 7), (11, 13)], ids=str)
def test_two_processes_killed_on_both_sides_of_a_rung_end_the_same(folder, steps):
    folder, _ = folder
    name = f"killed{steps[0]}"
    for step in steps:
        processes = start(folder, name)
        wait_for(processes, folder / name, step)
        os.killpg(processes.pid, signal.SIGKILL)
        processes.wait()
    assert finish(start(folder, name)) == 0
    assert rows_of(folder / name) == rows_of(folder / "whole")
    assert_trees_equal(*(load_trained(folder / run).state for run in (name, "whole")))


@pytest.mark.slow
def test_a_signal_to_two_processes_saves_one_step_and_the_run_goes_on(folder):
    folder, _ = folder
    processes = start(folder, "stopped")
    wait_for(processes, folder / "stopped", 7)
    processes.terminate()
    assert finish(processes) == 0
    assert finish(start(folder, "stopped")) == 0
    assert rows_of(folder / "stopped") == rows_of(folder / "whole")
