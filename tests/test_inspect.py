"""Laws of contributions: they are their definition, on any mesh; and what inspect and shrink make of them."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
from scipy.special import erf

from tests.commands import call, call_well, complaint
from tests.helpers import (
    assert_trees_equal,
    corpus_overrides,
    image_config,
    random_images,
    step_of,
    tiny_config,
    tiny_linear_config,
    write_config,
)
from tests.test_training_semantics import block
from tokenformer_jax import TokenFormer, UserError
from tokenformer_jax.data.tokens import InMemory, TokenSplit
from tokenformer_jax.evaluation import inspection
from tokenformer_jax.evaluation.contributions import Measured, batch_sums, contributions, open_text
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.shrink import shrink
from tokenformer_jax.nn.language import init_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.trained import PutOn, load_trained
from tokenformer_jax.training.state import new_state
from tokenformer_jax.training.tasks import task_of

pytestmark = pytest.mark.usefixtures("steps_are_shared")

ODD = {"model__qkv_tokens": 21, "model__out_tokens": 37, "model__ffn_tokens": 93, "model__pad_tokens_to": 8}
EIGHT = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
SPLIT = TokenSplit([InMemory(np.random.default_rng(0).integers(1, 300, 200))], 200, 1, 0, "random")  # 13 windows


def state_of(cfg):
    """Larger weights than at birth, so that scores are anything but alike; padding keeps its zero keys."""
    params = jax.tree.map(lambda x: 5 * x, init_params(cfg.model, jax.random.key(1)))
    shardings = jax.tree.map(lambda a: a.sharding, step_of(cfg).abstract_state._replace(opt_state=()))
    return jax.device_put(new_state(params, (), initial_tau(cfg.model)), shardings)


@functools.cache
def measure(**overrides):
    cfg = tiny_config(**overrides)
    return contributions(step_of(cfg), state_of(cfg), SPLIT, cfg)


THETAS = {
    "l2_norm_gelu": lambda s, tau: gelu(tau * s / np.linalg.norm(s, axis=-1, keepdims=True)),
    "gelu_l2_norm": lambda s, tau: tau * gelu(s) / np.linalg.norm(gelu(s), axis=-1, keepdims=True),
    "softmax": lambda s, tau: tau**2 * np.exp(s) / np.exp(s).sum(-1, keepdims=True),
}


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def in_float64(cfg):
    """The mean of |Θ|·‖v‖ over the positions that predict a token, by the definition."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), state_of(cfg).params)
    means = {name: np.zeros(tokens["keys"].shape[:2]) for name, tokens in params["blocks"].items()}
    for batch in task_of(cfg).eval_batches(SPLIT, cfg, step_of(cfg).mesh, cfg.batch_size):
        x_BLD = params["embed"][batch.tokens_BL]
        for layer in range(cfg.model.num_layers):

            def project(name, x_BLD, layer=layer, weights_BL=batch.weights_BL):
                keys_ND, values_NE = (params["blocks"][name][kind][layer] for kind in ("keys", "values"))
                theta_BLN = THETAS[cfg.model.normalizer](x_BLD @ keys_ND.T, initial_tau(cfg.model)[name])
                sums_N = np.einsum("bln,bl->n", abs(theta_BLN), weights_BL)
                means[name][layer] += sums_N * np.linalg.norm(values_NE, axis=-1) / (SPLIT.num_tokens - 1)
                return theta_BLN @ values_NE, None

            x_BLD, _ = block(x_BLD, project, cfg.model.num_heads, int(cfg.model.rotary_fraction * cfg.model.head_dim))
    return means


@pytest.mark.parametrize(
    "overrides",
    [{}, {"model__normalizer": "gelu_l2_norm"}, {"model__normalizer": "softmax"}, ODD, ODD | EIGHT | {"batch_size": 4}],
    ids=["l2_norm_gelu", "gelu_l2_norm", "softmax", "padded", "sharded"],
)
def test_contributions_are_those_of_a_float64_computation(overrides):
    found, expected = measure(**overrides), in_float64(tiny_config(**overrides))
    assert found.tokens == SPLIT.num_tokens - 1
    for name, means_YN in expected.items():
        np.testing.assert_allclose(found.contributions[name], means_YN, rtol=2e-4, atol=1e-5 * means_YN.max())
        np.testing.assert_allclose(found.parts[name].sum(-1), 1, rtol=1e-5)


def test_padding_contributes_nothing_and_eight_devices_find_what_one_does():
    one, eight = measure(**ODD), measure(**ODD, **EIGHT, batch_size=4)
    assert not one.contributions["query"][:, 21:].any() and one.contributions["query"][:, :21].all()
    assert_trees_equal(vars(eight), vars(one), rtol=1e-4, atol=1e-7)


