"""Small configs and the golden models, shared by the tests."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import base
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.data.batches import Batch
from tokenformer_jax.data.image_batches import ImageBatch
from tokenformer_jax.data.tokenizer import train_tokenizer
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.growth import resize
from tokenformer_jax.nn.language import init_params
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.running import run
from tokenformer_jax.storage import official, trained
from tokenformer_jax.storage.metrics_file import read_metrics
from tokenformer_jax.storage.record import Record
from tokenformer_jax.training.schedule import NewTokens
from tokenformer_jax.training.state import new_state
from tokenformer_jax.training.step import Step, make_step, put_batch

DATA = pathlib.Path(__file__).parent / "data"

TINY = {
    "model.vocab_size": 300,
    "model.context_length": 16,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.embed_dim": 32,
    "model.qkv_tokens": 24,
    "model.out_tokens": 40,
    "model.ffn_tokens": 96,
    "steps": 8,
    "batch_size": 8,
    "optimizer.warmup_steps": 2,
    "optimizer.peak_learning_rate": 1e-2,
}


def tiny_tree(**overrides: Any) -> ConfigDict:
    """A 2-layer model on 8 x 16 tokens; keys are written with __ for the dot: model__num_layers=3."""
    tree = base.get_config()
    for key, value in (TINY | {k.replace("__", "."): v for k, v in overrides.items()}).items():
        tree.update_from_flattened_dict({key: value})
    return tree


def tiny_config(**overrides: Any) -> Config:
    """The same, read and checked."""
    return read_config(tiny_tree(**overrides).to_dict())


def tiny_linear_config(**overrides: Any) -> Config:
    linear = {"model__projection": "linear", "model__qkv_tokens": 0, "model__out_tokens": 0}
    return tiny_config(**linear | overrides)


TINY_IMAGES = {
    "task": "image_classification",
    "model.vocab_size": 0,
    "model.context_length": 0,
    "model.rotary_fraction": 0.0,
    "model.image_size": 8,
    "model.patch_size": 2,
    "model.image_channels": 3,
    "model.num_classes": 6,
    "data.dataset": "digits",
}


def image_tree(**overrides: Any) -> ConfigDict:
    """As `tiny_tree`, of 8 x 8 images in color."""
    return tiny_tree(**{key.replace(".", "__"): value for key, value in TINY_IMAGES.items()} | overrides)


def image_config(**overrides: Any) -> Config:
    """The same, read and checked."""
    return read_config(image_tree(**overrides).to_dict())


def random_images(cfg: Config, seed: int = 0) -> ImageBatch:
    """A global batch of random images and labels."""
    rng, model = np.random.default_rng(seed), cfg.model
    shape = cfg.batch_size, model.image_size, model.image_size, model.image_channels
    labels = rng.integers(0, model.num_classes, (cfg.batch_size, 1)).astype(np.int32)
    return ImageBatch(rng.integers(0, 256, shape, np.uint8), labels, np.ones((cfg.batch_size, 1), np.float32))


@cache
def step_of(cfg: Config) -> Step:
    """The training step of a config on its mesh, compiled once for all tests of a process."""
    return make_step(cfg, make_mesh(cfg.mesh))


def after_steps(cfg: Config, steps: int, state: Any = None) -> tuple[Any, list[dict[str, Any]]]:
    """A state, at first a new one, after steps on random batches, and the metrics of each."""
    step = step_of(cfg)
    state, rows = step.init(jax.random.key(0)) if state is None else state, []
    for i in range(steps):
        state, metrics = step.train(state, put_batch(step, random_batch(cfg, i)))
        rows.append(jax.device_get(metrics))
    return state, rows


# What no step depends on.
NOT_OF_A_STEP: dict[str, Any] = {
    **dict.fromkeys(("log_every", "checkpoints_kept", "non_finite_limit"), 1),
    **dict.fromkeys(("eval_every", "eval_batches", "checkpoint_every", "profile_at"), 0),
    **dict.fromkeys(("loss_spike", "max_minutes", "train_tokens", "train_flops", "train_epochs"), 0.0),
    "rungs": (),
    "non_finite": "raise",
    "track": "none",
}
_STEPS: dict[tuple[Mesh, str], Step] = {}


@contextlib.contextmanager
def shared_steps() -> Iterator[None]:
    """Within it, no run compiles a step that one before it in this process compiled, on whatever data."""

    def shared(cfg: Config, mesh: Mesh, start: int = 0, end: int = 0, new_tokens: NewTokens | None = None) -> Step:
        end = end or cfg.steps
        data = dataclasses.replace(cfg.data, path="", cache_dir="", tokenizer="", sources=())
        cfg = dataclasses.replace(cfg, data=data, grow=tiny_config().grow, steps=end, **NOT_OF_A_STEP)
        key = mesh, repr((cfg, start, end, new_tokens))
        if key not in _STEPS:
            _STEPS[key] = make_step(cfg, mesh, start, end, new_tokens)
        return _STEPS[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (run, resize, trained, official):
            patch.setattr(module, "make_step", shared)
        yield


@cache
def scoring_run(**overrides: Any) -> trained.Trained:
    """A model of 64 tokens of context and random, large parameters, and a tokenizer of 300 ids, as a run opened."""
    cfg = tiny_config(model__context_length=64, **overrides)
    step = step_of(cfg)
    params = jax.tree.map(lambda x: 5 * x, init_params(cfg.model, jax.random.key(1)))
    state = new_state(params, (), initial_tau(cfg.model))
    state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, step.abstract_state._replace(opt_state=())))
    words = "key value query token norm grow train layer head scale attention ".split()
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer([" ".join(rng.choice(words, 40)) for _ in range(50)], 300)
    record = Record(model=asdict(cfg.model), data="none", batch_size=cfg.batch_size)
    assets = {"tokenizer": tokenizer.to_json()}
    return trained.Trained(cfg, 0, record, assets, step, state, count_params(params))


def golden_model(name: str) -> tuple[Config, Any, Any, dict[str, np.ndarray]]:
    """Config, parameters and expected gradients (both as our tree) and the raw arrays of a golden file."""
    raw = dict(np.load(DATA / name, allow_pickle=False))
    size = {key.removeprefix("cfg/"): value for key, value in raw.items() if key.startswith("cfg/")}
    cfg = tiny_config(
        model__vocab_size=int(size["padded_vocab_size"]),
        model__context_length=int(size["seq_length"]),
        model__num_layers=int(size["num_layers"]),
        model__num_heads=int(size["num_attention_heads"]),
        model__embed_dim=int(size["hidden_size"]),
        model__qkv_tokens=int(size["qkv_slot_num"]),
        model__out_tokens=int(size["proj_slot_num"]),
        model__ffn_tokens=int(size["ffn_slot_num"]),
        model__rotary_fraction=float(size["rotary_pct"]),
    )
    return cfg, official_tree(raw, "sd/"), official_tree(raw, "grad/"), raw


def official_tree(raw: dict[str, np.ndarray], prefix: str) -> Any:
    """The authors' names -> our parameter tree."""
    layers = 1 + max(int(key.split(".")[1]) for key in raw if key.startswith(f"{prefix}sequential.")) - 2 - 2

    def stacked(theirs: str) -> dict[str, np.ndarray]:
        return {
            f"{ours}s": np.stack(
                [raw[f"{prefix}sequential.{i + 2}.{theirs}.{ours}_param_tokens"] for i in range(layers)]
            )
            for ours in ("key", "value")
        }

    names = {"query": "attention.query", "key": "attention.key", "value": "attention.value", "out": "attention.proj"}
    return {
        "embed": raw[f"{prefix}sequential.0.word_embeddings.weight"],
        "blocks": {ours: stacked(theirs) for ours, theirs in (names | {"ffn": "mlp"}).items()},
        "norm_scale": raw[f"{prefix}sequential.{layers + 3}.norm.weight"],
        "norm_bias": raw[f"{prefix}sequential.{layers + 3}.norm.bias"],
    }


