"""Laws of evaluation configs: any model on any data set, by settings that are all checked and all written down."""

import dataclasses
import json
import math

import pytest

from configs import zero_shot
from tests.helpers import scoring_run, write_corpus
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.perplexity import evaluate_split
from tokenformer_jax.evaluation.report import task_table
from tokenformer_jax.evaluation.settings import applied, read_eval_config
from tokenformer_jax.evaluation.suite import evaluate_all


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_corpus(folder / "one", seed=1)
    write_corpus(folder / "two", seed=2)
    run = scoring_run()
    data = dataclasses.replace(run.cfg.data, cache_dir=str(folder / "cache"))
    return folder, dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, data=data))


def settings(**given):
    return read_eval_config(zero_shot.get_config().to_dict() | given)


def text(path, split="train"):
    return zero_shot.data_set("text_files", split) | {"path": str(path)}


def test_several_data_sets_in_one_run(home, capsys):
    folder, run = home
    asked = settings(datasets={"one": text(folder / "one"), "two": text(folder / "two", "validation")})
    evaluate_all(run, asked, folder, "validation")
    found = json.loads((folder / "eval.json").read_text())
    for name, split in (("one", "train"), ("two", "validation")):
        data = dataclasses.replace(
            run.cfg.data, dataset="text_files", path=str(folder / name), train_split=split, validation_split=split
        )
        tokens = prepare(dataclasses.replace(run.cfg, data=data), run.tokenizer).validation
        expected = evaluate_split(run.step, run.state, tokens, run.cfg)
        assert found["datasets"][name] == pytest.approx(expected, rel=1e-6)
        nats = expected["loss"] * expected["tokens"]
        assert expected["bits_per_byte"] == pytest.approx(nats / math.log(2) / tokens.num_bytes)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["data", "one", "two"]
    assert found["settings"]["batch_size"] == 8 and found["settings"]["context_length"] == 64
    assert found["settings"]["datasets"]["two"]["split"] == "validation"


def test_stride_context_batch_and_dtype_are_used(home):
    folder, run = home
    data = {"one": text(folder / "one", "validation")}

    def loss(**given):
        evaluate_all(run, settings(datasets=data, **given), folder, "validation")
        return json.loads((folder / "eval.json").read_text())["datasets"]["one"]

    plain = loss()
    assert loss(batch_size=16)["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert loss(stride=16)["loss"] != plain["loss"] != loss(context_length=32)["loss"]
    assert loss(stride=16)["tokens"] == loss(context_length=32)["tokens"] == plain["tokens"]
    rounded = loss(dtype="bfloat16")["loss"]
    assert rounded == pytest.approx(plain["loss"], rel=0.02) and rounded != plain["loss"]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"context_length": 65}, "config.context_length = 65: the model was trained on 64"),
        ({"stride": 65}, "config.stride = 65"),
        ({"context_length": 32, "stride": 33}, "windows of 32"),
        ({"limit": -1.0}, "config.limit = -1.0: must be 0 or above"),
        ({"dtype": "float16"}, "config.dtype = 'float16'"),
        ({"datasets": {"x": {"dataset": "lm1b"}}}, "config.datasets.x: key 'split' is missing"),
        ({"datasets": {"x": text("y") | {"pth": ""}}}, "config.datasets.x: unknown key 'pth'; did you mean 'path'"),
        ({"task": "piqa"}, "config: unknown key 'task'; did you mean 'tasks'"),
        ({"data": {"path": "x", "cache_dir": ""}}, "--config.data.path=x: python_source"),
    ],
)
def test_what_does_not_fit_is_named(home, given, message):
    with pytest.raises(UserError) as error:
        applied(home[1], settings(**given))
    assert message in str(error.value)


def test_a_report_shows_tasks_beside_each_other(tmp_path):
    def write(name, step, **tasks):
        (tmp_path / name).mkdir()
        metrics = {task: {"metrics": {metric: {"value": v, "stderr": e}}} for task, (metric, v, e) in tasks.items()}
        (tmp_path / name / "eval.json").write_text(json.dumps({"step": step, "tasks": metrics}))

    write("a", 600, cloze=("acc", 0.25, 0.01), text=("bits_per_byte", 1.5, None))
    write("b", 1200, cloze=("acc", 0.5, 0.02))
    (tmp_path / "c").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "eval.json").write_text('{"loss": 3.0, "step": 1}')
    lines = task_table({name: tmp_path / name for name in "abcd"}).splitlines()
    assert [line.split() for line in lines] == [
        ["run", "step", "cloze", "text"],
        ["a", "600", "0.250", "±", "0.010", "bits_per_byte", "1.5"],
        ["b", "1,200", "0.500", "±", "0.020"],
    ]
    assert task_table({"c": tmp_path / "c"}) == ""
