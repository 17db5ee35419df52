"""Laws of the adapter to lm-evaluation-harness, and the faults that such adapters are known for."""

import dataclasses
import json
import math
import os
import random
import subprocess

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from configs import zero_shot as preset
from tests.commands import ROOT
from tests.harness_tasks import TASKS, sentence, write_tasks
from tests.helpers import corpus_overrides, scoring_run, tiny_config
from tokenformer_jax.data.tokens import InMemory, TokenSplit
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation import zero_shot
from tokenformer_jax.evaluation.harness import HarnessModel
from tokenformer_jax.evaluation.perplexity import evaluate_split
from tokenformer_jax.evaluation.scoring import Scored, Scorer
from tokenformer_jax.evaluation.settings import read_eval_config
from tokenformer_jax.evaluation.suite import evaluate_all
from tokenformer_jax.running.loop import train

CONTEXT = 64


@pytest.fixture(scope="module")
def run():
    return scoring_run()


@pytest.fixture(scope="module")
def model(run):
    return HarnessModel(Scorer(run))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The folder of small tasks, and their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    return folder, write_tasks(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def ask(model, kind, *arguments):
    return getattr(model, kind)([Instance(kind, {}, args, 0) for args in arguments])


def settings(**given):
    return read_eval_config(preset.get_config().to_dict() | given)


def of_ids(run, context_ids, rest_ids):
    """The score of ids, by the scorer, whose own tests compare it with the model's logits."""
    return Scorer(run).score([Scored([*context_ids, *rest_ids], len(rest_ids))])[0].log_likelihood


# log-likelihoods


def test_a_pair_is_scored_by_the_ids_of_both_together(model, run):
    encode = run.tokenizer.encode
    pairs = [("key value", " query"), ("grow", " the layer norm"), ("head ", "scale"), ("token \n", " x")]
    for (context, rest), (total, greedy) in zip(pairs, ask(model, "loglikelihood", *pairs), strict=True):
        head = encode(context.rstrip())
        ids = encode(context + rest)
        assert ids[: len(head)] == head
        assert total == pytest.approx(of_ids(run, head, ids[len(head) :]), rel=1e-5)
        assert isinstance(greedy, bool)


def test_a_token_that_spans_the_join_is_the_continuations(model, run):
    """The context alone has as many tokens as the whole: cut by its count, nothing would be left to score."""
    encode = run.tokenizer.encode
    context, rest = "value atten", "tion"
    ids, head = encode(context + rest), encode(context)
    assert len(ids) <= len(head)
    shared = sum(a == b for a, b in zip(ids, head, strict=False))
    (total, _), (whole, _) = ask(model, "loglikelihood", (context, rest), ("", "attention"))
    assert total == pytest.approx(of_ids(run, ids[:shared], ids[shared:]), rel=1e-5)
    assert whole == pytest.approx(of_ids(run, [0], encode("attention")), rel=1e-5)


def test_a_text_after_nothing_scores_minus_its_loss(model, run):
    for text in ("key value query", "x", sentence(random.Random(1), 30)):
        ids = [run.tokenizer.end_of_text, *run.tokenizer.encode(text)]
        assert len(ids) <= CONTEXT
        figures = evaluate_split(run.step, run.state, TokenSplit([InMemory(np.array(ids))], 1, 1, 0, "x"), run.cfg)
        pairs = ask(model, "loglikelihood", ("", text), ("  ", text))
        assert -pairs[0][0] == pytest.approx(figures["loss"] * (len(ids) - 1), rel=1e-5)
        assert pairs[1][0] == pytest.approx(of_ids(run, [0], run.tokenizer.encode("  " + text)), rel=1e-5)
        (rolling,) = ask(model, "loglikelihood_rolling", (text,))
        assert -rolling == pytest.approx(figures["loss"] * (len(ids) - 1), rel=1e-5)


def test_nothing_to_score_scores_nothing(model):
    assert ask(model, "loglikelihood", ("key", ""), ("", "")) == [(0.0, True), (0.0, True)]
    assert ask(model, "loglikelihood_rolling", ("",)) == [0.0]
    assert ask(model, "loglikelihood") == ask(model, "generate_until") == []


def test_rolling_windows_predict_every_token_once(model, run):
    text = sentence(random.Random(2), 100)
    ids = run.tokenizer.encode(text)
    assert len(ids) > 1.5 * CONTEXT
    total = of_ids(run, [0], ids[:CONTEXT])
    for begin in range(CONTEXT, len(ids), CONTEXT):  # the last window sees as many ids as fit before its end
        end = min(begin + CONTEXT, len(ids))
        total += of_ids(run, ids[end - CONTEXT - 1 : begin], ids[begin:end])
    assert ask(model, "loglikelihood_rolling", (text,))[0] == pytest.approx(total, rel=1e-5)


def test_text_that_spells_a_special_token_is_text(model, run):
    (spelled, _), (nothing, _) = ask(model, "loglikelihood", ("<|endoftext|>", " key"), ("", " key"))
    assert len(run.tokenizer.encode("<|endoftext|>")) > 1 and spelled != nothing


# Greedy text


def answers(model, prompt, **settings):
    return ask(model, "generate_until", (prompt, settings))[0]


def test_an_answer_ends_before_the_first_stop(model):
    whole = answers(model, "key", until=[], max_gen_toks=30)
    assert len(whole) > 12
    assert answers(model, "key", until=whole[6:9], max_gen_toks=30) == whole[: whole.index(whole[6:9])]
    early, late = whole[3:6], whole[8:10]
    cut = min(whole.index(early), whole.index(late))
    assert answers(model, "key", until=[late, early, "", "never"], max_gen_toks=30) == whole[:cut]


def test_a_stop_may_span_tokens(model, run):
    whole, stop = answers(model, "key value", until=[], max_gen_toks=30), "m attent"
    assert stop in whole and not any(stop in run.tokenizer.decode([i]) for i in range(run.tokenizer.vocab_size))
    assert answers(model, "key value", until=[stop], max_gen_toks=30) == whole[: whole.index(stop)]


def test_prompts_near_the_contexts_end_keep_their_own_end(model, run):
    long = sentence(random.Random(3), 80)
    ids = run.tokenizer.encode(long)
    assert len(ids) > CONTEXT
    kept = run.tokenizer.decode(ids[-(CONTEXT - 10) :])
    assert run.tokenizer.encode(kept) == ids[-(CONTEXT - 10) :]
    both = ask(model, "generate_until", (long, {"max_gen_toks": 10}), (kept, {"max_gen_toks": 10}))
    assert both[0] == both[1] != ""
    assert answers(model, long, max_gen_toks=1000) != ""  # more than the context: half of it


def test_an_empty_prompt_is_an_end_of_text(model):
    assert answers(model, "", max_gen_toks=5) != ""


def test_samples_are_drawn_where_a_task_asks(model):
    drawn = answers(model, "key", max_gen_toks=20, do_sample=True, temperature=1.0, top_k=50)
    assert drawn != answers(model, "key", max_gen_toks=20)
    with pytest.raises(UserError, match="generation_kwargs: num_beams"):
        answers(model, "key", num_beams=4)


# Tasks


def test_tasks_of_all_kinds_give_the_figures_of_their_requests(run, model, tasks, tmp_path):
    folder, documents = tasks
    evaluate_all(run, settings(tasks=",".join(TASKS), include_path=str(folder)), tmp_path, "validation")
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["fingerprint"] == run.fingerprint and found["settings"]["tasks"] == ",".join(TASKS)
    value = {
        name: {metric: figure["value"] for metric, figure in task["metrics"].items()}
        for name, task in found["tasks"].items()
    }
    last = [tuple(document["text"].rsplit(" ", 1)) for document in documents["last_word"]]
    scores = ask(model, "loglikelihood", *((head, f" {word}") for head, word in last))
    assert value["last_word"]["acc"] == pytest.approx(np.mean([greedy for _, greedy in scores]))
    assert value["last_word"]["perplexity"] == pytest.approx(math.exp(-np.mean([total for total, _ in scores])))
    right, right_norm = [], []
    for document in documents["choice"]:
        choices = document["choices"]
        totals = [total for total, _ in ask(model, "loglikelihood", *((document["text"], f" {c}") for c in choices))]
        right.append(np.argmax(totals) == document["label"])
        right_norm.append(np.argmax(np.array(totals) / [len(c) for c in choices]) == document["label"])
    assert value["choice"] == pytest.approx({"acc": np.mean(right), "acc_norm": np.mean(right_norm)})
    error = found["tasks"]["choice"]["metrics"]["acc"]["stderr"]
    assert error == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    texts = [document["text"] for document in documents["rolling"]]
    nats = -sum(ask(model, "loglikelihood_rolling", *((text,) for text in texts)))
    assert value["rolling"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(map(len, texts)))
    assert value["answer"]["exact_match"] == 0
    assert {task["samples"] for task in found["tasks"].values()} == {6}
    assert all(task["version"] == 1 and task["num_fewshot"] == 0 for task in found["tasks"].values())


def test_groups_and_patterns_of_tasks(run, tasks, tmp_path):
    folder, _ = tasks
    head = "group: pair\ntask: [choice, last_word]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tmp_path / "pair.yaml").write_text(f"{head}metadata: {{version: 2.0}}\n")
    for name in ("choice", "last_word", "rolling"):
        (tmp_path / f"{name}.yaml").write_text((folder / f"{name}.yaml").read_text())
    found = zero_shot.run_tasks(Scorer(run), settings(tasks="pair,roll*", include_path=str(tmp_path)))
    figures = zero_shot.task_figures(found)
    assert set(figures) == {"pair", "choice", "last_word", "rolling"}
    value = {name: figures[name]["metrics"]["acc"]["value"] for name in ("pair", "choice", "last_word")}
    assert value["pair"] == pytest.approx((value["choice"] + value["last_word"]) / 2)


def test_limit_and_fewshot_reach_the_harness(run, tasks, monkeypatch):
    folder, _ = tasks
    asked = []
    monkeypatch.setattr(HarnessModel, "loglikelihood", lambda self, r: asked.extend(r) or [(0.0, True)] * len(r))
    found = zero_shot.run_tasks(Scorer(run), settings(tasks="choice", include_path=str(folder), limit=2.0))
    assert len(asked) == 8 and found["n-samples"]["choice"]["effective"] == 2
    plain = [request.args[0] for request in asked]
    asked.clear()
    two = settings(tasks=str(folder / "choice.yaml"), limit=2.0, num_fewshot=2)
    assert zero_shot.run_tasks(Scorer(run), two)["n-shot"]["choice"] == 2
    for before, request in zip(plain, asked, strict=True):
        assert request.args[0].endswith(f"\n\n{before}") and request.args[0].count("\n\n") == 2


@pytest.mark.parametrize(
    "given, message",
    [
        ({"tasks": "last_wrod"}, "--tasks=last_wrod: no such task; did you mean 'last_word'"),
        ({"tasks": "last_word", "include_path": "{f}/none"}, "config.include_path"),
        ({"tasks": "missing"}, "--tasks=missing: cannot be loaded"),
    ],
)
def test_a_mistake_is_named(run, tasks, given, message, monkeypatch):
    folder, _ = tasks
    (folder / "missing.yaml").write_text((folder / "choice.yaml").read_text().replace("choice", "missing", 2))
    from lm_eval import tasks as harness

    whole = harness.TaskManager  # of which only the project's tasks are read: those of the harness take seconds
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, **_: whole(None, include_path, False))
    given = {"include_path": str(folder)} | {key: value.format(f=folder) for key, value in given.items()}
    with pytest.raises(UserError) as error:
        zero_shot.run_tasks(Scorer(run), settings(**given))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_harness_is_one_line(monkeypatch, run, tmp_path):
    def missing(name):
        raise zero_shot.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(zero_shot.importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"has no lm_eval.*pip install"):
        evaluate_all(run, settings(tasks="last_word"), tmp_path, "validation")


