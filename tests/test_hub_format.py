"""Models go out as the folder that transformers loads, and come back bit for bit."""

import ast
import dataclasses
import json
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.commands import call, call_well, complaint
from tests.helpers import assert_trees_equal, corpus_overrides, step_of, tiny_config, tiny_linear_config
from tokenformer_jax.data.batches import train_batches
from tokenformer_jax.data.tokens import prepare
from tokenformer_jax.devices.sharding import this_process
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.perplexity import evaluate_run
from tokenformer_jax.nn.language import init_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.card import model_card
from tokenformer_jax.storage.checkpoints import save_one
from tokenformer_jax.storage.hub import import_published, read_published
from tokenformer_jax.storage.hub_format import export_hub, modelling_code
from tokenformer_jax.storage.official import from_official, make_workdir
from tokenformer_jax.storage.record import Record
from tokenformer_jax.storage.state_dicts import read_state_dict, write_state_dict
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.state import TauRamp

pytestmark = pytest.mark.usefixtures("steps_are_shared")
GROWTH = {
    "step": 3,
    "from": {"query": 24, "key": 24, "value": 24, "out": 40, "ffn": 96},
    "to": {"query": 30, "key": 30, "value": 30, "out": 40, "ffn": 150},
    "recipe": "zero_keys",
    "loss_before": 5.25,
    "loss_after": 5.250001,
}
FILES = (
    "README.md config.json generation_config.json model.safetensors modeling_tokenformer.py tokenizer.json "
    "tokenizer_config.json"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """What makes a config read a corpus, whose tokenizer finds fewer ids than the model has rows for."""
    return corpus_overrides(tmp_path_factory.mktemp("format")) | {"model__vocab_size": 400}


@pytest.fixture(scope="module")
def grown(tmp_path_factory, corpus):
    """A run at step 4, in the middle of the ramp after a growth, and its folder."""
    folder = tmp_path_factory.mktemp("grown")
    cfg = tiny_config(**corpus, model__qkv_tokens=30, model__ffn_tokens=150)
    step, data = step_of(cfg), prepare(cfg)
    ramps = {
        name: TauRamp(*map(jnp.float32, (np.sqrt(n), np.sqrt(n) + 1)), *map(jnp.int32, (3, 7)))
        for name, n in cfg.model.tokens.items()
    }
    state = step.init(jax.random.key(0))._replace(step=jnp.int32(4), tau=ramps)
    record = Record(
        dataclasses.asdict(cfg.model), "none", cfg.batch_size, tokens=512, train_flops=1.5e9, growth=[GROWTH]
    )
    batches = train_batches(data.train, cfg, **this_process(step.mesh))
    save_one(folder / "W" / "checkpoints", 4, state, batches, data.assets, record)
    (folder / "W" / "config.json").write_text(cfg.to_json())
    assert export_hub(folder / "W", folder / "out") == (4, 48704)
    return folder


def workdir(path, corpus, tau=None, **model):
    """A run with a model of random weights and the τ of these projections."""
    cfg = tiny_config(**corpus, **{f"model__{key}": value for key, value in model.items()})
    params = init_params(cfg.model, jax.random.key(1))
    make_workdir(params, initial_tau(cfg.model) | (tau or {}), cfg, path)
    return path


def back(folder, path, corpus):
    """Makes a workdir of a folder, with data that the tests have."""
    found = read_published(str(folder))
    cfg = found.config(found.known)
    data = {key.removeprefix("data__"): value for key, value in corpus.items() if key.startswith("data__")}
    import_published(found, dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **data)), path, None)
    return load_trained(path)


