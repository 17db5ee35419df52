"""Laws of batches of images, whatever they are read from; `test_pictures.py` and `test_augment.py` have the parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import image_config, random_images
from tokenformer_jax.data import image_batches
from tokenformer_jax.data.images import in_memory, open_images
from tokenformer_jax.errors import UserError
from tokenformer_jax.image_config import UNCHANGED
from tokenformer_jax.training.tasks import task_of


def photo(seed):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 6), ("validation", 3)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                photo(100 * label + i).save(tmp_path / split / name / f"{i}.{('jpg', 'png', 'webp')[i % 3]}")
    return tmp_path


def folder_config(folder, **overrides):
    data = {"data__dataset": "image_folder", "data__path": str(folder), "model__num_classes": 2, "batch_size": 4}
    return image_config(**data | overrides)


def test_a_config_names_a_folder(folder):
    cfg = folder_config(folder)
    data = open_images(cfg)
    assert (len(data.train), len(data.validation)) == (12, 6) and data.train.class_names == ["cat", "dog"]
    assert data.train.fingerprint != data.validation.fingerprint
    assert task_of(cfg).describe_data(data) == "12 training images of 2 classes"


def test_a_config_names_the_splits_and_other_files_are_named_once(folder, capsys):
    (folder / "train").rename(folder / "few")
    (folder / "few" / "cat" / "notes.txt").write_text("")
    (folder / "validation" / "dog" / "0.gif").write_text("")
    data = open_images(folder_config(folder, data__train_split="validation", data__validation_split="few"))
    assert (len(data.train), len(data.validation)) == (6, 12)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("skipped 2 files, not .jpg, .jpeg, .png or .webp: few/cat/notes.txt, validation/dog/0.gif")


def test_damaged_images_are_named_once_and_weigh_nothing(folder, capsys):
    bad = folder / "train" / "cat" / "0.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    cfg = folder_config(folder, batch_size=12)
    batches = image_batches.train_batches(open_images(cfg).train, cfg)
    for batch in (next(batches), next(batches)):
        (row,) = np.flatnonzero(batch.weights_BL[:, 0] == 0)
        assert not batch.images_BHWC[row].any() and batch.weights_BL.sum() == 11 and batch.targets.min() == 0
    assert capsys.readouterr().err.count(str(bad)) == 1


def test_every_image_is_evaluated_once(folder):
    split = open_images(folder_config(folder)).validation
    found = image_batches.eval_batches(split, 4)
    assert len(found) == 2 and sum(batch.weights_BL.sum() for batch in found) == 6
    halves = [image_batches.eval_batches(split, 4, process_index=i, process_count=2) for i in (0, 1)]
    for k, whole in enumerate(found):
        joined = np.concatenate([half[k].images_BHWC for half in halves])
        np.testing.assert_array_equal(joined, whole.images_BHWC)
    assert len(image_batches.eval_batches(split, 2, max_batches=1)) == 1


@pytest.mark.parametrize("smallest", [0.0, 0.3])
def test_training_batches_resume_and_shard_exactly(folder, smallest):
    cfg = folder_config(folder, augment__smallest_crop=smallest)
    split = open_images(cfg).train
    whole = image_batches.train_batches(split, cfg)
    first = [next(whole) for _ in range(5)]
    for start in (2, 4):
        again = image_batches.train_batches(split, cfg)
        again.set_state({"next_index": start})
        for a, b in zip(next(again), first[start], strict=True):
            np.testing.assert_array_equal(a, b)
    halves = [image_batches.train_batches(split, cfg, process_index=i, process_count=2) for i in (0, 1)]
    for batch in first[:2]:
        np.testing.assert_array_equal(np.concatenate([next(half).images_BHWC for half in halves]), batch.images_BHWC)
    epoch = np.concatenate([batch.targets[:, 0] for batch in first[:3]])
    assert np.bincount(epoch).tolist() == [6, 6]  # each of twelve images once
    other = dataclasses.replace(cfg, seed=1)
    assert (next(image_batches.train_batches(split, other)).images_BHWC != first[0].images_BHWC).any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data__path": ""}, "data.path is missing: data.dataset = 'image_folder' needs a folder of"),
        ({"data__path": "/nothing/here"}, "data.path = '/nothing/here': not found; use a folder of one subfolder"),
        ({"model__num_classes": 5}, "model.num_classes = 5: image_folder has 2 classes; use 2"),
        ({"data__train_examples": 5}, "data.train_examples = 5: image_folder has 12; use 12"),
        ({"data__dataset": "no_such_set"}, "data.dataset = 'no_such_set': cannot be loaded"),
    ],
)
def test_a_mistake_names_key_and_remedy(folder, change, message):
    with pytest.raises(UserError, match=message):
        open_images(folder_config(folder, **change))


def test_augmentations_are_a_function_of_seed_and_step_alone():
    cfg = image_config(augment__flip=True, augment__mixup=0.8, augment__label_smoothing=0.1)
    task, batch = task_of(cfg), random_images(cfg)
    make = jax.jit(lambda batch, step: task.augmented(batch, cfg, step))
    one, again, other = (jax.device_get(make(batch, jnp.int32(step))) for step in (3, 3, 4))
    np.testing.assert_array_equal(one.images_BHWC, again.images_BHWC)
    assert (one.images_BHWC != other.images_BHWC).any() and one.images_BHWC.dtype == np.float32
    plain = image_config()
    assert plain.augment == UNCHANGED and task.augmented(batch, plain, 3) is batch


def test_a_damaged_image_is_mixed_with_no_other():
    cfg = image_config(augment__mixup=0.8, augment__label_smoothing=0.1)
    batch = random_images(cfg)
    batch.weights_BL[3] = 0  # the neighbor of row 2
    found = jax.device_get(task_of(cfg).augmented(batch, cfg, jnp.int32(1)))
    np.testing.assert_allclose(found.images_BHWC[2], batch.images_BHWC[2] / np.float32(127.5) - 1, atol=1e-6)
    assert np.abs(found.images_BHWC[0] - (batch.images_BHWC[0] / np.float32(127.5) - 1)).max() > 1e-3
    np.testing.assert_allclose(found.targets[[0, 1, 2]].sum(1), 1, atol=1e-6)
    assert not found.targets[3].any() and found.weights_BL[3] == 0


def test_arrays_in_memory_are_told_apart_by_content():
    images, labels = np.zeros((4, 2, 2), np.uint8), np.arange(4)
    split = in_memory(images, labels, list("abcd"), 2, channels=1)
    assert split.read([2, -1])[1].tolist() == [2, -1]
    images[1, 1, 1] = 1
    assert in_memory(images, labels, list("abcd"), 2, channels=1).fingerprint != split.fingerprint
