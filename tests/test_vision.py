"""Laws of the image classifier, and an independent PyTorch model's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import imagenet
from tests.helpers import assert_trees_equal, image_config, random_images, step_of
from tokenformer_jax.config import read_config
from tokenformer_jax.nn.layers import count_params, dropout_scale, subkey
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.nn.vision import abstract_model, init_params, normalized, patches
from tokenformer_jax.training.images import train_flops_per_image
from tokenformer_jax.training.schedule import decayed
from tokenformer_jax.training.step import put_batch

PLAIN = {"model__projection": "linear", "model__qkv_tokens": 0, "model__out_tokens": 0}


@functools.partial(jax.jit, static_argnums=0)
def apply(cfg, params, images, key=None):
    return nnx.merge(abstract_model(cfg.model)[0], params)(images, initial_tau(cfg.model), key)


@functools.cache
def example(scale: float = 5.0, **overrides):
    cfg = image_config(**overrides)
    params = init_params(cfg.model, jax.random.key(1))
    params = jax.tree.map(lambda x: scale * x, params)  # larger weights: the laws bite
    params["norm_bias"] += 0.1 * jnp.arange(cfg.model.embed_dim)
    params["head_bias"] += jnp.arange(cfg.model.num_classes)
    return cfg, params, normalized(jnp.asarray(random_images(cfg).images_BHWC))


@pytest.mark.parametrize("overrides", [{}, PLAIN, {"model__pooling": "mean"}], ids=["pattention", "plain", "mean"])
def test_logits_and_every_gradient_match_pytorch(overrides):
    torch = pytest.importorskip("torch")
    from benchmarks.torch_vit import ViT, leaves, names_of_ours

    cfg, params, images = example(scale=2.0, **overrides)
    labels = np.arange(len(images)) % cfg.model.num_classes
    theirs = ViT(jax.tree.map(np.asarray, params), cfg.model.patch_size, cfg.model.image_channels, cfg.model.num_heads)

    def loss(params):
        logits = apply(cfg, params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    their_logits = theirs(torch.tensor(np.asarray(images)))
    their_loss = torch.nn.functional.cross_entropy(their_logits, torch.tensor(labels))
    their_loss.backward()
    np.testing.assert_allclose(logits, their_logits.detach(), atol=2e-5)
    np.testing.assert_allclose(value, their_loss.detach(), atol=1e-5)
    expected, ours = theirs.gradients(), leaves(gradients["blocks"])
    names = names_of_ours(cfg.model.projection)
    assert all(np.abs(array).max() > 1e-3 for array in ours.values())
    assert sorted(names.values()) == sorted(ours) and sorted(names) == sorted(expected["blocks"])
    for name, arrays in expected.pop("blocks").items():
        np.testing.assert_allclose(ours[names[name]], np.stack(arrays), atol=5e-6, err_msg=name)
    assert sorted(expected) == sorted(gradients.keys() - {"blocks"})
    for name, array in expected.items():
        np.testing.assert_allclose(gradients[name], array, atol=5e-6, err_msg=name)


def test_patches_are_squares_in_reading_order():
    images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    found = patches(jnp.asarray(images), 2)
    assert found.shape == (2, 6, 12)
    np.testing.assert_array_equal(found[1, 4], images[1, 2:4, 2:4].ravel())


@pytest.mark.parametrize("pooling", ["class_token", "mean"])
def test_without_positions_the_order_of_patches_is_nothing(pooling):
    cfg, params, images = example(model__pooling=pooling)
    size, side = cfg.model.patch_size, cfg.model.image_size // cfg.model.patch_size
    tiles = images.reshape(len(images), side, size, side, size, -1).swapaxes(2, 3).reshape(len(images), side**2, -1)
    order = np.random.default_rng(0).permutation(side**2)
    moved = tiles[:, order].reshape(len(images), side, side, size, size, -1).swapaxes(2, 3).reshape(images.shape)
    bare = params | {"positions": jnp.zeros_like(params["positions"])}
    np.testing.assert_allclose(apply(cfg, bare, images), apply(cfg, bare, moved), atol=2e-5)
    assert np.abs(apply(cfg, params, images) - apply(cfg, params, moved)).max() > 0.01


def test_every_position_sees_all():
    cfg, params, images = example()
    changed = images.at[:, -1, -1].add(1.0)  # a pixel of the last patch, which the class token must see
    assert (np.abs(apply(cfg, params, changed) - apply(cfg, params, images)).max(axis=1) > 1e-4).all()


def test_bytes_are_normalized():
    cfg, params, images = example()
    np.testing.assert_array_equal(apply(cfg, params, random_images(cfg).images_BHWC), apply(cfg, params, images))
    assert float(images.min()) >= -1 and float(images.max()) <= 1


@pytest.mark.parametrize(
    "variant, parameters",
    [
        ("vit_b16", 86_447_848),
        ("b16_matched", 86_447_848),
        ("b16", 114_759_400),
        ("vit_l16", 304_007_144),
        ("l16_matched", 304_007_144),
        ("l16", 404_670_440),
    ],
)
def test_parameters_of_the_papers_rows(variant, parameters):
    model = read_config(imagenet.get_config(variant).to_dict()).model
    layers, dim = model.num_layers, model.embed_dim
    around = (16 * 16 * 3 + 1) * dim + dim + 197 * dim + 2 * dim + 1001 * dim - dim + 1000
    blocks = layers * dim * (2 * sum(model.tokens.values()) or 4 * dim + 2 * model.ffn_tokens)
    assert count_params(abstract_model(model)[1]) == around + blocks == parameters
    if model.projection == "linear":  # ViT's own count: biases in every projection, scale and bias in both norms
        published = {768: 86_567_656, 1024: 304_326_632}[dim]
        assert parameters + layers * (3 * dim + dim + 4 * dim + dim + 4 * dim) == published


def test_flops_are_three_forward_passes_less_the_gradient_to_pixels():
    model = read_config(imagenet.get_config("vit_b16").to_dict()).model
    forward = 2 * 197 * 12 * (12 * 768**2) + 12 * 4 * 197**2 * 768 + 2 * 768 * 1000  # blocks, attention, head
    assert train_flops_per_image(model) == 3 * forward + 2 * 2 * 196 * 768 * 768


def test_norms_biases_class_token_and_positions_do_not_decay():
    cfg = image_config()
    mask = decayed(init_params(cfg.model, jax.random.key(0)))
    kept = {name for name, part in mask.items() if not all(jax.tree.leaves(part))}
    assert kept == {"patch_bias", "class_token", "positions", "norm_scale", "norm_bias", "head_bias"}
    assert mask["patch_weight"] and mask["head_weight"] and all(jax.tree.leaves(mask["blocks"]))


def test_stochastic_depth_rises_from_nothing_to_its_rate():
    cfg, params, images = example(model__stochastic_depth=0.5, model__stochastic_depth_rises=True, model__num_layers=3)
    key = jax.random.key(3)
    x = apply(cfg, params, images, key)
    assert np.abs(x - apply(cfg, params, images)).max() > 0.01
    # The same by hand: the first layer whole, the second at half the rate, the third at the rate.
    model = nnx.merge(abstract_model(cfg.model)[0], params)
    scales = [
        [dropout_scale(rate, subkey(subkey(key, layer), i), (len(images), 1, 1)) for i in (1, 3)]
        for layer, rate in enumerate((0.0, 0.25, 0.5))
    ]
    assert np.all(scales[0][0] == 1) and set(np.unique(scales[2])) <= {0.0, 2.0}
    from tokenformer_jax.nn.attention import full_attention
    from tokenformer_jax.nn.layers import layer_norm
    from tokenformer_jax.nn.transformer import unstack

    B, D = len(images), cfg.model.embed_dim
    h = patches(images, cfg.model.patch_size) @ params["patch_weight"] + params["patch_bias"]
    h = jnp.concatenate([jnp.broadcast_to(params["class_token"], (B, 1, D)), h], 1) + params["positions"]
    graphdef, _ = nnx.split(model.blocks)
    for layer, own in enumerate(unstack(params["blocks"])):
        block, tau = nnx.merge(graphdef, own), initial_tau(cfg.model)
        n = layer_norm(h)
        heads = (
            p(n, tau[t]).reshape(B, -1, cfg.model.num_heads, cfg.model.head_dim)
            for t, p in (("query", block.query), ("key", block.key), ("value", block.value))
        )
        h += scales[layer][0] * block.out(full_attention(*heads), tau["out"])
        h += scales[layer][1] * block.ffn(layer_norm(h), tau["ffn"])
    h = layer_norm(h[:, 0]) * params["norm_scale"] + params["norm_bias"]
    np.testing.assert_allclose(x, h @ params["head_weight"].T + params["head_bias"], atol=1e-4)


def test_a_sharded_step_is_one_devices():
    augment = {f"augment__{k}": v for k, v in {"flip": True, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.5}.items()}
    one = image_config(model__stochastic_depth=0.3, **augment)
    many = image_config(model__stochastic_depth=0.3, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **augment)
    results = []
    for cfg in (one, many):
        step = step_of(cfg)
        state = step.init(jax.random.key(0))
        for seed in range(2):
            state, metrics = step.train(state, put_batch(step, random_images(cfg, seed)))
        results.append((metrics["loss"], state.params))
    np.testing.assert_allclose(*(loss for loss, _ in results), rtol=1e-5)
    assert_trees_equal(*(params for _, params in results), atol=1e-4)


def test_evaluation_counts_top1_and_top5():
    cfg = image_config(model__num_classes=8)
    step = step_of(cfg)
    state, batch = step.init(jax.random.key(0)), random_images(cfg)
    weights = batch.weights_BL.copy()
    weights[0] = 0  # a damaged image
    batch = batch._replace(weights_BL=weights)
    sums = jax.device_get(step.evaluate(state, put_batch(step, batch)))
    logits = np.asarray(apply(cfg, state.params, batch.images_BHWC))[1:]
    labels = batch.targets[1:, 0]
    ranks = np.array([(row > row[label]).sum() for row, label in zip(logits, labels, strict=True)])
    assert sums["weights"] == len(labels)
    assert (sums["top1"], sums["top5"]) == ((ranks < 1).sum(), (ranks < 5).sum())
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(sums["nll"], losses.sum(), rtol=1e-5)