def test_in_bfloat16_they_are_the_same_up_to_its_rounding():
    half, whole = measure(model__dtype="bfloat16"), measure()
    for name, means_YN in whole.contributions.items():
        assert np.linalg.norm(half.contributions[name] - means_YN) < 0.02 * np.linalg.norm(means_YN)


def test_of_images_every_position_counts_and_padding_rows_do_not():
    cfg = image_config()
    batch, params = random_images(cfg), task_of(cfg).init_params(cfg.model, jax.random.key(0))
    sums = jax.jit(functools.partial(batch_sums, cfg))
    whole = sums(params, initial_tau(cfg.model), batch)
    np.testing.assert_allclose(whole["seen"]["ffn"].parts.sum(-1), cfg.batch_size, rtol=1e-5)
    first = sums(params, initial_tau(cfg.model), batch._replace(weights_BL=np.eye(cfg.batch_size, 1, dtype=np.float32)))
    one = jax.tree.map(lambda x: np.repeat(x[:1], cfg.batch_size, 0), batch)
    same = sums(params, initial_tau(cfg.model), one)
    assert_trees_equal(jax.tree.map(lambda x: x * cfg.batch_size, first["seen"]), same["seen"], rtol=1e-4)


# ---- In Python, and shrinking by them.

IDS = np.random.default_rng(1).integers(0, 300, (4, 16))


@functools.cache
def model(normalizer="l2_norm_gelu"):
    cfg = tiny_config(model__normalizer=normalizer)
    return TokenFormer(cfg.model, state_of(cfg).params, initial_tau(cfg.model))


def with_blocks(of, name, **arrays):
    blocks = of.params["blocks"] | {name: of.params["blocks"][name] | arrays}
    return dataclasses.replace(of, params=of.params | {"blocks": blocks})


def test_a_token_of_zero_value_contributes_exactly_nothing():
    values_YNE = model().params["blocks"]["ffn"]["values"].at[:, 7].set(0.0)
    found = with_blocks(model(), "ffn", values=values_YNE).contributions(IDS)["ffn"]
    assert found[:, 7].tolist() == [0, 0] and np.delete(found, 7, 1).all()


@pytest.mark.parametrize("recipe", ["zero_keys", pytest.param("isometric", marks=pytest.mark.slow)])
def test_right_after_a_lossless_growth_new_tokens_contribute_nothing_and_the_old_what_they_did(recipe):
    before = model().contributions(IDS)
    grown = model().grow(qkv_tokens=64, out_tokens=80, ffn_tokens=200, recipe=recipe)
    after = grown.contributions(IDS)
    for name, means_YN in before.items():
        count = means_YN.shape[1]
        assert after[name].shape[1] > count and not after[name][:, count:].any()
        np.testing.assert_allclose(after[name][:, :count], means_YN, rtol=1e-3, atol=1e-5 * means_YN.max())
    again = grown.shrink(qkv_tokens=24, out_tokens=40, ffn_tokens=96, inputs=IDS)
    assert_trees_equal(again.params, model().params)
    assert again.tau == pytest.approx(model().tau, rel=1e-5)


def test_by_activation_tokens_known_to_be_dead_go_without_loss_and_by_norm_they_stay():
    """Of gelu(s) / ‖gelu(s)‖: every input has a large first entry, so that the longest keys' scores are far below 0."""
    alive = np.sort(np.random.default_rng(2).permutation(96)[:60])
    dead = np.setdiff1d(np.arange(96), alive)
    base = model("gelu_l2_norm")
    embed_VD = base.params["embed"].at[:, 0].set(100.0)
    keys_YND = base.params["blocks"]["ffn"]["keys"].at[:, dead].set(0.0).at[:, dead, 0].set(-50.0)
    whole = with_blocks(dataclasses.replace(base, params=base.params | {"embed": embed_VD}), "ffn", keys=keys_YND)
    found = whole.contributions(IDS)["ffn"]
    assert not found[:, dead].any() and found[:, alive].all()
    smaller = whole.shrink(ffn_tokens=60, inputs=IDS)
    assert_trees_equal(smaller.params["blocks"]["ffn"]["keys"], keys_YND[:, alive])
    assert smaller.tau == pytest.approx(whole.tau, rel=1e-6)
    logits = np.asarray(whole.logits(IDS))
    np.testing.assert_allclose(smaller.logits(IDS), logits, atol=5e-6 * abs(logits).max())
    by_norm = whole.shrink(ffn_tokens=60)
    assert np.abs(by_norm.logits(IDS) - logits).max() > 1e-3 * abs(logits).max()


