"""Laws of what commands print and leave: output never fails, files are valid JSON, results come before files."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from tests.commands import NAMES, ROOT, call, call_well, complaint, start
from tests.helpers import corpus_overrides, tiny_config, write_config
from tokenformer_jax.devices import progress
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.perplexity import evaluate_run
from tokenformer_jax.evaluation.report import perplexity, summarise, table
from tokenformer_jax.evaluation.sampling import Sampling, print_samples
from tokenformer_jax.files import json_text, make_folder, replace_file, sealed, unsealed
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.ladder import Plateau
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.metrics_file import MetricsWriter, read_metrics
from tokenformer_jax.storage.official import export_official, to_official
from tokenformer_jax.storage.state_dicts import read_state_dict
from tokenformer_jax.storage.trained import load_trained

SMALL = {"model__num_layers": 1, "model__qkv_tokens": 8, "model__out_tokens": 8, "model__ffn_tokens": 16, "steps": 4}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    return tiny_config(**corpus_overrides(tmp_path_factory.mktemp("output")), **SMALL, eval_every=2)


@pytest.fixture(scope="module")
def run(cfg, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(cfg, workdir)
    return workdir


@pytest.fixture
def broken(run):
    """The run's model with parameters that are not finite."""
    trained = load_trained(run)
    params = trained.state.params | {"norm_scale": trained.state.params["norm_scale"] * np.nan}
    return dataclasses.replace(trained, state=trained.state._replace(params=params))


# Output

SCRIPT = """
import sys
from tokenformer_jax.cli import run_command
def main():
    print({text})
sys.argv = ["x"]
run_command(main)
"""


