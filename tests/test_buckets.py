"""Laws of runs in a bucket, which an emulator stands in for: they are what they would be in a folder."""

import contextlib
import dataclasses
import json
import os
import re
import threading
import time

import numpy as np
import pytest

from tests.gcs_emulator import emulated
from tests.helpers import assert_trees_equal, corpus_overrides, rows_of, tiny_config
from tokenformer_jax import buckets
from tokenformer_jax.api import TokenFormer
from tokenformer_jax.buckets import Unreachable, copy_folder, patiently
from tokenformer_jax.data.batches import train_batches
from tokenformer_jax.data.mixture import prepare
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.report import named_runs, summarise
from tokenformer_jax.files import replace_file, run_path, write_with
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.shrink import shrink
from tokenformer_jax.running.branch import branch
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints, describe
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.storage.workdir import LOCK, load_config, new_workdir, only_writer, require_empty

pytestmark = pytest.mark.usefixtures("steps_are_shared")


@pytest.fixture(scope="module")
def bucket():
    with emulated("runs") as emulator:
        yield emulator


@pytest.fixture(scope="module")
def cfg(bucket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    return tiny_config(**corpus_overrides(folder), log_every=1, eval_every=3, checkpoint_every=2, steps=6)


@pytest.fixture(scope="module")
def local(cfg, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("local") / "run"
    train(cfg, workdir)
    return workdir


@pytest.fixture(scope="module")
def remote(cfg):
    workdir = run_path("gs://runs/some/run", "--workdir")
    train(cfg, workdir)
    return workdir


@pytest.fixture
def short_lease(monkeypatch):
    monkeypatch.setattr(buckets, "LEASE", 1.5)


def saved(workdir):
    """Fingerprints of all arrays of each checkpoint."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    return {step: checkpoints._saved(step) for step in checkpoints.steps}


def larger(cfg):
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, ffn_tokens=128), steps=9)


def test_a_run_in_a_bucket_is_that_of_a_folder_bit_for_bit(bucket, cfg, local, remote):
    assert rows_of(remote) == rows_of(local) and saved(remote) == saved(local) != {}
    files = {path.relative_to(local).parts[0] for path in local.rglob("*")}
    inside = {name.split("/")[2] for name in bucket.names("runs") if name.startswith("some/run/")}
    assert inside == files - {LOCK}  # which ended with the run
    assert load_config(remote / "config.json") == load_config(local / "config.json")
    assert_trees_equal(load_trained(remote).state.params, load_trained(local).state.params)
    events = [name for name in bucket.names("runs") if name.startswith("some/run/tensorboard/events.")]
    assert len(events) == 1 and len(bucket.content("runs", events[0])) > 1000


def test_commands_read_a_bucket(remote, local):
    ours, theirs = (describe(Checkpoints(run / "checkpoints"), 6) for run in (remote, local))
    assert "good" in ours[0] and ours[1] == theirs[1] == {}
    assert summarise("run", named_runs(["x=gs://runs/some/run"])["x"]) == summarise("run", local)
    model = TokenFormer.load("gs://runs/some/run/")
    assert_trees_equal(model.params, TokenFormer.load(local).params)


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(step, monkeypatch, workdir):
    """As a kill is seen from the bucket: nothing is written after it, not even that the lease is given up."""

    def kill(self, n):
        if n == step:
            raise Killed
        return False

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", kill)
        patch.setattr("tokenformer_jax.storage.metrics_file.MetricsWriter.close", lambda self: None)
        patch.setattr("tokenformer_jax.buckets.Lease.close", lambda self: self.stopped.set())
        yield


@pytest.mark.slow
def test_a_killed_run_waits_for_its_former_lease_and_ends_the_same(cfg, local, monkeypatch, short_lease, capsys):
    workdir = run_path("gs://runs/killed", "--workdir")
    with killed_at(5, monkeypatch, workdir):
        train(cfg, workdir)
    assert (workdir / LOCK).exists()
    train(cfg, workdir)
    assert f"gs://runs/killed: was last written by process {os.getpid()} on " in capsys.readouterr().err
    assert rows_of(workdir) == rows_of(local) and saved(workdir) == saved(local)
    assert not (workdir / LOCK).exists()


@pytest.mark.slow
def test_growing_from_and_to_buckets_is_growing_in_folders(cfg, local, remote, tmp_path):
    grown = larger(cfg)
    grow(local, grown, tmp_path / "local")
    for name, source, target in (
        ("both", remote, run_path("gs://runs/grown", "--workdir")),
        ("out", remote, tmp_path / "out"),
        ("in", local, run_path("gs://runs/in", "--workdir")),
    ):
        grow(source, grown, target)
        assert saved(target) == saved(tmp_path / "local"), name
        assert json.loads((target / "grow.json").read_text())["source"] == str(source)
        with pytest.raises(UserError, match="holds a model of"):
            grow(source, grown, target)
    train(grown, tmp_path / "local")
    train(grown, run_path("gs://runs/grown", "--workdir"))
    assert saved(tmp_path / "local") == saved(run_path("gs://runs/grown", "--workdir"))
    shrink(run_path("gs://runs/grown", "--workdir"), dataclasses.replace(cfg, steps=12), tmp_path / "shrunk")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bucket", "folder"])
def test_a_branch_leaves_a_run_in_a_bucket(cfg, remote, tmp_path, kind):
    constant = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, schedule="constant"))
    source = run_path("gs://runs/constant", "--source")
    if not (source / "config.json").exists():
        train(constant, source)
    target = run_path("gs://runs/branch", "--workdir") if kind == "bucket" else tmp_path / "branch"
    train(branch(source, 4, target, 0.5), target)
    assert Checkpoints(target / "checkpoints").steps[-1] == load_config(target / "config.json").steps
    assert branch(source, 4, target, 0.5) == load_config(target / "config.json")


def test_a_second_writer_is_refused_and_the_first_goes_on(bucket, short_lease):
    folder = run_path("gs://runs/held", "--workdir")
    with only_writer(folder):
        time.sleep(buckets.LEASE * 1.5)  # it is renewed
        with (
            pytest.raises(UserError, match=r"^gs://runs/held: is written by process \d+ on .*; let it end"),
            only_writer(folder),
        ):
            raise AssertionError
    with only_writer(folder):  # at once, since it was given up
        pass


def test_whoever_lost_the_lease_writes_nothing_more(cfg, short_lease, monkeypatch):
    folder = run_path("gs://runs/lost", "--workdir")

    def lose(self, n):
        if n == 3:
            replace_file(folder / LOCK, "process 1 on elsewhere token")
        return False

    monkeypatch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", lose)
    with pytest.raises(UserError, match="gs://runs/lost: is written by process 1 on elsewhere now"):
        train(cfg, folder)
    assert Checkpoints(folder / "checkpoints").steps == [2]
    assert (folder / LOCK).read_text().startswith("process 1")  # it is not ours to delete


def test_a_workdir_that_was_not_made_whole_is_no_run_and_is_made_anew(cfg, local):
    folder = run_path("gs://runs/half", "--workdir")
    with pytest.raises(ZeroDivisionError), new_workdir(folder) as inside:
        replace_file(inside / "config.json", cfg.to_json())
        replace_file(inside / "checkpoints" / "6" / "x", "")
        raise ZeroDivisionError
    for read in (lambda: load_trained(folder), lambda: train(cfg, folder)):
        with pytest.raises(UserError, match=r"^gs://runs/half: is not whole"):
            read()
    require_empty(folder, "holds something")
    with new_workdir(folder) as inside:
        assert sorted(path.name for path in inside.iterdir()) == [LOCK, ".partial"]
        copy_folder(local, inside)
    assert load_trained(folder).step_number == 6
    with pytest.raises(UserError, match="holds something"):
        require_empty(folder, "holds something")


@pytest.mark.slow
def test_what_is_damaged_is_set_aside(bucket, cfg, local, remote, capsys):
    folder = run_path("gs://runs/damaged", "--workdir")
    copy_folder(remote, folder)
    name = max(bucket.names("runs"), key=lambda name: (name.startswith("damaged/checkpoints/6/state/d/"), name))
    content = bytearray(bucket.content("runs", name))
    content[len(content) // 2] ^= 1
    (run_path(f"gs://runs/{name}", "")).write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged"):
        load_trained(folder, 6)
    train(cfg, folder)
    assert (
        "the damaged checkpoint of step 6 was moved to gs://runs/damaged/damaged_checkpoints/6_"
        in capsys.readouterr().err
    )
    assert saved(folder) == saved(local)


@pytest.mark.slow
def test_a_run_that_was_copied_goes_on(cfg, local, remote, tmp_path):
    copy_folder(remote, tmp_path / "here")
    train(dataclasses.replace(cfg, steps=8), tmp_path / "here")
    there = run_path("gs://runs/there", "--workdir")
    copy_folder(local, there)
    train(dataclasses.replace(cfg, steps=8), there)
    assert saved(there) == saved(tmp_path / "here")


@pytest.mark.slow
def test_an_outage_in_training_is_survived(bucket, cfg, local, monkeypatch):
    """In a step, in a save, and when the run ends; the bucket comes back while it is waited for."""
    workdir = run_path("gs://runs/outage", "--workdir")

    def outage(self, n):
        if n == 3:
            bucket.stop()
            threading.Timer(2, bucket.start).start()
        return False

    monkeypatch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", outage)
    train(cfg, workdir)
    assert rows_of(workdir) == rows_of(local) and saved(workdir)[6] == saved(local)[6]


@pytest.mark.slow
def test_an_outage_that_lasts_ends_in_one_line_and_keeps_the_last_checkpoint(bucket, cfg, local, monkeypatch):
    workdir = run_path("gs://runs/lasting", "--workdir")
    monkeypatch.setenv(buckets.PATIENCE, "1")

    def outage(self, n):
        if n == 4:
            while not Checkpoints(workdir / "checkpoints").steps:
                time.sleep(0.01)
            bucket.stop()
        return False

    try:
        with monkeypatch.context() as patch, pytest.raises(Unreachable) as error:
            patch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", outage)
            train(cfg, workdir)
    finally:
        bucket.start()
    assert "\n" not in str(error.value) and str(error.value).startswith("gs://runs/lasting/")
    assert describe(Checkpoints(workdir / "checkpoints"), 2)[1] == {}


def test_tokens_in_a_bucket_are_those_of_a_folder_and_only_what_is_read_is_copied(bucket, cfg):
    there = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_dir="gs://runs/cache"))
    theirs, ours = prepare(cfg), prepare(there)
    assert ours.train.fingerprint == theirs.train.fingerprint and ours.assets == theirs.assets
    again = prepare(there).train  # which was prepared
    (shard,) = again.shards
    assert not shard.copied.any()
    window = again.read(2100, 2120)  # the second block begins at token 2048
    np.testing.assert_array_equal(window, theirs.train.read(2100, 2120))
    assert shard.copied.tolist() == [False, True] + [False] * (len(shard.copied) - 2)
    batches, others = train_batches(again, there), train_batches(theirs.train, cfg)
    for _ in range(3):
        assert_trees_equal(next(batches), next(others))
    np.testing.assert_array_equal(prepare(there).train.tokens, theirs.train.tokens)
    name = next(name for name in bucket.names("runs") if re.match("cache/.*/train-.*bin", name))
    content = bytearray(bucket.content("runs", name))
    content[5000] ^= 1
    (run_path(f"gs://runs/{name}", "")).write_bytes(bytes(content))
    damaged = prepare(there).train
    np.testing.assert_array_equal(damaged.read(0, 2000), theirs.train.read(0, 2000))
    with pytest.raises(UserError, match=r"^gs://runs/cache/.*: bytes 4096 to 8192 have changed since"):
        damaged.read(2100, 2120)


def test_a_tokenizer_is_read_from_a_bucket(cfg, remote):
    tokenizer = prepare(cfg).tokenizer
    replace_file(run_path("gs://runs/tokenizer.json", ""), tokenizer.to_json())
    there = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer="gs://runs/tokenizer.json"))
    assert prepare(there).tokenizer.to_json() == tokenizer.to_json()


@pytest.mark.slow
def test_a_folder_out_of_reach_is_not_one_that_is_not_there(bucket, remote):
    folder = remote / "checkpoints"
    assert folder.is_dir() and not (folder / "none").is_dir() and not (remote / "config.json").is_dir()
    bucket.stop()
    try:
        for ask in (folder.is_dir, folder.exists, lambda: list(folder.iterdir()), lambda: Checkpoints(folder).steps):
            with pytest.raises(OSError, match="Cannot connect"):
                ask()
    finally:
        bucket.start()


def test_a_picture_is_written_to_a_bucket(bucket):
    write_with(run_path("gs://runs/some/picture.png", ""), lambda file: file.write(b"png"))
    assert bucket.content("runs", "some/picture.png") == b"png"


def test_patience_ends(monkeypatch):
    calls = []

    def fail():
        calls.append(time.monotonic())
        raise ConnectionRefusedError("refused")

    monkeypatch.setenv(buckets.PATIENCE, "0.5")
    with pytest.raises(Unreachable, match=r"^gs://b/x: the bucket is out of reach for [12] seconds \(refused\)"):
        patiently("gs://b/x", fail)
    assert len(calls) > 1
    with pytest.raises(ConnectionRefusedError):
        patiently("/x", fail)
    monkeypatch.setenv(buckets.PATIENCE, "long")
    with pytest.raises(UserError, match=f"^{buckets.PATIENCE}=long: must be a number"):
        patiently("gs://b/x", fail)


@pytest.mark.parametrize("url", ["gs://", "gs://runs", "gs://runs/", "gs://runs//x", "gs://runs/../x", "gs://runs/*"])
def test_what_names_no_folder_of_a_bucket_is_refused(url):
    with pytest.raises(UserError, match=r"^--workdir=gs://.*: names no folder of a bucket; use gs://BUCKET/FOLDER"):
        run_path(url, "--workdir")


@pytest.mark.parametrize("url", ["s3://b/x", "az://b/x", "gs:/b/x", "https://h/x", "hf://o/n"])
def test_other_schemes_are_refused_and_make_no_folder(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r": is a URL; use a path of this machine, or gs://BUCKET/FOLDER$"):
        run_path(url, "--workdir")
    with pytest.raises(UserError, match="is a URL"):
        TokenFormer.load(url)
    assert not os.listdir()


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    with pytest.raises(UserError, match=r"^gs://nosuch/run: ") as error:
        TokenFormer.train(tiny_config(), "gs://nosuch/run")
    assert "\n" not in str(error.value)
