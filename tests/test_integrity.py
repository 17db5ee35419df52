"""Laws of damage: what changed on the disk is named and skipped, or it changes nothing that is read."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest

from tests.commands import call
from tests.helpers import assert_trees_equal, corpus_overrides, step_of, tiny_config
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.shrink import shrink
from tokenformer_jax.running.loop import train
from tokenformer_jax.running.run import open_run
from tokenformer_jax.storage.arrays import by_name
from tokenformer_jax.storage.checkpoints import Checkpoints, DamagedError, save_one
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.storage.workdir import load_config

pytestmark = pytest.mark.usefixtures("steps_are_shared")

OLD, NEW = 2, 4  # steps


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("integrity")
    return tiny_config(**corpus_overrides(folder), log_every=1, checkpoint_every=2, eval_every=3)


@pytest.fixture(scope="module")
def run(cfg, tmp_path_factory):
    """A run of 8 steps that was stopped at step 4, with checkpoints of the steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenformer_jax.running.signals.StopSignals.stop_after", lambda self, n: n == NEW)
        train(cfg, workdir)
    return workdir


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def flip(path, byte, bit=0):
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1 << bit
    path.write_bytes(raw)


def damage(workdir, name, step=NEW):
    """Flips a bit of an array, which is found in the files by what it holds."""
    cfg = load_config(workdir / "config.json")
    abstract = step_of(cfg).abstract_state
    row = np.asarray(by_name(Checkpoints(workdir / "checkpoints").restore(step, abstract))[name])[7].tobytes()
    (path,) = [p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file() and row in p.read_bytes()]
    flip(path, path.read_bytes().index(row) + 5, 3)


def files_of(workdir):
    """Kind of file -> the files of the newest checkpoint of that kind."""
    folder, kinds = workdir / "checkpoints" / str(NEW), {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        kinds.setdefault(str(name.parent / "*") if name.parent.name == "d" else str(name), []).append(path)
    return kinds


KINDS = """
    _CHECKPOINT_METADATA commit_success.txt record/commit_success.txt record/record.json state/_METADATA state/_sharding
    state/array_metadatas/process_0 state/commit_success.txt state/d/* state/manifest.ocdbt state/ocdbt.process_0/d/*
    state/ocdbt.process_0/manifest.ocdbt
""".split()


def test_a_checkpoint_has_no_other_files(run):
    assert sorted(files_of(run)) == sorted(KINDS)


def what_is_read(run):
    return run.state, run.data.get_state(), run.corpus.tokenizer.to_json(), dataclasses.asdict(run.record)


def check_flip(cfg, whole, workdir, path, byte, bit):
    """Flips a bit; returns whether that was caught, and asserts that it did no harm if not.

    `train`, `evaluate` (by what they load) and `checkpoint` must agree, but that `evaluate` reads no moments.
    """
    flip(path, byte, bit)
    where = f"{path.relative_to(workdir)}, bit {bit} of byte {byte}"
    faults = Checkpoints(workdir / "checkpoints").faults(NEW)
    trained = load_trained(workdir)
    resumed = open_run(cfg, workdir)
    caught = resumed.start == OLD
    assert bool(faults) == caught, where
    assert (workdir / "damaged_checkpoints").is_dir() == caught, where
    assert_trees_equal(trained.state.params, whole[trained.step_number].state.params)
    assert caught or trained.step_number == NEW, where
    for got, want in zip(what_is_read(resumed), what_is_read(whole[resumed.start]), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, err_msg=where), got, want)
    return caught


