"""The commands as their users see them: what works, and one clear line with exit code 2 for what does not."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.commands import ROOT, call, call_well, complaint
from tests.helpers import write_corpus
from tokenformer_jax.api import TokenFormer
from tokenformer_jax.data.folders import find
from tokenformer_jax.data.tokenizer import tokenizer_from_json
from tokenformer_jax.storage.checkpoints import Checkpoints

CONFIG = """
from configs import base

def get_config(variant="small"):
    config = base.get_config()
    config.steps, config.batch_size, config.eval_every, config.checkpoint_every = 6, 4, 3, 3
    config.model.update(vocab_size=300, context_length=32, num_layers=2, num_heads=2, embed_dim=16)
    config.model.update(qkv_tokens=8, out_tokens=8, ffn_tokens=16)
    config.optimizer.update(warmup_steps=1, peak_learning_rate=1e-2)
    config.data.update(dataset="text_files", path={text!r}, cache_dir={cache!r})
    if variant == "grown":
        config.steps = 12
        config.model.update(qkv_tokens=12, out_tokens=12, ffn_tokens=24)
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a config, a trained run `small` and its grown successor `grown`, through the commands."""
    folder = tmp_path_factory.mktemp("commands")
    text = write_corpus(folder / "text")
    (folder / "config.py").write_text(CONFIG.format(text=str(text), cache=str(folder / "cache")))
    config = f"--config={folder}/config.py"
    for command, *args in (
        ("train", f"{config}:small", f"--workdir={folder}/small"),
        ("grow", f"--source={folder}/small", f"{config}:grown", f"--workdir={folder}/grown"),
        ("train", f"{config}:grown", f"--workdir={folder}/grown"),
    ):
        call_well(command, *args)
    return folder


@pytest.mark.parametrize(
    "preset", ["--config=quickstart:small", "--config quickstart:small", "--config=configs/quickstart.py"]
)
def test_a_preset_is_named_or_given_as_a_file(preset, folder):
    flags = [*preset.split(), "--config.data.dataset=text_files", f"--config.data.path={folder}/text"]
    line = complaint(call("train", *flags, f"--config.data.cache_dir={folder}/cache", f"--workdir={folder}/text"))
    assert "holds other files and no run" in line  # the config was read


def test_the_console_script_runs_each_command_in_any_folder(folder, tmp_path):
    def tokenformer(*args):
        code = f"import sys; sys.argv = {['tokenformer', *args]!r}; from tokenformer_jax.cli import main; main()"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-c", code]
        return subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert "config.json: not found" in complaint(tokenformer("evaluate", f"--workdir={tmp_path}"))
    assert "did you mean 'train'" in complaint(tokenformer("trian"))
    assert "--workdir" in tokenformer("train", "--help").stdout
    assert tokenformer("--version").stdout.count(".") == 2
    out = tokenformer("checkpoint", f"--workdir={folder}/small").stdout
    assert "step 6:" in out and "damaged" not in out


def test_data_that_were_moved_are_named_by_the_same_flag_to_train_and_evaluate(folder, tmp_path):
    (tmp_path / "run" / "text").mkdir(parents=True)  # the run inside its data
    for file in (folder / "text").iterdir():
        shutil.copy(file, tmp_path / "run" / "text")
    shutil.copytree(folder / "small", tmp_path / "run" / "W")
    config = json.loads((folder / "small" / "config.json").read_text())
    config["data"]["path"] = "not/here"
    del config["checksum"]
    (tmp_path / "run" / "W" / "config.json").write_text(json.dumps(config))
    line = complaint(call("evaluate", f"--workdir={tmp_path}/run/W"))
    assert "data.path = 'not/here'" in line and "--config.data.path=PLACE" in line
    moved = f"--config.data.path={tmp_path}/run", f"--config.data.cache_dir={tmp_path}/cache"
    before, after = (
        call("evaluate", *args) for args in ([f"--workdir={folder}/small"], [f"--workdir={tmp_path}/run/W", *moved])
    )
    assert before.stdout == after.stdout and "warning" not in before.stderr + after.stderr
    call_well("train", f"--config={folder}/config.py", *moved, "--config.steps=7", f"--workdir={tmp_path}/run/W")
    assert json.loads((tmp_path / "run" / "W" / "config.json").read_text())["data"]["path"] == f"{tmp_path}/run"
    write_corpus(tmp_path / "other", seed=1)
    other = call("evaluate", f"--workdir={tmp_path}/run/W", f"--config.data.path={tmp_path}/other", moved[1])
    assert other.returncode == 0 and "warning: the data have changed since the run" in other.stderr


@pytest.mark.parametrize("args", ["--config.data.pth=x", "--config.model.num_layers=2", "--config=quickstart:small"])
def test_evaluate_takes_no_other_key_of_the_config(folder, args):
    line = complaint(call("evaluate", f"--workdir={folder}/small", args))
    assert args.split("=")[0].lstrip("-") in line and "must stand before" not in line


def test_the_folders_of_runs_hold_no_data(folder):
    for run in ("small", "grown"):
        assert find(folder / run).files == []
        assert find(folder / "**" / "*").files == find(folder / "text").files


def test_evaluate(folder):
    assert "bits per byte" in call_well("evaluate", f"--workdir={folder}/grown")
    figures = json.loads((folder / "grown" / "eval.json").read_text())
    rows = [json.loads(line) for line in (folder / "grown" / "metrics.jsonl").read_text().splitlines()]
    assert figures["loss"] == pytest.approx([row["eval_loss"] for row in rows if "eval_loss" in row][-1], rel=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))
    tokenizer = tokenizer_from_json(Checkpoints(folder / "grown" / "checkpoints").assets(12)["tokenizer"])
    meta = json.loads(next((folder / "cache").rglob("meta.json")).read_text())["validation"]
    assert figures["tokens"] == meta["num_tokens"] - 1  # every token once, the last partial batch included
    assert figures["bits_per_byte"] == pytest.approx(
        figures["loss"] * figures["tokens"] / np.log(2) / meta["num_bytes"]
    )
    assert tokenizer.vocab_size <= 300


def test_growth_is_reported_group_by_group(folder):
    figures = json.loads((folder / "grown" / "grow.json").read_text())
    before, after = figures["groups_before"], figures["groups_after"]
    assert (before["ffn"]["tokens"], after["ffn"]["tokens"]) == (16, 24)
    assert after["ffn"]["params"] == 2 * 2 * 24 * 16  # layers, keys and values, tokens, width
    assert after["all"]["params"] == figures["params_after"] == sum(g["params"] for n, g in after.items() if n != "all")
    state = Checkpoints(folder / "grown" / "checkpoints")._metadata(12).metadata
    moments = [a for tree in (state["params"], *(state["opt_state"][0][m] for m in ("mu", "nu"))) for a in leaves(tree)]
    assert after["all"]["bytes"] == sum(4 * np.prod(a.shape) for a in moments)


def leaves(tree):
    return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree]


def test_the_readmes_python_runs(folder, tmp_path):
    """All of it, one after another, on the small run's data and sizes."""
    section = (ROOT / "README.md").read_text().split("## From Python\n")[1].split("\n## ")[0]
    blocks = [block.split("```")[0] for block in section.split("```python\n")[1:]]
    assert len(blocks) >= 3
    pytest.importorskip("torch")
    small = TokenFormer.load(folder / "small")
    arrays = {name: np.ascontiguousarray(array) for name, array in small.to_official().items()}
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text(small.tokenizer.to_json())
    code = "".join(blocks)
    for theirs, ours in {
        "runs/quickstart/grown": str(folder / "grown"),
        "prompt], 40,": "prompt], 4,",
        'quickstart.get_config("small")': 'config.get_config("small")',
        "from tokenformer_jax.configs import quickstart": "import config",
    }.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300, cwd=tmp_path)


