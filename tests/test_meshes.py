"""Laws of the mesh: whatever its shape, it computes what one device does, and moves no more than that takes."""

import dataclasses
import re
from types import SimpleNamespace

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import assert_trees_equal, random_batch, step_of, tiny_config
from tokenformer_jax.config import MeshConfig
from tokenformer_jax.data.tokenizer import train_tokenizer
from tokenformer_jax.devices.sharding import MESH_AXES, arrange, make_mesh, this_process
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.sampling import Sampling, generate
from tokenformer_jax.nn.pattention import pattention
from tokenformer_jax.planning.hlo import device_groups, read_program
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.record import Record
from tokenformer_jax.training import step as step_module
from tokenformer_jax.training.step import make_step, put_batch

LENGTH = 11  # a prime: the size of whatever has positions divides by it, no other does
CFG = tiny_config(
    model__context_length=LENGTH,
    model__vocab_size=304,
    model__num_heads=8,
    model__rotary_fraction=0.5,
    model__qkv_tokens=21,  # padded to 24
    model__out_tokens=37,
    model__ffn_tokens=93,
    model__pad_tokens_to=8,
    optimizer__clip_norm=1e9,  # so that Adam's first moment is the gradient
)
MESHES = [
    (1, 8, 1, 1),
    (1, 1, 8, 1),
    (1, 1, 1, 8),
    (1, 2, 2, 2),
    (2, 2, 2, 1),
    (2, 1, 2, 2),
    (1, 1, 2, 4),
    (1, 4, 1, 2),
]
ALL = [(s, d, f, 8 // (s * d * f)) for s in (1, 2, 4, 8) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if s * d * f <= 8]
SLICED = (2, 1, 2, 2)


def on(mesh, cfg=CFG):
    return dataclasses.replace(cfg, mesh=MeshConfig(**dict(zip(MESH_AXES, mesh, strict=True))))


def placed(state, step):
    """The state, from the host or another mesh, as the step takes it."""
    return jax.device_put(state, jax.tree.map(lambda a: a.sharding, step.abstract_state))


@pytest.fixture(scope="module")
def alone():
    """One device: the state at first, and the state and the metrics after each of two steps."""
    step = step_of(CFG)
    state = step.init(jax.random.key(0))
    return [(jax.device_get(state), None), *steps_from(state, step)]


def steps_from(state, step):
    for i in range(2):
        state, metrics = step.train(state, put_batch(step, random_batch(CFG, i)))
        yield jax.device_get((state, metrics))


@pytest.mark.parametrize("mesh", [pytest.param(m, marks=() if m in MESHES else pytest.mark.slow) for m in ALL], ids=str)
def test_loss_gradients_and_a_training_step_equal_those_of_one_device(alone, mesh):
    """Gradients to 2e-5 of each array's largest, losses to 1e-6; Adam's step magnifies what tiny gradients round to."""
    step = step_of(on(mesh))
    (start, _), *expected = alone
    for (got, metrics), (want, wanted) in zip(steps_from(placed(start, step), step), expected, strict=True):
        assert metrics["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert metrics["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
        jax.tree.map(close, got.opt_state[0].mu, want.opt_state[0].mu)
    assert_trees_equal(got.params, want.params, atol=1e-4)  # of steps of 5e-3


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-5 * np.max(np.abs(want)))


@pytest.mark.parametrize("meshes", [(SLICED, (1, 1, 2, 4)), pytest.param(MESHES, marks=pytest.mark.slow)], ids=len)
def test_every_mesh_reads_the_checkpoint_of_another_bit_for_bit(alone, tmp_path, meshes):
    """One device writes, the first mesh reads and writes, the next reads, and so on to the one device again."""
    state = alone[-1][0]
    tokenizer, record = train_tokenizer(["a"], 257), Record({}, "", 1)
    steps = [step_of(on(mesh)) for mesh in [(1, 1, 1, 1), *meshes]]
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=len(steps))
    for n, (writer, reader) in enumerate(zip(steps, steps[1:] + steps[:1], strict=True)):
        data = iter(grain.MapDataset.range(3).to_iter_dataset())
        checkpoints.save(n, placed(state, writer), data, {"tokenizer": tokenizer.to_json()}, record)
        checkpoints.wait()
        restored = checkpoints.restore(n, reader.abstract_state)
        assert jax.tree.leaves(restored.params)[0].sharding.mesh == reader.mesh
        assert_trees_equal(restored, state)
    checkpoints.close()


def test_evaluation_and_generation_on_the_trained_mesh_equal_those_of_one_device(alone):
    state, tokens, losses = alone[-1][0], [], []
    for mesh in ((1, 1, 1, 1), SLICED):
        cfg = on(mesh)
        step = step_of(cfg)
        here = placed(state, step)
        losses.append(jax.device_get(step.evaluate(here, put_batch(step, random_batch(CFG, 9)))))
        prompt_BL = jnp.asarray(random_batch(CFG).tokens_BL[:, :3])
        tau = here.tau_now()
        with jax.set_mesh(step.mesh):
            stream = generate(cfg.model, here.params, tau, prompt_BL, 6, how=Sampling(temperature=0.0))
            tokens.append(np.concatenate(list(stream)))
    np.testing.assert_array_equal(tokens[1], tokens[0])
    assert losses[1]["nll"] == pytest.approx(losses[0]["nll"], rel=1e-6)
    assert losses[1]["weights"] == losses[0]["weights"]


@pytest.fixture(scope="module")
def lowered():
    """The training step for two slices, as JAX hands it to XLA, and as XLA compiles it."""
    cfg, jitted = on(SLICED), {}
    with pytest.MonkeyPatch.context() as patch:
        jit = jax.jit

        def remember(function, **how):
            return jitted.setdefault(function.__name__, jit(function, **how))

        patch.setattr(step_module.jax, "jit", remember)
        step = make_step(cfg, make_mesh(cfg.mesh))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=step.batch), random_batch(cfg))
    with jax.set_mesh(step.mesh):
        lowered = jitted["train"].lower(step.abstract_state, batch)
        return lowered.as_text(), lowered.compile().as_text()


