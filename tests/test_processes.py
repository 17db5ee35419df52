"""Laws of several processes: they compute what one does, and end together when one dies; a run that was killed ends as
if it had not been.

They are started as users start them on one machine, by launch/local_pod.sh.
"""

import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from tests.helpers import assert_trees_equal, corpus_overrides, rows_of, tiny_config
from tokenformer_jax.cli import STOPPED
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.metrics_file import read_metrics
from tokenformer_jax.storage.trained import load_trained

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = """
from tests.helpers import tiny_tree

def get_config():
    return tiny_tree(**{overrides!r})
"""
LADDER = {
    "rungs": (
        {"step": 6, "model": {"qkv_tokens": 32, "ffn_tokens": 128}, "mesh": {"fsdp": 1, "data": 2}},
        {"step": 12, "model": {"ffn_tokens": 192}, "batch_size": 16, "mesh": {"tensor": 2, "data": 1}},
    ),
    "steps": 18,
    "checkpoint_every": 4,
    "eval_every": 6,
    "log_every": 1,
    "mesh__fsdp": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config, and the workdir `whole` of its run from end to end by two processes of one device each.

    On the last rung the two share `tensor`, and so read the same rows.
    """
    folder = tmp_path_factory.mktemp("processes")
    overrides = LADDER | corpus_overrides(folder)
    (folder / "config.py").write_text(CONFIG.format(overrides=overrides))
    assert finish(start(folder, "whole")) == 0
    return folder, tiny_config(**overrides)


def start(folder, name, *overrides):
    """Two processes that train the ladder in a workdir."""
    return start_pod(2, folder / f"{name}.log", "train", *training(folder, name), *overrides)


def training(folder, name):
    return f"--config={folder}/config.py", f"--workdir={folder}/{name}"


def start_pod(count, log, module, *flags):
    """Processes of one device each."""
    return popen(log, 1, "bash", "launch/local_pod.sh", str(count), "python", "-m", f"tokenformer_jax.{module}", *flags)


def popen(log, devices, *command):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    with log.open("a") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=out, stdout=out, start_new_session=True)


def worker(processes, index):
    """The process of this number among those of a pod."""
    for child in pathlib.Path(f"/proc/{processes.pid}/task/{processes.pid}/children").read_text().split():
        if f"JAX_PROCESS_ID={index}".encode() in pathlib.Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process {index}")


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


def test_two_processes_compute_what_one_does(folder):
    folder, cfg = folder
    train(cfg, folder / "one")
    theirs, ours = rows_of(folder / "whole"), rows_of(folder / "one")
    assert [sorted(row) for row in theirs] == [sorted(row) for row in ours]
    tolerances = {"loss": 1e-5, "eval_loss": 1e-5, "grad_norm": 1e-3, "tokens": 0, "train_flops": 0}
    for name, tolerance in tolerances.items():
        pair = ([row[name] for row in rows if name in row] for rows in (theirs, ours))
        np.testing.assert_allclose(*pair, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_when_a_process_dies_the_other_says_which_and_ends_within_30_seconds(folder, index):
    folder, _ = folder
    pod = start(folder, f"death{index}", "--config.steps=100000")
    wait_for(pod, folder / f"death{index}", 1)
    os.kill(worker(pod, index), signal.SIGKILL)
    died = time.monotonic()
    code = finish(pod, 100)
    seconds, log = time.monotonic() - died, (folder / f"death{index}.log").read_text()
    print(f"ended {seconds:.1f} s after the death of process {index}")
    assert seconds < 30
    assert code not in (0, 2)
    assert f"\nerror: process {index} of 2 (host {socket.gethostname()}) died or lost its network: " in log
    assert "Traceback" not in log


def test_when_a_process_fails_the_others_say_which_and_why(tmp_path):
    command = "import os, time; from tokenformer_jax.cli import run_command; "
    command += "run_command(lambda: 1 / int(os.environ['JAX_PROCESS_ID']) and time.sleep(100))"
    pod = popen(tmp_path / "log", 1, "bash", "launch/local_pod.sh", "2", "python", "-c", command)
    assert finish(pod, 60) == 1
    log = (tmp_path / "log").read_text()
    reason = "failed (ZeroDivisionError: division by zero): the others stop"
    assert f"\nerror: process 0 of 2 (host {socket.gethostname()}) {reason}\n" in log
    assert log.count("Traceback") == 1


def test_processes_that_wait_for_one_that_died_before_it_joined_are_ended(tmp_path):
    command = "import os, time; from tokenformer_jax.cli import run_command; "
    command += "os.environ['JAX_PROCESS_ID'] == '1' and os._exit(3); run_command(lambda: None)"
    launcher = ["env", "POD_GRACE=2", "bash", "launch/local_pod.sh", "3", "python", "-c", command]
    assert finish(popen(tmp_path / "log", 1, *launcher), 60) == 3
    assert "local_pod: another process failed 2 seconds ago; ending the rest" in (tmp_path / "log").read_text()


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
def test_kills_of_one_or_both_of_two_processes_at_chosen_and_random_moments(folder, capsys):
    """Ends with a line of figures, for docs/reliability.md."""
    folder, _ = folder
    chance, kills = random.Random(0), 0
    for run in range(2):
        name = f"kills{run}"
        for step in (3, 6, 10, 12, 15):  # at 6 and 12 the model grows, at 4, 8 and 16 it saves
            log = folder / f"{name}.log"
            said = log.stat().st_size if log.exists() else 0
            processes = start(folder, name)
            while "training tokens, from step" not in log.read_text()[said:]:  # until they have found each other
                assert processes.poll() is None
                time.sleep(0.05)
            wait_for(processes, folder / name, step)
            time.sleep(chance.uniform(0, 1))
            victims = chance.choice(("both", 0, 1))
            if victims == "both":
                os.killpg(processes.pid, signal.SIGKILL)
            else:
                os.kill(worker(processes, victims), signal.SIGKILL)
            assert finish(processes, 60) != 0
            kills += 1
        assert finish(start(folder, name)) == 0
        assert rows_of(folder / name) == rows_of(folder / "whole")
        theirs, ours = (Checkpoints(folder / run / "checkpoints")._saved(18) for run in ("whole", name))
        assert theirs == ours  # the fingerprints of every array
    with capsys.disabled():
        print("\n" + json.dumps({"processes": 2, "kills": kills, "runs": 2, "runs_equal_to_the_unkilled": 2}))


@pytest.mark.slow
def test_a_signal_to_two_processes_saves_one_step_and_the_run_goes_on(folder):
    folder, _ = folder
    processes = start(folder, "stopped")
    wait_for(processes, folder / "stopped", 7)
    processes.terminate()
    assert finish(processes) == STOPPED
    assert finish(start(folder, "stopped")) == 0
    assert rows_of(folder / "stopped") == rows_of(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_to_one_process_saves_one_step_on_both(folder, index):
    folder, _ = folder
    name = f"preempted{index}"
    processes = start(folder, name)
    wait_for(processes, folder / name, 7)
    os.kill(worker(processes, index), signal.SIGTERM)
    assert finish(processes) == STOPPED  # as both have
    log = (folder / f"{name}.log").read_text()
    step = int(re.search(r"stopped and saved at step (\d+)", log)[1])
    assert 7 <= step < 18
    assert not Checkpoints(folder / name / "checkpoints").faults(step)
    assert finish(start(folder, name)) == 0
    assert rows_of(folder / name) == rows_of(folder / "whole")


@pytest.mark.slow
def test_the_end_of_max_minutes_saves_one_step_on_both(folder):
    folder, _ = folder
    assert finish(start(folder, "late", "--config.max_minutes=0.0001")) == STOPPED
    log = (folder / "late.log").read_text()
    step = int(re.search(r"stopped after max_minutes = 0.0001 and saved at step (\d+)", log)[1])
    assert 1 <= step < 18
    assert finish(start(folder, "late")) == 0
    assert rows_of(folder / "late") == rows_of(folder / "whole")


@pytest.mark.slow
def test_four_processes_train_evaluate_and_grow_as_one_does(folder, tmp_path):
    """They form fsdp 2 x tensor 2, one device each; the one has four."""
    folder, _ = folder
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.rungs=()", "--config.steps=6")
    config = f"--config={folder}/config.py"
    larger = ("--config.model.qkv_tokens=32", "--config.model.ffn_tokens=128", "--config.steps=10")
    for name, count in (("four", 4), ("one", 1)):
        home = tmp_path / name
        home.mkdir()

        def run(module, *flags, home=home, count=count):
            alone = ("python", "-m", f"tokenformer_jax.{module}", *flags)
            pod = start_pod(4, home / "log", module, *flags) if count == 4 else popen(home / "log", 4, *alone)
            assert finish(pod) == 0, (home / "log").read_text()

        run("train", config, f"--workdir={home}/small", *mesh)
        run("evaluate", f"--workdir={home}/small")
        run("grow", f"--source={home}/small", config, f"--workdir={home}/large", *mesh, *larger)
        run("evaluate", f"--workdir={home}/large")
    four, one = tmp_path / "four", tmp_path / "one"
    for name in ("loss", "eval_loss"):
        pair = ([row[name] for row in rows_of(home / "small") if name in row] for home in (four, one))
        np.testing.assert_allclose(*pair, rtol=1e-5)
    for size in ("small", "large"):
        evaluations = [json.loads((home / size / "eval.json").read_text()) for home in (four, one)]
        for name in ("step", "params", "trained_tokens", "tokens", "loss"):
            assert evaluations[0][name] == pytest.approx(evaluations[1][name], rel=1e-5)
        states = [load_trained(home / size).state for home in (four, one)]
        assert_trees_equal(*(state.params for state in states), atol=1e-4)


@pytest.mark.slow
def test_two_processes_take_and_give_published_models_as_one_does(folder, tmp_path):
    folder, _ = folder
    log = tmp_path / "log"

    def convert(count, *flags):
        assert finish(start_pod(count, log, "convert", *flags)) == 0, log.read_text()

    for count in (2, 1):
        home = tmp_path / str(count)
        convert(count, f"--to_hub_format={home}/out", f"--workdir={folder}/whole")
        convert(count, f"--to_torch={home}/model.npz", f"--workdir={folder}/whole")
        mesh = [f"--config.mesh.{name}=1" for name in ("fsdp", "data", "tensor") if count == 1]
        sizes = ("--config.rungs=()", "--config.model.qkv_tokens=32", "--config.model.ffn_tokens=192")
        config = (f"--config={folder}/config.py", *sizes, *mesh)
        convert(count, f"--from_hub={tmp_path}/2/out", f"--workdir={home}/W", *config)
    names = [path.name for path in (tmp_path / "1" / "out").iterdir()]
    assert len(names) == 7
    for name in ("model.npz", *(f"out/{name}" for name in names)):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    two, one, whole = (load_trained(path).state for path in (tmp_path / "2/W", tmp_path / "1/W", folder / "whole"))
    assert_trees_equal((two.params, two.tau_now()), (one.params, one.tau_now()))
    assert_trees_equal((two.params, two.tau_now()), (whole.params, whole.tau_now()))