def random_batch(cfg: Config, seed: int = 0) -> Batch:
    """A global batch of random tokens, the last rows partly padding."""
    rng = np.random.default_rng(seed)
    shape = (cfg.batch_size, cfg.model.context_length)
    tokens, targets = (rng.integers(0, cfg.model.vocab_size, shape).astype(np.int32) for _ in range(2))
    weights = np.ones(shape, np.float32)
    weights[-1, 5:] = 0
    return Batch(tokens, targets, weights, np.ones(shape, np.int32))


def write_corpus(folder: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A few small text files, compressible enough to learn from."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    words = "key value query token norm grow train layer head scale".split()
    for i in range(24):
        (folder / f"{i}.txt").write_text("\n".join(" ".join(rng.choice(words, 8)) for _ in range(30)))
    return folder


def corpus_overrides(folder: pathlib.Path) -> dict[str, str]:
    """What makes a config read a small corpus, written to a folder, with a cache of its own."""
    text = write_corpus(folder / "text")
    return {"data__dataset": "text_files", "data__path": str(text), "data__cache_dir": str(folder / "cache")}


def write_config(path: pathlib.Path, cfg: Config) -> str:
    """Writes a config file for the commands; returns their flag."""
    lines = "from ml_collections import ConfigDict", "def get_config():", f"    return ConfigDict({asdict(cfg)!r})"
    path.write_text("\n".join(lines) + "\n")
    return f"--config={path}"


def rows_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What a run reports, but its speed."""
    clock = ("tokens_per_second", "mfu")
    return [{name: value for name, value in row.items() if name not in clock} for row in read_metrics(workdir)]


def assert_trees_equal(a: Any, b: Any, **tolerance: float) -> None:
    """Bit for bit, or within rtol and atol."""
    compare = partial(np.testing.assert_allclose, **tolerance) if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda x, y: compare(np.asarray(x), np.asarray(y)), a, b)