@pytest.fixture(scope="module")
def whole(cfg, run, tmp_path_factory):
    """What train resumes from the undamaged steps."""
    old = tmp_path_factory.mktemp("old") / "run"
    shutil.copytree(run, old)
    shutil.rmtree(old / "checkpoints" / str(NEW))
    return {NEW: open_run(cfg, run), OLD: open_run(cfg, old)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_caught_or_changes_nothing(cfg, run, whole, tmp_path, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    path = rng.choice(files_of(workdir)[kind])
    caught = check_flip(cfg, whole, workdir, path, rng.integers(path.stat().st_size), rng.integers(8))
    assert caught or kind != "record/record.json"


@pytest.mark.slow
def test_two_hundred_flipped_bits_over_all_files(cfg, run, whole, tmp_path, capsys):
    """Half over the kinds of files alike, half over the bytes."""
    rng = np.random.default_rng(0)
    kinds = files_of(run)
    everything = [(kind, path) for kind, paths in kinds.items() for path in paths]
    sizes = np.array([path.stat().st_size for _, path in everything])
    tried = {kind: [] for kind in kinds}
    for number in range(200):
        kind = KINDS[number // 2 % len(KINDS)] if number % 2 else None
        i = rng.choice(len(everything), p=sizes / sizes.sum())
        kind, path = (kind, rng.choice(kinds[kind])) if kind else everything[i]
        workdir = tmp_path / "flipped"
        shutil.copytree(run, workdir)
        path = workdir / path.relative_to(run)
        tried[kind].append(check_flip(cfg, whole, workdir, path, rng.integers(path.stat().st_size), rng.integers(8)))
        shutil.rmtree(workdir)
    with capsys.disabled():
        print("\nflipped bits: caught / tried; all others restored bit-identically")
        for kind, caught in tried.items():
            print(f"  {kind:<40} {sum(caught):>3} / {len(caught)}")
        print(f"  {'all':<40} {sum(map(sum, tried.values())):>3} / {sum(map(len, tried.values()))}")
    assert all(tried["record/record.json"])


@pytest.mark.parametrize("name", ["record", "record/record.json", "state", "state/manifest.ocdbt", "state/_METADATA"])
def test_an_incomplete_checkpoint_is_passed_over(cfg, whole, copy, name, capsys):
    path = copy / "checkpoints" / str(NEW) / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Checkpoints(copy / "checkpoints").faults(NEW)
    assert load_trained(copy).step_number == OLD
    assert f"checkpoints/{NEW}: " in (said := capsys.readouterr().err) and "step 2 is used instead" in said
    assert_trees_equal(open_run(cfg, copy).state, whole[OLD].state)


def test_a_run_goes_on_exactly_from_before_the_damage(cfg, copy, tmp_path, capsys):
    damage(copy, "params.embed")
    train(cfg, copy)
    said = capsys.readouterr().err
    assert "checkpoints/4: params.embed damaged (its fingerprint differs); step 2 is used instead" in said
    assert "damaged checkpoint of step 4 was moved to" in said
    train(cfg, tmp_path / "undamaged")
    ends = [open_run(cfg, workdir) for workdir in (copy, tmp_path / "undamaged")]
    assert_trees_equal(*(what_is_read(end)[:2] for end in ends))


def test_where_none_is_good_nothing_is_moved(cfg, copy):
    for step in (OLD, NEW):
        damage(copy, "params.embed", step)
    for read in (train, lambda cfg, workdir: load_trained(workdir)):
        with pytest.raises(DamagedError, match=r"4: params.embed damaged .*none of the checkpoints is good"):
            read(cfg, copy)
    assert Checkpoints(copy / "checkpoints").steps == [OLD, NEW]


def test_growth_and_shrinking_read_an_older_step_where_moments_are_damaged(cfg, copy, tmp_path, capsys):
    """Growth reads moments into larger arrays, whose padding does not count."""
    damage(copy, "opt_state.0.mu.embed")
    assert load_trained(copy).step_number == NEW  # it reads no moments
    sizes = {"larger": {"qkv_tokens": 32, "ffn_tokens": 128}, "smaller": {"ffn_tokens": 64}}
    for (name, size), make in zip(sizes.items(), (grow, shrink), strict=True):
        model = dataclasses.replace(cfg.model, **size)
        other = dataclasses.replace(cfg, model=model, mesh=dataclasses.replace(cfg.mesh, fsdp=2, tensor=4))
        assert make(copy, other, tmp_path / name)["step"] == OLD
        assert "checkpoints/4: opt_state.0.mu.embed damaged (its fingerprint differs)" in capsys.readouterr().err
        assert not Checkpoints(tmp_path / name / "checkpoints").faults(OLD)
        with pytest.raises(DamagedError, match=r"opt_state\.0\.mu\.embed damaged .*; there is also step 2"):
            make(copy, other, tmp_path / "none", NEW)
        assert not (tmp_path / "none").exists()


def test_a_changed_config_is_refused_but_by_train(cfg, whole, copy, capsys):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    for read in (load_config, lambda path: load_trained(path.parent)):
        with pytest.raises(UserError, match=r"config\.json: has changed since it was written"):
            read(copy / "config.json")
    assert open_run(cfg, copy).start == NEW
    (copy / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    train(cfg, copy)
    assert "config.json: has changed" in capsys.readouterr().err
    assert load_config(copy / "config.json") == cfg


def test_an_array_of_a_mesh_is_saved_with_the_fingerprint_that_one_device_computes(cfg, run, whole, tmp_path):
    sharded = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=2, fsdp=2, tensor=2))
    there = open_run(sharded, shutil.copytree(run, tmp_path / "run"))
    items = there.state, there.data, there.corpus.assets, there.record
    save_one(tmp_path / "again" / "checkpoints", NEW, *items)
    saved = [Checkpoints(workdir / "checkpoints")._saved(NEW) for workdir in (run, tmp_path / "again")]
    assert saved[0] == saved[1] and len(saved[0]) == len(jax.tree.leaves(there.state))


def command(name, *args):
    result = call(name, *args)
    return result.returncode, result.stdout, result.stderr.strip().splitlines()


def test_the_commands_tell_what_is_damaged(copy):
    code, out, lines = command("checkpoint", f"--workdir={copy}")
    assert (code, lines) == (0, []), lines
    assert out.count("  good\n") == 2
    assert re.search(r"step 4: 0\.\d MB, 512 tokens seen, parameter tokens: query 24, ", out), out
    damage(copy, "params.embed")
    flip(copy / "checkpoints" / str(OLD) / "record" / "record.json", 300)
    code, out, lines = command("checkpoint", f"--workdir={copy}")
    assert code == 2 and len(lines) == 1
    assert lines[0].endswith("checkpoints: damaged are step 2: record; step 4: params.embed")
    assert "  damaged: params.embed (its fingerprint differs)\n" in out
    code, _, lines = command("generate", f"--workdir={copy}", "--max_tokens=1", "--step=4")
    assert code == 2 and len(lines) == 1
    assert lines[0].endswith("checkpoints/4: params.embed damaged (its fingerprint differs); there is also step 2")
    code, _, lines = command("evaluate", f"--workdir={copy}")
    assert code == 2 and len(lines) == 1 and lines[0].endswith("none of the checkpoints is good")