def test_growth_by_nothing_goes_on_with_the_same_model(folder):
    config, workdir = f"--config={folder}/config.py:small", folder / "fork"
    out = call_well("grow", f"--source={folder}/small", config, "--config.steps=9", f"--workdir={workdir}")
    assert "no token count changed" in out
    call_well("train", config, "--config.steps=9", f"--workdir={workdir}")
    assert Checkpoints(workdir / "checkpoints").steps[-1] == 9


@pytest.mark.parametrize(
    "name, command", [("train", "train"), pytest.param("validation", "evaluate", marks=pytest.mark.slow)]
)
def test_prepared_tokens_that_changed_are_never_read(folder, tmp_path, name, command):
    config = (folder / "config.py").read_text().replace(str(folder / "cache"), str(tmp_path / "cache"))
    (tmp_path / "config.py").write_text(config)
    arguments = f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"
    call_well("train", *arguments)
    (tokens,) = (tmp_path / "cache").rglob(f"{name}-*.bin")
    raw = np.fromfile(tokens, np.uint16)
    (raw ^ 1).tofile(tokens)
    flags = [*arguments, "--config.steps=9"] if command == "train" else [f"--workdir={tmp_path}/run"]
    result = call(command, *flags)
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and line.startswith(f"error: {tokens}: bytes ") and "Traceback" not in result.stderr
    assert "have changed since they were prepared" in line
    raw.tofile(tokens)
    call_well("evaluate", f"--workdir={tmp_path}/run")