# The harness' own command


def test_a_cache_of_answers_belongs_to_one_model(run, tmp_path):
    model = HarnessModel(Scorer(run))
    cached = CachingLM(model, str(tmp_path / "cache.db"))
    requests = [Instance("loglikelihood", {}, ("key", " value"), 0)]
    first = cached.loglikelihood(requests)
    model.loglikelihood = None  # what is kept is not computed again
    assert CachingLM(model, str(tmp_path / "cache.db")).loglikelihood(requests) == first
    norm = run.state.params["norm_scale"]
    other = dataclasses.replace(run, state=run.state._replace(params=run.state.params | {"norm_scale": 2 * norm}))
    assert other.fingerprint != run.fingerprint
    with pytest.raises(UserError, match="--use_cache: holds the answers of another model"):
        CachingLM(HarnessModel(Scorer(other)), str(tmp_path / "cache.db"))


def test_the_fingerprint_of_a_model_is_the_same_on_any_mesh(run):
    assert scoring_run(mesh__fsdp=4, mesh__tensor=2).fingerprint == run.fingerprint


@pytest.mark.parametrize(
    "arguments, batch_size, message",
    [
        ("workdir=W,steps=3", 1, "--model_args steps=…: unknown; did you mean 'step'"),
        ("step=3", 1, "use --model_args workdir=W"),
        ("workdir=W", "many", "--batch_size many"),
        ("workdir=not/here", "auto", "not/here/config.json: not found"),
    ],
)
def test_wrong_arguments_of_the_harness_command_are_named(arguments, batch_size, message):
    with pytest.raises(UserError) as error:
        HarnessModel.create_from_arg_string(arguments, {"batch_size": batch_size, "device": None})
    assert message in str(error.value)