def script(text, stdout=subprocess.PIPE, **environment):
    code = SCRIPT.format(text=text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_characters_that_the_output_lacks_are_replaced():
    texts = {"ascii": ("'a\\U0001F600é'", "a??"), "latin-1": ("'é€'", None), "utf-8": ("'a\\udcffb'", "a?b")}
    running = {name: script(text, PYTHONIOENCODING=name, PYTHONUTF8="0") for name, (text, _) in texts.items()}
    for name, process in running.items():
        out, err = process.stdout.buffer.read(), process.stderr.read()
        assert process.wait() == 0 and not err, err
        assert out == {"ascii": b"a??\n", "latin-1": b"\xe9?\n", "utf-8": b"a?b\n"}[name]


def test_a_reader_that_leaves_ends_a_command_quietly():
    many, one = script("'x' * 10_000_000"), script("'x'")  # more than a pipe holds, and less than a buffer
    for process, count in ((many, 5), (one, 0)):
        process.stdout.buffer.raw.read(count)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() in (0, 141)
    assert many.returncode == 141


@pytest.mark.parametrize(
    "command, flags, count",
    [
        ("generate", ["--prompt=key", "--max_tokens=12"], 5),
        ("evaluate", ["--examples=0:8"], 10),
        ("generate", ["--help"], 3),
    ],
)
def test_commands_end_quietly_when_their_reader_leaves(run, tmp_path, command, flags, count):
    os.mkfifo(tmp_path / "stdout")

    def read():
        with open(tmp_path / "stdout", "rb", buffering=0) as pipe:
            pipe.read(count)

    reader = threading.Thread(target=read)
    reader.start()
    process = start(str(tmp_path), command, *([] if "--help" in flags else [f"--workdir={run}"]), *flags)
    reader.join()
    process.join(120)
    assert process.exitcode in (0, 141) and (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize("command", NAMES)
def test_help_lists_a_commands_flags_with_an_example(command):
    result = call(command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python -m tokenformer_jax.{command} --" in result.stdout
    flags = [line.split(":")[0].strip() for line in result.stdout.splitlines() if line.startswith("  --")]
    assert "--distributed" in flags and len(flags) > 1
    assert {"train": "--workdir", "grow": "--recipe", "evaluate": "--out", "report": "--runs"}.get(
        command, "--distributed"
    ) in flags


LAST = "4/4  x  ETA 00:00"


@pytest.mark.parametrize("quiet, told", [(0, f"1/4  x|3/4  x  ETA 00:06|{LAST}"), (14, LAST), (40, "")])
def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys, monkeypatch, quiet, told):
    seconds = iter([0.0, 1.0, 7.0, 13.0, 19.0, 20.0])
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    bar = progress.Progress(0, 4, "MB of text", quiet)
    for done in (1, 2, 3, 4, 4):
        bar.update(done, "x")
    bar.close()
    assert capsys.readouterr().err.splitlines() == [f"MB of text {line}" for line in told.split("|") if line]


# Figures first, then files


def test_a_result_is_told_before_a_file_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    trained = load_trained(run)
    evaluate_run(trained, tmp_path / "file", "validation")  # a workdir that nothing can be written to
    said = capsys.readouterr()
    assert "bits per byte" in said.out
    assert f"warning: {tmp_path}/file/eval.json: cannot be written" in said.err and "--out=FILE" in said.err
    with pytest.raises(UserError, match=r"file/x.json: cannot be written"):
        evaluate_run(trained, run, "validation", tmp_path / "file" / "x.json")
    assert "bits per byte" in capsys.readouterr().out
    for flag, path in (("--out", tmp_path / "new" / "figures.json"),):
        call_well("evaluate", f"--workdir={run}", f"{flag}={path}")
        assert json.loads(path.read_text())["split"] == "validation"
    result = call("report", f"--runs=a={run}", f"--out={tmp_path}/file")
    assert "perplexity" in result.stdout and "cannot be written" in complaint(result)


# NaN and infinities


def strictly(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, float(np.float32("nan"))])
def test_files_hold_valid_json(tmp_path, value):
    tree = {"a": value, "b": [1.5, {"c": value}], "d": (value, "x", None, True), "e": 3}
    whole = {"a": None, "b": [1.5, {"c": None}], "d": [None, "x", None, True], "e": 3}
    assert strictly(json_text(tree)) == whole
    assert unsealed(sealed(tree)) == whole
    strictly(sealed(tree))
    writer = MetricsWriter(tiny_config(), tmp_path, 0, 1)
    writer.write({"step": 1, "params": 1, "eval_loss": value})
    writer.close()
    assert strictly((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "params": 1, "eval_loss": None}
    assert read_metrics(tmp_path)[0]["eval_loss"] is None


def test_a_report_shows_what_was_not_finite(run, tmp_path):
    rows = read_metrics(run)
    for row in rows:
        if "eval_loss" in row and row["step"] == 4:
            row |= {"eval_loss": None, "eval_perplexity": None, "eval_bits_per_byte": None}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "nan" in table(summarise("x", tmp_path))
    call_well("report", f"--runs=x={tmp_path}", f"--out={tmp_path}")
    assert strictly((tmp_path / "report.json").read_text())[-1]["eval_loss"] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_plateau_sees_losses_that_are_not_finite(bad):
    def after(plateau, *losses):
        for step, loss in enumerate(losses, plateau.step + 1):
            plateau = plateau.after(step, loss, float(step), 0.0)
        return plateau

    assert after(Plateau(), bad, 5.0, bad, 4.0) == Plateau(4, 4.0, 0, ((2.0, 5.0), (4.0, 4.0)))
    assert after(Plateau(1, bad, 7), 5.0) == Plateau(2, 5.0, 0, ((2.0, 5.0),))  # as a former version wrote it
    stale = after(Plateau(1, 4.0), bad, bad)
    assert stale == Plateau(3, 4.0, 2) and stale.reached(dataclasses.replace(tiny_config().grow, patience=2))
    assert after(Plateau(), bad).best_loss is None


def test_every_command_says_that_a_model_is_broken(cfg, run, broken, tmp_path, capsys, monkeypatch):
    for samples in (1, 3):
        with pytest.raises(UserError, match="the model is broken"):
            print_samples(broken, "key", 4, samples, Sampling(), 0)
        assert capsys.readouterr().out == ""
    evaluate_run(broken, tmp_path, "validation")
    said = capsys.readouterr()
    assert "loss nan" in said.out and "the model of step 4 is broken" in said.err
    assert strictly((tmp_path / "eval.json").read_text())["loss"] is None
    monkeypatch.setattr("tokenformer_jax.storage.official.load_trained", lambda *_: broken)
    with pytest.raises(UserError, match=r"the model is broken: NaN or infinities in sequential\.4\.norm\.weight$"):
        export_official(run, tmp_path / "model.npz")
    assert not (tmp_path / "model.npz").exists()


def test_growing_a_broken_model_is_refused_by_its_name(cfg, run, broken, tmp_path, monkeypatch):
    larger = dataclasses.replace(cfg, steps=9, model=dataclasses.replace(cfg.model, ffn_tokens=24))
    monkeypatch.setattr("tokenformer_jax.growth.resize.InCheckpoint.model", lambda *_: broken.state)
    for recipe in ("zero_keys", "released"):
        recipe_cfg = dataclasses.replace(larger, grow=dataclasses.replace(larger.grow, recipe=recipe))
        with pytest.raises(UserError, match="the source is broken"):
            grow(run, recipe_cfg, tmp_path / "grown")
        assert not (tmp_path / "grown").exists()


# Asked for less than is done


@pytest.mark.parametrize("steps", [3, 1])
def test_a_run_that_did_more_than_is_asked_for_is_left_alone(cfg, run, capsys, steps):
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    less = dataclasses.replace(cfg, steps=steps, optimizer=dataclasses.replace(cfg.optimizer, warmup_steps=0))
    train(less, run)
    said = capsys.readouterr().err
    assert f"nothing to do: {run} was trained to step 4 already" in said and f"steps = {steps}" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == kept


def test_the_advice_to_go_on_works(cfg, run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    train(dataclasses.replace(cfg, steps=8), tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "eval_loss" in row] == [2, 4, 6, 8]


# True reasons


def test_a_link_to_nothing_is_called_that(cfg, run, tmp_path):
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(tmp_path / "gone")
    file.write_text("")
    for folder in (link, link / "below"):
        with pytest.raises(OSError, match="link") as error:
            make_folder(folder)
        assert error.value.strerror == f"{link} is a link to {tmp_path}/gone, which does not exist"
    with pytest.raises(UserError, match="file is a file"):
        replace_file(file / "x.json", "")
    config = write_config(tmp_path / "config.py", cfg)
    assert "which does not exist" in complaint(call("train", config, f"--workdir={link}"))
    (tmp_path / "gone").mkdir()  # the advice
    make_folder(link)


@pytest.mark.parametrize("name", ["config.json", "eval.yaml", "README"])
def test_a_config_that_is_no_python_file_is_called_that(run, tmp_path, name):
    path = pathlib.Path(run) / name if name == "config.json" else tmp_path / name
    if name != "config.json":
        path.write_text("steps: 3\n")
    line = complaint(call("train", f"--config={path}:small", f"--workdir={tmp_path}/w"))
    assert "not a Python file" in line and "quickstart:small" in line


def test_objects_in_an_npz_are_called_that(tmp_path):
    for number, value in enumerate((np.array([{}]), np.array([print, 1], dtype=object))):
        np.savez(tmp_path / f"{number}.npz", a=np.ones(2), b=value)
        with pytest.raises(UserError, match="it holds Python objects, whose code is never run"):
            read_state_dict(tmp_path / f"{number}.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "0.npz").read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        read_state_dict(tmp_path / "cut.npz")


@pytest.mark.parametrize("value", [math.exp(700.0), 1e30, 123456789.0, math.inf, math.nan])
def test_a_huge_perplexity_is_shown_in_few_digits(value):
    assert len(perplexity(value)) <= 10
    row = {"run": "x", "step": 1, "params": 1, "train_flops": 1.0, "eval_loss": 1e30, "eval_bits_per_byte": 1e30}
    assert str(perplexity(value)) in table([row | {"eval_perplexity": value}])


def test_official_weights_that_are_not_finite_are_refused_by_name(run, tmp_path):
    arrays = {name: np.array(array) for name, array in to_official(load_trained(run).state.params).items()}
    from tokenformer_jax import TokenFormer

    for name, value in (("sequential.0.word_embeddings.weight", np.nan), ("sequential.4.norm.bias", np.inf)):
        bad = arrays | {name: np.full_like(arrays[name], value)}
        with pytest.raises(UserError, match=f"the model is broken: NaN or infinities in {name}$"):
            TokenFormer.from_official(bad, 4)
    with pytest.raises(UserError, match=r"in sequential.* and \d+ more$"):
        TokenFormer.from_official({name: np.full_like(array, np.nan) for name, array in arrays.items()}, 4)