def test_the_step_asks_for_activations_by_rows_and_for_parameters_by_tokens(lowered):
    constraints = re.findall(r"sdy.sharding_constraint %\w+ <@mesh, (\[.*?\])> : tensor<(.*?)xf32>", lowered[0])
    rows, tensor = '{"slice", "data", "fsdp"}', '{"tensor"}'
    expected = {
        (f"[{rows}, {{}}, {{}}]", f"8x{LENGTH}x32"),
        (f"[{rows}, {{}}, {tensor}, {{}}]", f"8x{LENGTH}x8x4"),
        *((f"[{tensor}, {{}}]", f"{tokens}x32") for tokens in (24, 40, 96)),
    }
    assert expected <= set(constraints)


def collectives(hlo):
    """Kind, shapes of the results, and the mesh axes between whose devices it communicates, of each collective."""
    for line in hlo.splitlines():
        match = re.search(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter|ragged-\w+)(?:-start)?\(", line)
        if match and not match[2].endswith("-done"):
            shapes = [tuple(map(int, s.split(","))) if s else () for s in re.findall(r"\w+\[([\d,]*)\]", match[1])]
            groups = np.unravel_index(device_groups(line, 8), SLICED)
            axes = {axis for axis, places in zip(MESH_AXES, groups, strict=True) if np.any(places != places[:, :1])}
            yield match[2], shapes, axes


def has_positions(shape):
    return any(size % LENGTH == 0 for size in shape)


def test_of_the_batch_only_what_is_as_wide_as_the_model_moves_and_only_between_devices_that_share_tokens(lowered):
    """No scores or weights of parameter tokens, no stack of layers, nothing to other rows' devices."""
    rows = 8 // 4
    moved = [(shape, axes) for _, shapes, axes in collectives(lowered[1]) for shape in shapes if has_positions(shape)]
    assert moved
    for shape, axes in moved:
        assert axes == {"tensor"} and np.prod(shape) <= rows * LENGTH * 32, shape


def test_no_parameter_is_gathered_whole_over_tensor_but_the_embedding_to_look_tokens_up(lowered):
    gathers = [
        (shape, axes)
        for kind, shapes, axes in collectives(lowered[1])
        for shape in shapes
        if kind == "all-gather" and not has_positions(shape)
    ]
    over_tensor = [shape for shape, axes in gathers if "tensor" in axes]
    assert over_tensor == [(304, 32)]
    assert all(axes == {"fsdp"} for shape, axes in gathers if shape not in over_tensor)
    largest = max(np.prod(shape) for shape, _ in gathers if shape not in over_tensor)
    assert largest <= 304 // 2 * 32  # a layer's tokens of one device, or its part of the embedding


def test_between_slices_only_sums_of_gradients_and_scalars_go(lowered):
    between = [(kind, shapes) for kind, shapes, axes in collectives(lowered[1]) if "slice" in axes]
    assert {kind for kind, _ in between} == {"all-reduce"}
    assert not any(has_positions(shape) for _, shapes in between for shape in shapes)


def pod(platform):
    """Stand-ins for the devices of two slices, each of two hosts with four."""
    kinds = {"platform": platform, "device_kind": "stand-in"}
    return [SimpleNamespace(id=i, slice_index=i // 8, process_index=i // 4, **kinds) for i in range(16)]


def test_only_the_slice_axis_crosses_slices():
    devices = pod("gpu")
    grid = arrange(MeshConfig(slice=2, data=2, fsdp=2, tensor=2), devices[::2] + devices[1::2])  # in any order
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert grid.shape == (2, 2, 2, 2)
    assert (slices[0] == 0).all() and (slices[1] == 1).all()


@pytest.mark.parametrize(
    "sizes, devices_each, parts",
    [((4, 1, 1), 1, [0, 1, 2, 3]), ((1, 2, 2), 1, [0, 0, 1, 1]), ((1, 1, 4), 1, [0] * 4), ((1, 2, 2), 2, [0, 1])],
)
def test_processes_that_share_tokens_read_the_same_part_and_all_parts_are_read(monkeypatch, sizes, devices_each, parts):
    shape = (1, *sizes)
    devices = [SimpleNamespace(process_index=i // devices_each) for i in range(4)]
    mesh = SimpleNamespace(devices=np.array(devices).reshape(shape), shape=dict(zip(MESH_AXES, shape, strict=True)))
    read = []
    for process in range(len(parts)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        read.append(this_process(mesh))
    assert [part["process_index"] for part in read] == parts
    assert {part["process_count"] for part in read} == {len(set(parts))}


def test_hosts_of_gpus_may_be_taken_as_one_network():
    assert arrange(MeshConfig(data=1, fsdp=16, tensor=1), pod("gpu")).shape == (1, 1, 16, 1)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 2, "fsdp": 4, "tensor": 2}, "mesh.slice = 1: these devices form 2 slices; use 2"),
        ({"slice": 4, "data": 1, "fsdp": 4, "tensor": 1}, "mesh.slice = 4: these devices form 2 slices; use 2"),
        (
            {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1},
            r"mesh = \(2, 1, 4, 1\) \(slice, data, fsdp, tensor\): uses 8 of 16",
        ),
        ({"slice": 2, "data": 2, "fsdp": 4, "tensor": 2}, "needs 32 devices, but there are 16"),
    ],
)
def test_a_mesh_that_does_not_fit_the_slices_is_refused_by_name(sizes, message):
    with pytest.raises(UserError, match=message):
        arrange(MeshConfig(**sizes), pod("tpu"))


@pytest.mark.parametrize("mesh", [(1, 1, 1, 8), (1, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_pattention_exchanges_one_output_and_one_scalar_of_each_position_over_tensor_in_each_direction(mesh, recompute):
    """The scalars are the norm's sum, and in the backward pass that of its gradient."""
    sizes = dict(zip(MESH_AXES, mesh, strict=True))
    devices = make_mesh(MeshConfig(**sizes))
    rows, tokens = P(("slice", "data", "fsdp")), P("tensor", "fsdp")
    arrays = [((8, LENGTH, 16), rows), ((64, 16), tokens), ((64, 16), tokens), ((8, LENGTH, 16), rows)]
    x, keys, values, dy = (jax.ShapeDtypeStruct(s, float, sharding=NamedSharding(devices, p)) for s, p in arrays)

    def forward(x, keys, values):
        return pattention(x, keys, values, 8.0, recompute=recompute)

    def both(x, keys, values, dy):
        y, backward = jax.vjp(forward, x, keys, values)
        return y, *backward(dy)

    for function, arguments, results in ((forward, (x, keys, values), x), (both, (x, keys, values, dy), None)):
        shardings = jax.tree.map(lambda a: a.sharding, results or (x, x, keys, values))
        with jax.set_mesh(devices):
            text = jax.jit(function, out_shardings=shardings).lower(*arguments).compile().as_text()
        directions = 1 if results else 2
        over_tensor = [c for c in read_program(text, sizes).collectives if "tensor" in c.axes]
        local = 8 // (mesh[0] * mesh[1] * mesh[2]) * LENGTH * 4
        assert sum(c.bytes for c in over_tensor) == local * (1 + 16) * directions
        assert {(c.kind, c.axes) for c in over_tensor} == {("all-reduce", ("tensor",))}