def test_evaluate_and_generate_run_sharded(folder):
    losses = []
    for mesh in ("1,1,1", "2,2,2"):
        call_well("evaluate", f"--workdir={folder}/grown", f"--mesh={mesh}")
        losses.append(json.loads((folder / "grown" / "eval.json").read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    args = f"--workdir={folder}/grown", "--prompt=key value", "--max_tokens=12", "--temperature=0"
    assert call_well("generate", *args, "--mesh=1,1,2") == call_well("generate", *args)


def test_generate_is_seeded_and_continues_the_prompt(folder):
    args = f"--workdir={folder}/grown", "--prompt=key value", "--max_tokens=12"
    first, again, other = (call_well("generate", *args, f"--seed={seed}") for seed in (0, 0, 1))
    assert first.startswith("key value") and len(first) > len("key value\n")
    assert first == again != other
    assert call_well("generate", *args, "--samples=3").count("--- sample") == 3
    assert call_well("generate", f"--workdir={folder}/grown", "--prompt=\udcff", "--max_tokens=1").startswith("\ufffd")


def test_report_draws_the_plot_and_lists_the_stages(folder):
    (folder / "a,lr=0.1").symlink_to(folder / "small")
    call_well("report", f"--runs=small={folder}/a,lr=0.1,grown={folder}/grown", f"--out={folder}/report")
    rows = json.loads((folder / "report" / "report.json").read_text())
    assert [row["run"] for row in rows] == ["small", "grown, right after growth", "grown"]
    assert rows[1]["eval_loss"] == pytest.approx(rows[0]["eval_loss"], rel=1e-5)  # growth is lossless
    assert rows[1]["train_flops"] == rows[0]["train_flops"] < rows[2]["train_flops"]
    assert (folder / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_growth_with_zero_values_warns(folder):
    config, workdir = f"--config={folder}/config.py:grown", folder / "zeros"
    out = call_well("grow", f"--source={folder}/small", config, f"--workdir={workdir}", "--recipe=zero_padding")
    assert "warning" in out and "never learn" in out
    assert json.loads((workdir / "grow.json").read_text())["new_key_gradient_norm"] == 0


@pytest.mark.slow
def test_growth_killed_at_any_moment_leaves_nothing_or_a_whole_workdir(folder, tmp_path):
    """Nine kills spread over the time that a whole growth takes, then one that is left alone."""
    args = f"--source={folder}/small", f"--config={folder}/config.py:grown"
    line = [sys.executable, "-m", "tokenformer_jax.grow", *args, f"--workdir={tmp_path}/w"]
    began = time.monotonic()
    call_well("grow", *args, f"--workdir={tmp_path}/whole")
    whole = time.monotonic() - began
    kept = {path: path.read_bytes() for path in (folder / "small").rglob("*") if path.is_file()}
    left = []
    for part in np.linspace(0.5, 1.0, 9):
        with subprocess.Popen(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL) as process:
            time.sleep(part * whole)
            process.kill()
        left.append((tmp_path / "w").exists())
        if left[-1]:
            call_well("train", f"--config={folder}/config.py:grown", f"--workdir={tmp_path}/w")
            shutil.rmtree(tmp_path / "w")
    assert not all(left)
    call_well("grow", *args, f"--workdir={tmp_path}/w")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w", "whole"]
    assert kept == {path: path.read_bytes() for path in (folder / "small").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_profile_is_written_where_tensorboard_looks(folder, tmp_path):
    call_well("train", f"--config={folder}/config.py", "--config.profile_at=2", f"--workdir={tmp_path}")
    assert list((tmp_path / "tensorboard").rglob("*.xplane.pb"))


def test_an_older_step_can_be_grown(folder):
    config, workdir = f"--config={folder}/config.py:grown", folder / "older"
    call_well("grow", f"--source={folder}/small", config, f"--workdir={workdir}", "--step=3")
    assert Checkpoints(workdir / "checkpoints").steps == [3]


def test_shrinking_tells_the_loss_before_and_after(folder):
    config, workdir = f"--config={folder}/config.py:small", folder / "smaller"
    args = f"--source={folder}/grown", config, "--config.steps=15", f"--workdir={workdir}", "--shrink"
    assert "24 -> 16" in (out := call_well("grow", *args))
    figures = json.loads((workdir / "shrink.json").read_text())
    assert f"{figures['loss_before']:.5f} -> {figures['loss_after']:.5f} nats" in out


def test_a_path_for_data_that_have_none_is_refused(folder, tmp_path):
    shutil.copytree(folder / "small", tmp_path / "run")
    tree = json.loads((tmp_path / "run" / "config.json").read_text())
    del tree["checksum"]  # of a config that was changed by hand
    tree["data"]["dataset"] = "python_source"
    (tmp_path / "run" / "config.json").write_text(json.dumps(tree))
    told = complaint(call("evaluate", f"--workdir={tmp_path}/run", "--config.data.path=text"))
    assert "--config.data.path=text: python_source, the run's data set, reads no path" in told


WRONG = [
    ("train", "--config={f}/config.py --config.modle.num_heads=3 --workdir={f}/w", "model.num_heads"),
    ("train", "--config={f}/config.py --config.stepz=3 --workdir={f}/w", "did you mean 'steps'"),
    ("train", "--config={f}/config.py --config.steps=many --workdir={f}/w", "config.steps"),
    ("train", "--config={f}/config.py --config.model.num_heads=3 --workdir={f}/w", "use 2 or 4"),
    ("train", "--config={f}/config.py --config.model.normalizer=l3 --workdir={f}/w", "l2_norm_gelu"),
    ("train", "--config={f}/config.py --config.mesh.tensor=4 --config.mesh.data=4 --workdir={f}/w", "mesh"),
    ("train", "--config={f}/config.py --config.batch_size=5 --config.accumulation=2 --workdir={f}/w", "batch_size"),
    ("train", "--config={f}/config.py --config.steps=0 --workdir={f}/w", "steps = 0"),
    ("train", "--config={f}/config.py:big", "--workdir is missing"),
    ("train", "--workdir={f}/w", "--config is missing"),
    ("train", "--config={f}/nothing.py --workdir={f}/w", "nothing.py"),
    ("train", "--config=quickstart:tiny --workdir={f}/w", "quickstart.py:tiny: ValueError: variant 'tiny' must be"),
    ("train", "--config=quickstrat:small --workdir={f}/w", "did you mean 'quickstart'"),
    ("train", "--config={f}/config.py --workdir={f}/text", "holds other files"),
    ("train", "--config={f}/config.py:grown --workdir={f}/small", "model.qkv_tokens = 12"),
    ("train", "--config={f}/config.py --workdir={f}/w --speed=9", "speed"),
    ("train", "--config={f}/config.py --workdir={f}/w extra", "extra"),
    ("train", "--config={f}/config.py --config.data.path={f}/none --workdir={f}/w", "data.path"),
    ("train", "--config={f}/config.py --config.data.dataset=no_such_set --workdir={f}/w", "data.dataset"),
    ("train", "--config={f}/config.py --config.data.tokenizer={f}/config.py --workdir={f}/w", "data.tokenizer"),
    ("train", "--config={f}/config.py --config.data.tokenizer={f}/big.json --workdir={f}/w", "model.vocab_size = 300"),
    (
        "grow",
        "--source={f}/small --config={f}/config.py:grown --config.model.ffn_tokens=15 --workdir={f}/w",
        "ffn_tokens",
    ),
    (
        "grow",
        "--source={f}/small --config={f}/config.py:grown --config.model.num_layers=3 --workdir={f}/w",
        "num_layers",
    ),
    ("grow", "--source={f}/none --config={f}/config.py:grown --workdir={f}/w", "none/config.json"),
    ("grow", "--source={f}/text --config={f}/config.py:grown --workdir={f}/w", "text/config.json"),
    ("grow", "--source={f}/small --config={f}/config.py:grown --workdir={f}/grown", "train goes on with it"),
    ("grow", "--source={f}/small --config={f}/config.py:grown --config.steps=6 --workdir={f}/w", "steps = 6"),
    ("grow", "--source={f}/small --config={f}/config.py:grown --workdir={f}/w --step=5", "--step=5"),
    ("grow", "--source={f}/small --config={f}/config.py:grown --workdir={f}/w --recipe=random", "grow.recipe"),
    ("grow", "--source={f}/small --config={f}/config.py:grown --workdir={f}/w --shrink", "model.qkv_tokens = 12"),
    ("grow", "--source={f}/grown --config={f}/config.py:small --workdir={f}/w --shrink --recipe=split", "--recipe"),
    ("evaluate", "--workdir={f}/none", "none/config.json"),
    ("evaluate", "--workdir={f}/small --split=test", "--split=test"),
    ("evaluate", "--workdir={f}/small --step=4", "--step=4"),
    ("evaluate", "--workdir={f}/small --mesh=2", "--mesh=2"),
    ("evaluate", "--workdir={f}/small --mesh=16,1,1", "mesh"),
    ("evaluate", "--workdir={f}/notrun", "notrun/config.json"),
    ("generate", "--workdir={f}/small --max_tokens=999", "max_tokens = 999"),
    ("generate", "--workdir={f}/small --temperature=-1", "temperature = -1"),
    ("generate", "--workdir={f}/small --top_p=0", "top_p = 0"),
    ("generate", "--workdir={f}/small --max_tokens=0", "max_tokens = 0"),
    ("generate", "--workdir={f}/small --seed=-1", "--seed=-1"),
    ("evaluate", "--workdir={f}/small --mesh=\u00b2,1,1", "--mesh="),
    ("evaluate", "--workdir={f}/small --examples=8", "--examples=8"),
    ("evaluate", "--workdir={f}/small --examples=8:2", "--examples=8:2"),
    ("evaluate", "--workdir={f}/small --examples=a:b", "--examples=a:b"),
    ("evaluate", "--workdir={f}/small --step=many", "step"),
    ("evaluate", "--workdir={f}/config.py", "config.py"),
    ("evaluate", "--workdir={f}/small --config=zero_shot:huge", "none, paper, text, python, data"),
    ("evaluate", "--workdir={f}/small --config.tsks=x", "--config.tsks: unknown key; did you mean 'tasks'"),
    ("evaluate", "--workdir={f}/small --config.stride=99", "config.stride = 99"),
    ("evaluate", "--workdir={f}/small --config.context_length=99", "config.context_length = 99"),
    ("evaluate", "--workdir={f}/small --num_fewshot=-2", "config.num_fewshot = -2"),
    ("evaluate", "--workdir={f}/small --config=zero_shot:data", "--config.datasets.data.path=PLACE"),
    ("train", "--config={f}/config.py --config.non_finite=ignore --workdir={f}/w", "raise, skip, rollback"),
    (
        "train",
        "--config={f}/config.py --config.non_finite=skip --config.loss_spike=1 --workdir={f}/w",
        "loss_spike = 1.0",
    ),
    ("train", "--config={f}/config.py --config.batch_size=0 --workdir={f}/w", "batch_size = 0"),
    ("train", "--config={f}/config.py --config.optimizer.peak_learning_rate=nan --workdir={f}/w", "peak_learning_rate"),
    ("train", "--config={f}/config.py --config.model.dropout=1 --workdir={f}/w", "model.dropout = 1.0"),
    ("train", "--config={f}/config.py --config.model.rotary_fraction=2 --workdir={f}/w", "rotary_fraction = 2.0"),
    ("train", "--config={f}/config.py --config.optimizer.warmup_steps=6 --workdir={f}/w", "warmup_steps = 6"),
    ("train", "--config={f}/config.py --config.model.context_length=100000 --workdir={f}/w", "data.train_split"),
    ("train", "--config={f}/broken.py --workdir={f}/w", "broken.py"),
    ("train", "--config={f}/empty.py --workdir={f}/w", "empty.py"),
    ("train", "--config={f}/config.py --config.data.path={f}/none.jsonl --workdir={f}/w", "data.path"),
    ("train", "--config={f}/config.py --config.data.tokenizer={f}/none.json --workdir={f}/w", "none.json"),
    ("train", "--config={f}/config.py --workdir={f}/config.py", "config.py"),
    ("checkpoint", "--workdir={f}/text", "no checkpoints here"),
    ("checkpoint", "", "--workdir is missing"),
    ("generate", "--workdir={f}/small --top_k=-1", "top_k = -1"),
    ("generate", "--workdir={f}/none", "none/config.json"),
    ("generate", "--workdir={f}/small --samples=0", "--samples=0"),
    ("convert", "--workdir={f}/w", "--from_torch"),
    ("convert", "--from_torch={f}/none.safetensors --config={f}/config.py --workdir={f}/w", "none.safetensors"),
    ("convert", "--from_torch={f}/broken.safetensors --config={f}/config.py --workdir={f}/w", "broken.safetensors"),
    ("report", "--runs={f}/small,{f}/x/small", "two runs are named 'small'"),
    ("report", "--runs=", "--runs is missing"),
    ("report", "--runs=a={f}/none", "none"),
    ("train", "--config={f}/config.py --config.data.cache_dir=s3://bucket/c --workdir={f}/w", "data.cache_dir"),
    ("train", "--config={f}/config.py --config.data.path=hf://datasets/x --workdir={f}/w", "data.path"),
    ("grow", "--source=s3://bucket/run --config={f}/config.py:grown --workdir={f}/w", "--source=s3://"),
    ("evaluate", "--workdir=s3://bucket/run", "--workdir=s3://"),
    ("convert", "--from_torch=hf://x/y.safetensors --config={f}/config.py --workdir={f}/w", "--from_torch=hf://"),
    ("train", "--config={f}/small/config.json --workdir={f}/w", "not a Python file"),
    ("train", "--config={f}/text --workdir={f}/w", "is a folder"),
    ("generate", "--workdir={f}/small --temperature=nan", "temperature = nan"),
    ("generate", "--workdir={f}/small --top_p=nan", "top_p = nan"),
    ("train", "--config={f}/config.py --config.optimizer.schedule=linear --workdir={f}/w", "cosine, wsd, constant"),
    ("train", "--config={f}/config.py --config.optimizer.decay_fraction=2 --workdir={f}/w", "decay_fraction = 2.0"),
    ("train", "--config={f}/config.py --source={f}/small --workdir={f}/w", "--source: goes with --decay_from"),
    (
        "train",
        "--config={f}/config.py --decay_from=3 --source={f}/small --workdir={f}/w",
        "--config: a run",
    ),
    ("train", "--decay_from=3 --workdir={f}/w", "--source is missing"),
    ("train", "--decay_from=4 --source={f}/small --workdir={f}/w", "--decay_from=4: "),
    ("train", "--decay_from=4 --source={f}/small --workdir={f}/w --check_for=any", "--decay_from=4: "),
    ("train", "--decay_from=3 --source=/none --decay_fraction=2 --workdir={f}/w --check_for=any", "--decay_fraction=2"),
    ("train", "--decay_from=3 --source={f}/small --workdir={f}/w --config.steps=9", "use --decay_fraction"),
    ("train", "--decay_from=3 --source={f}/small --workdir={f}/w", "not at its peak"),
    ("train", "--config={f}/config.py --config.train_tokens=-1 --workdir={f}/w", "train_tokens = -1"),
    ("train", "--config={f}/config.py --config.train_flops=1 --workdir={f}/w", "train_flops = 1"),
    ("train", "--config={f}/config.py --check_for=many --workdir={f}/w", "--check_for=many"),
]


@pytest.mark.parametrize("command, args, names", WRONG, ids=[f"{c}-{n}" for c, _, n in WRONG])
def test_a_mistake_gives_one_line_and_exit_code_2(folder, command, args, names):
    (folder / "big.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "model": {
                    "type": "BPE",
                    "vocab": {"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, 400)},
                    "merges": [],
                },
            }
        )
    )
    (folder / "broken.py").write_text("def get_config(:")
    (folder / "empty.py").write_text("")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 100)
    (folder / "notrun").mkdir(exist_ok=True)
    (folder / "notrun" / "config.json").write_text('{"steps": "x"')
    assert names in complaint(call(command, *args.format(f=folder).split()))
    assert not (folder / "w").exists()


@pytest.mark.parametrize(
    "command, args, names",
    [
        ("train", "--config={f}/config.py --workdir=gs://bucket/run", "gs://bucket/run: the bucket is out of reach"),
        ("evaluate", "--workdir={f}/small --config.data.path=gs://bucket/x", "data.path = 'gs://bucket/x': "),
        ("report", "--runs=a=gs://bucket/run", "gs://bucket/run: the bucket is out of reach"),
    ],
    ids=["train", "evaluate", "report"],
)
def test_a_bucket_out_of_reach_gives_one_line_and_exit_code_2(folder, command, args, names):
    pytest.importorskip("gcsfs")
    nobody = {"STORAGE_EMULATOR_HOST": "http://localhost:1", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    assert names in complaint(call(command, *args.format(f=folder).split(), bucket_pauses=False, **nobody))