def texts(folder):
    """The folder's files, but for the card."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def test_a_grown_model_comes_back_bit_for_bit_with_its_tau(grown, corpus, tmp_path):
    run = load_trained(grown / "W")
    tau = {name: float(value) for name, value in run.state.tau_now().items()}
    assert tau["ffn"] == pytest.approx(np.sqrt(150) + 0.25)
    again = back(grown / "out", tmp_path / "W", corpus)
    assert_trees_equal(again.state.params, run.state.params)
    assert_trees_equal(again.state.tau_now(), run.state.tau_now())
    assert again.tokenizer.to_json() == run.tokenizer.to_json()
    assert again.cfg.model == run.cfg.model
    export_hub(tmp_path / "W", tmp_path / "out")
    assert texts(tmp_path / "out") == texts(grown / "out")


@pytest.mark.parametrize(
    "model",
    [
        {"normalizer": "softmax", "rotary_fraction": 1.0, "num_heads": 2},
        {"normalizer": "gelu_l2_norm", "gelu": "tanh", "pad_tokens_to": 16, "tau_tokens": 9, "tau": {"key": 3.3}},
    ],
    ids=str,
)
def test_all_of_a_model_is_in_its_folder(corpus, tmp_path, model):
    run = load_trained(workdir(tmp_path / "W", corpus, **model))
    export_hub(tmp_path / "W", tmp_path / "out")
    found = read_published(str(tmp_path / "out"))
    assert_trees_equal(from_official(found.arrays), run.state.params)
    assert_trees_equal(found.tau, jax.tree.map(float, run.state.tau_now()))
    assert found.config(found.known).model == run.cfg.model


def test_the_folder_is_whole_and_may_be_read(grown):
    assert sorted(path.name for path in (grown / "out").iterdir()) == FILES
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o444 for path in (grown / "out").iterdir()}
    assert modes == {stat.S_IMODE((grown / "out").stat().st_mode) & 0o444}
    config = json.loads((grown / "out" / "config.json").read_text())
    assert not {"dropout", "remat", "stochastic_depth"} & set(config) and config["dtype"] == "float32"
    ids = load_trained(grown / "W").tokenizer.vocab_size
    never = json.loads((grown / "out" / "generation_config.json").read_text())["suppress_tokens"]
    assert 256 < ids < 400 and never == list(range(ids, 400))


def test_the_modelling_file_needs_no_other_of_ours():
    tree = ast.parse(modelling_code())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {
        *("collections", "functools", "math", "os", "safetensors", "torch", "transformers", "typing")
    }
    assert {"Layers", "TokenFormerForCausalLM"} <= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_card_says_what_the_workdir_knows(grown, corpus, tmp_path, capsys):
    run = load_trained(grown / "W")
    card = (grown / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# out\n" in card
    assert "| tokens | 512, " in card and "| FLOPs | 1.5e+09, " in card
    assert "| data | text_files (text), split train; " in card
    after = "query 30, key 30, value 30, out 40, ffn 150"
    assert f"| 3 | query 24, key 24, value 24, out 40, ffn 96 | {after} | zero_keys | 5.2500 | 5.2500 |" in card
    assert "a growth holds them, or ramps them still" in card
    assert "None of this checkpoint." in card and str(grown) not in card
    evaluate_run(run, grown / "W", "validation")
    figures = json.loads((grown / "W" / "eval.json").read_text())
    export_hub(grown / "W", tmp_path / "evaluated")
    card = (tmp_path / "evaluated" / "README.md").read_text()
    assert f"| validation split | {figures['loss']:.6g} | {figures['perplexity']:.6g} | " in card
    lambada = {"acc": {"value": 0.25, "stderr": 0.125}, "perplexity": {"value": 16.5, "stderr": None}}
    found = {
        "step": 4,
        "datasets": {"wikitext": {"loss": 3.5, "perplexity": 33.1, "bits_per_byte": 1.25, "tokens": 1000.0}},
        "tasks": {"lambada": {"version": 1.0, "num_fewshot": 0, "samples": 12, "metrics": lambada}},
        "settings": {"path": "/private"},
    }
    (grown / "W" / "eval.json").write_text(json.dumps(found))
    card = model_card("name", run, grown / "W")
    assert "| wikitext | 3.5 | 33.1 | 1.25 | 1000 |" in card and "/private" not in card
    assert "| lambada | 1.0 | 0 | 12 | acc | 0.25 | 0.125 |\n| lambada | 1.0 | 0 | 12 | perplexity | 16.5 |  |" in card
    for text in ("{", "[]", '{"step": 4, "tasks": {"x": 1}}', '{"step": 3, "loss": 1.0}'):
        (grown / "W" / "eval.json").write_text(text)
        assert "None of this checkpoint." in model_card("name", run, grown / "W")
    workdir(tmp_path / "new", corpus)
    export_hub(tmp_path / "new", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "None that the workdir knows of" in card and "ramps them still" not in card
    old = dataclasses.replace(run, record=dataclasses.replace(run.record, growth=[]))
    assert "It never grew." in model_card("old", old, grown / "W")


@pytest.mark.slow
def test_the_command_writes_a_folder_and_reads_it(grown, tmp_path):
    said = call_well("convert", f"--to_hub_format={tmp_path}/out", f"--workdir={grown}/W", "--step=4")
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path}/out', trust_remote_code=True)" in said
    assert texts(tmp_path / "out") == texts(grown / "out")
    taken = call("convert", f"--to_hub_format={tmp_path}/out", f"--workdir={grown}/W")
    assert f"--to_hub_format={tmp_path}/out: holds something already" in complaint(taken)
    both = call("convert", f"--to_hub_format={tmp_path}/x", f"--from_hub={tmp_path}/out", f"--workdir={grown}/W")
    assert "--from_torch, --from_hub, --to_torch, --to_hub_format: give one of them" in complaint(both)
    other = call("convert", f"--from_hub={tmp_path}/out", f"--workdir={tmp_path}/w", "--num_heads=2")
    assert f"{tmp_path}/out: does not fit the config, which has model.num_heads = 2 for the file's 4" in complaint(
        other
    )
    assert not (tmp_path / "w").exists() and not (tmp_path / "x").exists()


def test_a_folder_whose_config_and_tensors_differ_is_refused(grown, corpus, tmp_path):
    export_hub(grown / "W", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for key, value, said in (
        ("ffn_tokens", 96, "model.ffn_tokens = 96 asks for 96, its tensors have 150"),
        ("pad_tokens_to", 16, "model.qkv_tokens = 30 with model.pad_tokens_to = 16 asks for 32, its tensors have 30"),
        ("num_heads", "4", "model.num_heads = '4': must be of type int, not str"),
        ("normalizer", "l3", "model.normalizer = 'l3': must be one of"),
    ):
        path.write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError) as error:
            back(tmp_path / "out", tmp_path / "W", corpus)
        assert said in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "W").exists()


def test_models_that_cannot_go_out_leave_nothing(corpus, tmp_path):
    (tmp_path / "config.json").write_text(tiny_linear_config().to_json())
    with pytest.raises(UserError, match=r"model\.projection = 'linear'"):
        export_hub(tmp_path, tmp_path / "out")
    workdir(tmp_path / "W", corpus, tau={"ffn": 3.0})
    cfg = tiny_config(**corpus)
    params = init_params(cfg.model, jax.random.key(1))
    make_workdir(params | {"norm_bias": params["norm_bias"] * np.nan}, initial_tau(cfg.model), cfg, tmp_path / "broken")
    with pytest.raises(UserError, match=r"the model is broken: NaN or infinities in sequential\.5\.norm\.bias"):
        export_hub(tmp_path / "broken", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--to_hub_format=.*file: holds something already"):
        export_hub(tmp_path / "W", tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        export_hub(tmp_path / "W", tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))


def test_a_written_file_may_be_read_by_those_who_may_read_its_folder(tmp_path):
    for mode in (0o755, 0o700):
        tmp_path.chmod(mode)
        write_state_dict(tmp_path / "model.safetensors", {"x": np.ones(2, np.float32)})
        assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode & 0o666
    assert read_state_dict(tmp_path / "model.safetensors")["x"].tolist() == [1, 1]
