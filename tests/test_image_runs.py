"""A run of images: trained, stopped, grown, shrunk, evaluated and shown, by the code that language models use."""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers import (
    assert_trees_equal,
    corpus_overrides,
    image_config,
    random_images,
    shared_steps,
    tiny_config,
)
from tokenformer_jax import TokenFormer, TokenFormerClassifier, UserError
from tokenformer_jax.config import read_config
from tokenformer_jax.evaluation.perplexity import evaluate_own, show_examples
from tokenformer_jax.evaluation.predictions import (
    Prediction,
    describe,
    draw,
    find_images,
    predict_files,
    predict_split,
)
from tokenformer_jax.evaluation.report import summarise, table
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.ladder import stages, with_budget
from tokenformer_jax.growth.positions import interpolate, resized
from tokenformer_jax.growth.shrink import shrink
from tokenformer_jax.growth.verify import LOGIT_BOUND
from tokenformer_jax.nn.vision import abstract_model
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.step import make_step
from tokenformer_jax.training.tasks import task_of

pytest.importorskip("sklearn")
AUGMENT = {"smallest_crop": 0.5, "flip": True, "erasing": 0.3, "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
DIGITS = {
    "model__image_channels": 1,
    "model__num_classes": 10,
    "model__stochastic_depth": 0.1,
    "model__stochastic_depth_rises": True,
    "optimizer__schedule": "constant",
    "optimizer__average": 0.75,
    "optimizer__warmup_steps": 0,
    "eval_batches": 4,
    **{f"augment__{key}": value for key, value in AUGMENT.items()},
}


def config(**overrides):
    return image_config(**DIGITS | {"steps": 6} | overrides)


def state_of(workdir, cfg, step):
    from tokenformer_jax.devices.sharding import make_mesh

    return Checkpoints(workdir / "checkpoints").restore(step, make_step(cfg, make_mesh(cfg.mesh)).abstract_state)


@pytest.fixture(scope="module", autouse=True)
def steps():
    with shared_steps():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, steps):
    workdir = tmp_path_factory.mktemp("runs") / "small"
    train(config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def grown(run):
    workdir = run.parent / "grown"
    figures = grow(run, config(steps=12, model__ffn_tokens=128, model__qkv_tokens=32), workdir)
    return workdir, figures


def test_a_stopped_run_goes_on_bit_for_bit(run):
    other = run.parent / "stopped"
    train(config(steps=3), other)
    train(config(), other)
    assert_trees_equal(state_of(other, config(), 6), state_of(run, config(), 6))


def test_the_mean_of_the_weights_is_what_is_used(run, tmp_path):
    cfg, kept = config(), config().optimizer.average
    train(config(steps=1), tmp_path / "one")
    before = state_of(tmp_path / "one", cfg, 1)
    train(config(steps=2), tmp_path / "one")
    after = state_of(tmp_path / "one", cfg, 2)
    expected = jax.tree.map(lambda mean, now: kept * mean + (1 - kept) * now, before.average, after.params)
    assert_trees_equal(after.average, expected, atol=1e-6)
    state = state_of(run, cfg, 6)
    assert_trees_equal(load_trained(run).state.params, state.average)
    assert np.abs(state.average["head_weight"] - state.params["head_weight"]).max() > 1e-4


def test_growth_is_lossless_for_weights_and_their_mean(run, grown):
    workdir, figures = grown
    assert figures["max_logit_difference"] <= LOGIT_BOUND * max(1, figures["max_logit"])
    assert figures["new_key_gradient_norm"] > 0
    large = config(steps=12, model__ffn_tokens=128, model__qkv_tokens=32)
    before, after = state_of(run, config(), 6), state_of(workdir, large, 6)
    images = random_images(large).images_BHWC

    def logits(cfg, params, state):
        return nnx.merge(abstract_model(cfg.model)[0], params)(images, state.tau_now())

    for name in ("params", "average"):
        old, new = logits(config(), getattr(before, name), before), logits(large, getattr(after, name), after)
        np.testing.assert_allclose(new, old, atol=LOGIT_BOUND * np.abs(old).max())
    values = after.average["blocks"]["ffn"]["values"][:, 96:]
    np.testing.assert_array_equal(values, after.params["blocks"]["ffn"]["values"][:, 96:])
    assert np.abs(values).max() > 0


def test_it_goes_on_after_growth_and_shrinks_back(run, grown, tmp_path):
    workdir, _ = grown
    back = tmp_path / "back"
    shrink(workdir, config(steps=12), back)
    former, state = state_of(run, config(), 6), state_of(back, config(), 6)
    assert_trees_equal(
        (state.params, state.average, state.opt_state), (former.params, former.average, former.opt_state)
    )
    train(config(steps=12, model__ffn_tokens=128, model__qkv_tokens=32), workdir)
    keys = load_trained(workdir).state.params["blocks"]["ffn"]["keys"][:, 96:]
    assert np.abs(keys).max() > 0
    shown = table([*summarise("small", run), *summarise("grown", workdir)])
    assert "top-1" in shown and "perplexity" not in shown


@pytest.mark.slow
def test_a_rung_grows_the_mean_too(tmp_path):
    rung = {"step": 3, "model": {"ffn_tokens": 128}}
    train(config(rungs=(rung,)), tmp_path / "ladder")
    state = state_of(tmp_path / "ladder", config(model__ffn_tokens=128), 6)
    keys = state.average["blocks"]["ffn"]["keys"]
    assert keys.shape[1] == 128 and np.abs(keys[:, 96:]).max() > 0
    with pytest.raises(UserError, match=r"optimizer.average = 0.5: the stage before has 0.75; use that"):
        stages(config(rungs=(rung | {"optimizer": {"average": 0.5}},)))


def test_evaluation_and_predictions_agree(run, tmp_path):
    trained = load_trained(run)
    figures = evaluate_own(trained, "validation")
    assert figures["images"] == 359 and 0 <= figures["top1"] <= figures["top5"] <= 1
    found = predict_split(trained, 359, top=10)
    assert np.mean([p.classes[0] == p.label for p in found]) == pytest.approx(figures["top1"])
    assert np.mean([p.label in p.classes[:5] for p in found]) == pytest.approx(figures["top5"])
    assert all(sum(p.probabilities) == pytest.approx(1, abs=1e-5) for p in found)
    model = TokenFormerClassifier.load(run)
    images = np.stack([p.pixels_HWC for p in found[:5]])
    assert model.classify(images) == [p.classes[0] for p in found[:5]]
    assert model.evaluate(config())["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    larger = model.grow(ffn_tokens=200)
    np.testing.assert_allclose(larger.logits(images), model.logits(images), atol=1e-5)
    draw(found[:9], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert f"{round(figures['top1'] * 359)} of 359 are right" in describe(found)


def test_each_python_face_is_told_from_the_other(run, tmp_path):
    images, text, there = config(), tiny_config(**corpus_overrides(tmp_path)), tmp_path / "w"
    for make, message in (
        (lambda: TokenFormer.load(run), "holds a model that sees images; use TokenFormerClassifier"),
        (lambda: TokenFormer.init(images.model), "sees images; use TokenFormerClassifier"),
        (lambda: TokenFormer.train(images, there), "sees images; use TokenFormerClassifier"),
        (lambda: TokenFormerClassifier.init(text.model), "reads text; use TokenFormer"),
        (lambda: TokenFormerClassifier.train(text, there), "reads text; use TokenFormer"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    assert not there.exists()
    model = TokenFormerClassifier.init(images.model)
    assert model.class_names == tuple("0123456789")
    assert repr(model).startswith("TokenFormerClassifier(") and "8 x 8 pixels in patches of 2, 10 cl" in repr(model)


@pytest.mark.slow
def test_positions_are_interpolated_for_another_image_size(run, tmp_path):
    large = config(steps=12, model__image_size=16)
    figures = interpolate(run, large, tmp_path / "large")
    before, after = state_of(run, config(), 6), state_of(tmp_path / "large", large, 6)
    for name in ("params", "average"):
        old, new = getattr(before, name), getattr(after, name)
        np.testing.assert_array_equal(new["positions"][0], old["positions"][0])
        np.testing.assert_allclose(new["positions"][1:].mean(0), old["positions"][1:].mean(0), atol=1e-2)
        assert new["positions"].shape == (65, 32)
        assert_trees_equal(new | {"positions": 0}, old | {"positions": 0})
    assert jax.tree.leaves(after.opt_state)[0] == jax.tree.leaves(before.opt_state)[0]
    assert abs(figures["loss_after"] - figures["loss_before"]) < 0.5
    train(large, tmp_path / "large")
    with pytest.raises(UserError, match=r"model.image_size = 8: --interpolate makes a model for another size"):
        interpolate(run, config(steps=12), tmp_path / "same")
    with pytest.raises(
        UserError, match=r"image_size = 16: the source has 8, which growth keeps; use that, or --interpolate"
    ):
        grow(run, large, tmp_path / "none")
    with pytest.raises(UserError, match=r"model.num_layers = 3: the source has 2, which --interpolate keeps; use that"):
        interpolate(run, dataclasses.replace(large, model=dataclasses.replace(large.model, num_layers=3)), tmp_path)


def test_a_grid_of_positions_keeps_its_order():
    cfg = image_config(model__image_size=16).model
    ramp = jnp.stack([jnp.repeat(jnp.arange(4.0), 4), jnp.tile(jnp.arange(4.0), 4)], 1)
    found = resized(jnp.concatenate([jnp.full((1, 2), 9.0), ramp]), cfg, "linear")
    assert (found[0] == 9).all() and found.shape == (65, 2)
    grid = found[1:].reshape(8, 8, 2)
    assert (jnp.diff(grid[:, 0, 0]) >= 0).all() and (jnp.diff(grid[0, :, 1]) >= 0).all()
    np.testing.assert_allclose(grid[..., 0], grid[..., 1].T, atol=1e-5)


def test_files_are_predicted_and_damaged_ones_named(run, tmp_path, capsys):
    from PIL import Image

    trained = load_trained(run)
    pixels = predict_split(trained, 1, 1)[0].pixels_HWC[:, :, 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    found = predict_files(trained, find_images(str(tmp_path)), 1)
    assert [p.name for p in found] == [str(tmp_path / "a.png")]
    assert f"{tmp_path}/b.png: cannot be read" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--images: .*b.png cannot be read, nor any other"):
        predict_files(trained, [str(tmp_path / "b.png")], 1)


def test_a_model_is_saved_as_a_workdir_with_its_mean(run, tmp_path):
    model = TokenFormerClassifier.load(run)
    larger = model.grow(ffn_tokens=200)
    larger.save(tmp_path / "larger", config())
    loaded = TokenFormerClassifier.load(tmp_path / "larger")
    assert_trees_equal(loaded.params, larger.params)
    assert loaded.tau == pytest.approx(larger.tau) and loaded.class_names == larger.class_names
    state = state_of(tmp_path / "larger", larger.fitted(config()), 0)
    assert_trees_equal(state.average, state.params)
    with pytest.raises(UserError, match="larger"):
        larger.save(tmp_path / "larger", config())


def test_training_examples_can_be_looked_at(run, capsys):
    trained = load_trained(run)
    show_examples(trained, range(6))
    lines = capsys.readouterr().out.splitlines()
    task, cfg = task_of(trained.cfg), trained.cfg
    data = task.prepare(cfg, trained.assets)
    batch = next(task.train_batches(data, cfg, trained.step.mesh))
    model = TokenFormerClassifier.load(run)
    chances = model.probabilities(batch.images_BHWC)
    for i in range(6):
        label = batch.targets[i, 0]
        assert lines[2 * i] == f"--- example {i}, loss {-np.log(chances[i, label]):.4f} nats"
        assert re.fullmatch(rf"image \d+ \(is {label}\)", lines[2 * i + 1])


def test_names_of_files_and_classes_are_shown_as_they_are(tmp_path):
    odd = Prediction("new\nline.png", np.zeros((8, 8, 1), np.uint8), ["$x_{$", "b\n"], [0.6, 0.4], "b\n")
    assert describe([odd]).splitlines() == [r"new\nline.png: $x_{$ 60.0%, b\n 40.0% (is b\n)", "0 of 1 are right"]
    draw([odd, odd._replace(label=os.fsdecode(b"\xe9"))], tmp_path / "sheet.png")


def test_hidden_files_are_no_images_of_a_folder(tmp_path):
    for name in ("a.png", "._a.png", ".cache/b.png", "[x]/c.JPG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(str(tmp_path)) == [f"{tmp_path}/[x]/c.JPG", f"{tmp_path}/a.png"]
    assert find_images(f"{tmp_path}/._a.png") == [f"{tmp_path}/._a.png"]
    with pytest.raises(UserError, match=r"--images=: names no images; use a file, folder or glob of .jpg, .* or .webp"):
        find_images("")


def test_floats_are_normalized_pixels():
    model = TokenFormerClassifier.init(config().model)
    pixels = random_images(config()).images_BHWC
    scaled = (pixels / 127.5 - 1).astype(np.float32)
    np.testing.assert_allclose(model.logits(scaled), model.logits(pixels), atol=1e-5)
    for wrong in (pixels.astype(np.float32), np.full_like(scaled, np.nan)):
        with pytest.raises(UserError, match=r"images_BHWC: has floats beyond \[-1, 1\]; use uint8, or pixels / 127.5"):
            model.classify(wrong)


def test_epochs_say_where_a_run_ends(tmp_path):
    cfg = config(train_epochs=2.5, data__train_examples=1438)
    assert with_budget(stages(cfg))[-1].steps == -(-1438 * 5 // 2 // cfg.batch_size)
    with pytest.raises(UserError, match=r"train_epochs = 2.5: counts in data.train_examples"):
        config(train_epochs=2.5)
    with pytest.raises(UserError, match="train_epochs = 1: each says where the run ends"):
        config(train_epochs=1.0, train_tokens=5.0, data__train_examples=9)
    with pytest.raises(UserError, match=r"data.train_examples = 9: digits has 1438; use 1438"):
        train(config(train_epochs=100.0, data__train_examples=9), tmp_path / "w")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model__patch_size": 3}, "model.patch_size = 3: must divide model.image_size = 8; use 2 or 4"),
        ({"model__image_channels": 2}, r"model.image_channels = 2: must be 1 \(gray\) or 3 \(RGB\)"),
        ({"model__num_classes": 1}, "model.num_classes = 1: must be 2 or above"),
        ({"model__image_size": 0}, "model.image_size = 0: task = 'image_classification' needs"),
        (
            {"model__rotary_fraction": 0.5},
            "model.rotary_fraction = 0.5: positions of an image are learned; set it to 0",
        ),
        ({"model__vocab_size": 8}, "model.vocab_size = 8: an image has none; set it to 0"),
        ({"task": "language"}, "model.image_size = 8: task = 'language' has no images; set it to 0"),
        ({"model__pooling": "max"}, "model.pooling = 'max': must be one of class_token, mean"),
        ({"augment__center": 0.0}, "augment.center = 0.0: must be above 0, and 1 at most"),
    ],
)
def test_a_mistake_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        config(**overrides)


def test_classes_must_be_those_of_the_data(tmp_path):
    with pytest.raises(UserError, match=r"model.num_classes = 6: digits has 10 classes; use 10"):
        train(config(model__num_classes=6), tmp_path / "w")
    assert not (tmp_path / "w" / "config.json").exists()


def test_records_from_before_are_read():
    tree = dataclasses.asdict(config())
    for key in ("augment", "train_epochs"):
        tree.pop(key)
    for key in ("average",):
        tree["optimizer"].pop(key)
    cfg = read_config(tree)
    assert cfg.augment.mixup == 0 and cfg.optimizer.average == 0