def test_tau_falls_as_the_norm_was_measured_to():
    found = model()._measured(IDS)
    kept = np.sort(np.argsort(-found.contributions["ffn"], axis=-1)[:, :30], axis=-1)
    part = np.take_along_axis(found.parts["ffn"], kept, 1).sum(1).mean()
    smaller = model().shrink(ffn_tokens=30, inputs=IDS)
    assert smaller.tau["ffn"] == pytest.approx(model().tau["ffn"] * part**0.5, rel=1e-4)


# ---- What inspect says of them.


def test_cohorts_are_those_of_the_growths():
    def change(step, before, after):
        return {"step": step, "from": {"ffn": before}, "to": {"ffn": after}}

    growths = [change(5, 8, 20), change(9, 20, 20), change(12, 20, 32)]
    assert inspection.cohorts_of([], "ffn", 8) == {"start": range(8)}
    assert inspection.cohorts_of(growths, "ffn", 32) == {
        "start": range(8),
        "step 5": range(8, 20),
        "step 12": range(20, 32),
    }
    shrunk = [*growths, change(15, 32, 10), change(20, 10, 12)]
    assert inspection.cohorts_of(shrunk, "ffn", 12) == {"left at step 15": range(10), "step 20": range(10, 12)}
    adapters = [PutOn(file, {"ffn": 3}) for file in ("a/prose.safetensors", "b/prose.safetensors", "c.safetensors")]
    adapters[2] = PutOn("c.safetensors", {"out": 5})
    worn = inspection.cohorts_of([], "ffn", 8, adapters)
    assert worn == {"start": range(8), "prose": range(8, 11), "prose 2": range(11, 14)}
    assert inspection.within(worn, 9) == {"start": range(8), "prose": range(8, 9)}
    assert inspection.within(worn, 4) == {"start": range(4)}


def test_a_text_is_named_after_its_file_or_folder():
    given = ["a/prose.txt", "docs/*.md", "src/**/*.c", "*.txt", "c=x/*.h", "gs://bucket/books"]
    assert list(inspection.named_texts(given)) == ["prose", "docs", "src", "*.txt", "c", "books"]
    with pytest.raises(UserError, match=r"--text=b/prose: another text is named 'prose', too; use --text=NAME=b/prose"):
        inspection.named_texts(["a/prose.txt", "b/prose"])