@pytest.mark.slow
def test_two_processes_and_the_harness_command_give_what_one_process_does(tasks, tmp_path):
    """Half a minute each for their imports and programs."""
    folder, _ = tasks
    train(tiny_config(model__context_length=64, **corpus_overrides(tmp_path)), tmp_path / "run")
    asked = [f"--workdir={tmp_path}/run", f"--tasks={','.join(TASKS)}", f"--include_path={folder}"]

    def figures(name, *command):
        flags = "--xla_force_host_platform_device_count=1"
        environment = os.environ | {"XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout if name is None else json.loads((tmp_path / name).read_text())["tasks"]

    evaluate = "python", "-m", "tokenformer_jax.evaluate", *asked
    one = figures("one.json", *evaluate, f"--out={tmp_path}/one.json")
    pod = "bash", "launch/local_pod.sh", "2", *evaluate, "--mesh=1,2,1", f"--out={tmp_path}/two.json"
    two = figures("two.json", *pod)
    model = "--model", "tokenformer", "--model_args", f"workdir={tmp_path}/run", "--batch_size", "8"
    which = "--tasks", ",".join(TASKS), "--include_path", str(folder)
    table = figures(None, "python", "-m", "tokenformer_jax.lm_eval", *model, *which)
    for task, found in one.items():
        for metric, figure in found["metrics"].items():
            assert two[task]["metrics"][metric]["value"] == pytest.approx(figure["value"], rel=1e-5)
            assert f"{figure['value']:.4f}" in table
