"""The harness' own backend on an exported folder and ours on its workdir say the same, request by request."""

import importlib.util

import jax
import numpy as np
import pytest

from benchmarks.python_tasks import make_tasks
from tests.commands import ROOT
from tests.harness_tasks import TASKS, write_tasks
from tests.helpers import corpus_overrides, tiny_config
from tokenformer_jax.nn.language import init_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.hub_format import export_hub
from tokenformer_jax.storage.official import make_workdir
from tokenformer_jax.storage.trained import load_trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("lm_eval", "transformers", "accelerate"))),
        reason="needs lm_eval, transformers and accelerate",
    ),
]
MODELS = {
    "a tanh gelu and a τ on its way": {"gelu": "tanh", "num_heads": 2, "rotary_fraction": 1.0, "tau": {"ffn": 12.5}},
    "padding, and rows that are no ids": {"vocab_size": 500, "context_length": 160, "pad_tokens_to": 16},
    "softmax": {"normalizer": "softmax", "num_layers": 1, "context_length": 192},
}
SHOTS = dict.fromkeys(TASKS, (0, 2)) | {f"python_{name}": (0,) for name in ("last_word", "next_line", "name")}
MOST = 16  # documents of a task


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of tasks of all kinds of request; many texts are longer than the models' context."""
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, count=MOST)
    make_tasks([path.read_text() for path in sorted(ROOT.glob("tokenformer_jax/*.py"))], folder)
    return folder


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path_factory):
    """Keeps what the libraries store out of the home folder."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", base / "datasets")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(base / "modules"))
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def answers(model, tasks, shots):
    """What a backend answers, by task and document."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    names = [name for name, of_task in SHOTS.items() if shots in of_task]
    loaded = TaskManager(include_path=tasks, include_defaults=False).load(names)
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=1)
    found = evaluate(model, loaded, limit=MOST, bootstrap_iters=0, log_samples=True)
    return {
        name: {sample["doc_id"]: (sample["arguments"], sample["filtered_resps"]) for sample in samples}
        for name, samples in found["samples"].items()
    }


@pytest.mark.filterwarnings("ignore")  # of libraries that are not ours
@pytest.mark.parametrize("name", MODELS)
def test_both_backends_answer_alike(tmp_path, tasks, name):
    from lm_eval.models.huggingface import HFLM

    from tokenformer_jax.evaluation.harness import HarnessModel
    from tokenformer_jax.evaluation.scoring import Scorer

    model = {"context_length": 128} | MODELS[name]
    tau = model.pop("tau", {})
    cfg = tiny_config(**corpus_overrides(tmp_path), **{f"model__{key}": value for key, value in model.items()})
    params = jax.tree.map(lambda leaf: 3 * leaf, init_params(cfg.model, jax.random.key(1)))  # far from even odds
    make_workdir(params, initial_tau(cfg.model) | tau, cfg, tmp_path / "W")
    export_hub(tmp_path / "W", tmp_path / "out")
    ours = HarnessModel(Scorer(load_trained(tmp_path / "W")))
    theirs = HFLM(str(tmp_path / "out"), trust_remote_code=True, dtype="float32", device="cpu", batch_size=3)
    assert theirs.max_length == ours.max_length and theirs.prefix_token_id == ours.eot_token_id
    for shots in (0, 2):
        found, expected = answers(ours, tasks, shots), answers(theirs, tasks, shots)
        assert found.keys() == expected.keys() == {name for name in SHOTS if shots in SHOTS[name]}
        for task in found:
            assert found[task].keys() == expected[task].keys() and len(found[task]) == MOST
            for document, (arguments, answer) in found[task].items():
                assert arguments == expected[task][document][0]
                compare(answer, expected[task][document][1])


def compare(ours, theirs):
    """Log-likelihoods within 1e-4, and all else the same."""
    if isinstance(ours, tuple | list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            compare(mine, other)
    elif isinstance(ours, float):
        assert np.isfinite(ours)
        assert ours == pytest.approx(theirs, abs=1e-4, rel=2e-7)  # of -1,850 nats, 1e-4 is less than float32 can tell
    else:
        assert ours == theirs