def test_shares_tell_dead_tokens_cohorts_and_domains():
    books, code = ([[4.0, 4.0, 0.0, 0.01, 1.99]], [[1.0, 0.0, 0.0, 0.01, 8.99]])
    domains = {
        name: Measured({"ffn": np.array(values, np.float32)}, {}, 3.0, 9.0)
        for name, values in (("books", books), ("code", code))
    }
    result = inspection.describe(domains, {"ffn": {"start": range(2), "step 5": range(2, 5)}}, dead_below=0.01)
    (layer,) = result["projections"]["ffn"]["layers"]
    assert layer["dead"] == [2, 3] and layer["half"] == 1
    assert layer["cohort_shares"] == pytest.approx({"start": 0.45, "step 5": 0.55}, rel=1e-6)
    assert layer["specialized"] == {"books": [0, 1], "code": [4]}
    assert layer["apart"] == pytest.approx(0.7, rel=1e-6)
    assert "55%" in inspection.table(result).splitlines()[1] and "70%" in inspection.table(result)
    broken = {"books": dataclasses.replace(domains["books"], contributions={"ffn": np.full((1, 5), np.nan)})}
    with pytest.raises(UserError, match="the model is broken: contributions on books are not finite"):
        inspection.describe(broken, {"ffn": {"start": range(5)}}, 0.01)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, its successor right after growth, and that trained on, with the flag of its config."""
    folder = tmp_path_factory.mktemp("inspect")
    small = tiny_config(**corpus_overrides(folder), model__num_layers=1)
    sizes = {"model__qkv_tokens": 32, "model__out_tokens": 48, "model__ffn_tokens": 128}
    large = dataclasses.replace(tiny_config(**sizes, model__num_layers=1, steps=12), data=small.data)
    train(small, folder / "small")
    grow(folder / "small", large, folder / "grown")
    return small, folder


def test_command_measures_domains_and_what_new_tokens_took_over(runs, tmp_path):
    _, folder = runs
    (tmp_path / "other.txt").write_text("value norm key scale " * 100)
    said = call_well("inspect", f"--workdir={folder}/grown", f"--text={tmp_path}/other.txt", f"--out={tmp_path}/out")
    result = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert list(result["domains"]) == ["validation", "other"]
    run = load_trained(folder / "grown")
    assert result["fingerprint"] == run.fingerprint
    of = result["projections"]["ffn"]
    assert of["cohorts"] == {"start": [0, 96], "step 8": [96, 128]}
    assert of["layers"][0]["cohort_shares"]["step 8"] == 0 and set(range(96, 128)) <= set(of["layers"][0]["dead"])
    split = inspection.own_split(run, "validation")
    found = contributions(run.step, run.state, split, run.cfg)
    np.testing.assert_allclose(of["contributions"]["validation"], found.contributions["ffn"], rtol=1e-4)
    assert result["domains"]["validation"]["loss"] == pytest.approx(found.loss)
    assert (tmp_path / "out" / "inspect.png").read_bytes()[:4] == b"\x89PNG"
    assert "apart" in said and "step 8" in said and "picture: " in said


def test_shrink_by_activation_gives_back_the_former_rung_and_says_how_it_chose(runs, tmp_path):
    small, folder = runs
    figures = shrink(folder / "grown", dataclasses.replace(small, steps=12), tmp_path / "again", criterion="activation")
    assert figures == json.loads((tmp_path / "again" / "shrink.json").read_text())
    assert figures["criterion"] == "activation" and "text" not in figures
    assert figures["loss_after"] == pytest.approx(figures["loss_before"], abs=2e-6)
    assert_trees_equal(load_trained(tmp_path / "again").state.params, load_trained(folder / "small").state.params)
    assert Checkpoints(tmp_path / "again" / "checkpoints").record(8).growth[-1]["criterion"] == "activation"


@pytest.mark.slow
def test_shrink_by_activation_keeps_what_matters_on_a_text_and_runs_sharded(runs, tmp_path):
    small, folder = runs
    (tmp_path / "other.txt").write_text("value norm key scale " * 100)
    cfg = tiny_config(model__num_layers=1, model__ffn_tokens=40, steps=12, **EIGHT)
    cfg = dataclasses.replace(cfg, data=small.data)
    how = {"criterion": "activation", "text": str(tmp_path / "other.txt")}
    figures = shrink(folder / "small", cfg, tmp_path / "less", **how)
    assert figures["text"] == how["text"]
    run = load_trained(folder / "small")
    split = open_text(run.cfg, run.assets, how["text"])
    found = contributions(run.step, run.state, split, run.cfg, max_batches=cfg.eval_batches).contributions["ffn"]
    kept = np.sort(np.argsort(-found[0])[:40])
    smaller = load_trained(tmp_path / "less").state.params["blocks"]["ffn"]["keys"]
    assert_trees_equal(smaller[0], run.state.params["blocks"]["ffn"]["keys"][0, kept])


@pytest.mark.parametrize(
    "split, texts, message",
    [
        ("none", ["/nowhere/x.txt"], "--text=/nowhere/x.txt: matches no .txt"),
        ("none", ["{folder}/text/0.txt", "0={folder}/text/1.txt"], "another text is named '0'"),
        (
            "none",
            ["{folder}/short.txt"],
            "--text={folder}/short.txt: holds [0-9]+ tokens, fewer than .*; use more text",
        ),
        ("none", [], "--split=none: leaves no text"),
        ("validation", ["validation={folder}/text"], "--text=validation={folder}/text: its own data have that name"),
        ("test", [], "--split=test: must be one of train, validation"),
    ],
)
def test_what_cannot_be_measured_is_named(split, texts, message, runs):
    _, folder = runs
    (folder / "short.txt").write_text("key")
    with pytest.raises(UserError, match=message.format(folder=folder)):
        named = inspection.named_texts([text.format(folder=folder) for text in texts])
        inspection.inspect_run(load_trained(folder / "small"), split, named)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--dead=1.5", "--dead=1.5: must be 0 or above, and below 1; use 0.01"),
        ("--batches=-1", "--batches=-1: must be 0 or above"),
        ("--text=/nowhere", "--text=/nowhere: matches no .txt"),
    ],
)
def test_the_command_says_so_in_one_line_and_writes_nothing(flag, message, runs, tmp_path):
    line = complaint(call("inspect", f"--workdir={runs[1]}/small", f"--out={tmp_path}/out", flag))
    assert message in line and not (tmp_path / "out").exists()


def test_a_plain_transformer_has_nothing_to_inspect():
    linear = tiny_linear_config()
    params = init_params(linear.model, jax.random.key(0))
    with pytest.raises(UserError, match="projection = 'linear': a plain Transformer has no parameter tokens"):
        TokenFormer(linear.model, params, {}).contributions(IDS)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--criterion=activation"], "--criterion=activation: .* use --shrink with it"),
        (["--shrink", "--text=books"], "--text=books: .* use --criterion=activation with it"),
        (["--shrink", "--criterion=loss"], "criterion"),
    ],
)
def test_flags_of_shrinking_need_each_other(flags, message, runs, tmp_path):
    small, folder = runs
    config = write_config(tmp_path / "config.py", small)
    line = complaint(call("grow", f"--source={folder}/grown", config, f"--workdir={tmp_path}/new", *flags))
    assert re.search(message, line), line
