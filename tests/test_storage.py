"""Laws of the workdir: in use, full, not writable or gone, or with metrics that a crash left damaged."""

import errno
import re
import shutil
import time

import pytest

from tests.commands import call, call_well, complaint
from tests.helpers import corpus_overrides, rows_of, tiny_config, write_config
from tokenformer_jax.errors import UserError
from tokenformer_jax.running.loop import train
from tokenformer_jax.running.run import open_run
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.metrics_file import MetricsWriter
from tokenformer_jax.storage.workdir import only_writer


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storage")
    every = {"log_every": 1, "eval_every": 3, "checkpoint_every": 2, "steps": 6}
    return tiny_config(**corpus_overrides(folder), **every)


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(cfg, workdir)
    return workdir


@pytest.fixture(scope="module")
def flag(cfg, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "config.py", cfg)


def test_a_workdir_in_use_is_refused_and_its_user_named(cfg, flag, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"]
    before = [path.read_bytes() for path in files]
    with only_writer(tmp_path / "run"):
        line = complaint(call("train", flag, f"--workdir={tmp_path}/run"))
        assert "run: is written by process " in line
        assert [path.read_bytes() for path in files] == before
    call_well("train", flag, f"--workdir={tmp_path}/run")


def test_two_growths_to_one_workdir_do_not_touch_each_other(flag, whole, tmp_path):
    args = f"--source={whole}", flag, "--config.model.ffn_tokens=128", "--config.steps=9", f"--workdir={tmp_path}/grown"
    with only_writer(tmp_path / ".grown.partial"):
        (tmp_path / ".grown.partial" / "half").touch()
        assert "is written by process" in complaint(call("grow", *args))
        assert (tmp_path / ".grown.partial" / "half").exists() and not (tmp_path / "grown").exists()
    call_well("grow", *args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown"]


@pytest.mark.parametrize("limit", [1_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_quota_ends_training_in_one_line_and_loses_nothing_that_was_saved(cfg, flag, whole, tmp_path, limit):
    """Files may not grow beyond some bytes: it strikes the config, the record or the arrays."""
    shutil.copytree(whole, tmp_path / "run")
    args = flag, "--config.steps=8", "--config.optimizer.warmup_steps=2", f"--workdir={tmp_path}/run"
    result = call("train", *args, file_limit=limit)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.match(r"error: .* cannot be written \(.*File too large", result.stderr.splitlines()[-1])
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps[-1] == 6
    call_well("train", *args)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps[-1] == 8


def test_a_full_disk_is_told_of_metrics_too(tmp_path):
    writer = MetricsWriter(tiny_config(), tmp_path, 0, 1)
    writer.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        writer.write({"step": 1, "params": 1, "loss": 1.0})


def test_a_workdir_that_vanishes_ends_the_run(cfg, tmp_path, monkeypatch):
    def vanish(self, n):
        if n == 3:
            while not Checkpoints(tmp_path / "run" / "checkpoints").steps:  # else Orbax may be about to make the folder
                time.sleep(0.01)
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return False

    monkeypatch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", vanish)
    with pytest.raises(UserError, match=r"run/checkpoints: (is gone|a checkpoint cannot be written)"):
        train(cfg, tmp_path / "run")
    left = tmp_path / "run" / "checkpoints"  # Orbax may begin to make it
    assert not left.exists() or not Checkpoints(left).steps


@pytest.mark.parametrize("folder", ["/proc/nothing/here", "/dev/null/run"])
def test_a_workdir_that_cannot_be_written_is_named(flag, whole, folder):
    assert f"{folder}: cannot be written" in complaint(call("train", flag, f"--workdir={folder}"))
    grown = "--config.model.ffn_tokens=128", "--config.steps=9"
    line = complaint(call("grow", f"--source={whole}", flag, *grown, f"--workdir={folder}"))
    assert "cannot be written" in line and folder.rsplit("/", 1)[0] in line


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with only_writer(tmp_path / "run"):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_clock_that_jumps_changes_nothing(cfg, whole, tmp_path, monkeypatch):
    """By days, between two saves: within one, Orbax would take a jump ahead for a save that hangs, and end the run."""
    real, offset = time.time, [0.0]

    def jump(self, n):
        run[0].checkpoints.wait()
        offset[0] += {3: 3e5, 5: -9e5}.get(n, 0.0)
        return False

    run = []
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: real() + offset[0])
        patch.setattr("tokenformer_jax.running.loop.open_run", lambda *args: run.append(open_run(*args)) or run[0])
        patch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", jump)
        train(cfg, tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(whole)


@pytest.mark.parametrize("tail", [b'{"step": 5, "los', b"\xff\x00\xfe\n\n", b'5\n[]\n{}\n{"step": "6"}\n', b"[" * 9999])
def test_metrics_with_a_damaged_tail_are_read_up_to_it(cfg, whole, tmp_path, tail):
    shutil.copytree(whole, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    train(cfg, tmp_path / "run")
    assert rows_of(tmp_path / "run") == rows_of(whole)
