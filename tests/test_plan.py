"""What `plan` reads in a compiled program is what the program does; its report is true, its refusals are clear."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.commands import call
from tests.helpers import tiny_config
from tokenformer_jax.config import MeshConfig
from tokenformer_jax.devices.sharding import MESH_AXES, make_mesh
from tokenformer_jax.planning.hlo import read_program
from tokenformer_jax.planning.plan import make_plan
from tokenformer_jax.training.language import train_flops_per_token

pytestmark = pytest.mark.usefixtures("tpu_compiler")
MESH = MeshConfig(slice=1, data=2, fsdp=2, tensor=2)
SIZES = {axis: getattr(MESH, axis) for axis in MESH_AXES}

# A dot as a TPU's compiler writes it: a convolution whose window slides over padding that meets no input.
PADDED = """
HloModule padded, is_scheduled=true

ENTRY %main (x: f32[8,32], w: f32[32,16]) -> f32[8,16] {
  %x = f32[4,8,32]{2,1,0:T(8,128)} parameter(0)
  %w = f32[4,32,16]{2,1,0:T(8,128)S(1)} parameter(1)
  ROOT %c = f32[4,8,16] convolution(%x, %w), window={size=4 stride=3 pad=0_9 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""

# An element of a tuple, as older versions of jax write it, and as newer ones do.
ELEMENTS = {
    "named": """
ENTRY %main (x: f32[8], y: f32[16]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %pair = (f32[8]{0}, f32[16]{0}) tuple(%x, %y)
  %second = f32[16]{0} get-tuple-element(%pair), index=1
  ROOT %out = f32[16]{0} negate(%second)
}
""",
    "numbered": """
ENTRY %main (x: f32[8], y: f32[16]) -> f32[16] {
  %x = f32[8]{0} parameter(0)
  %y = f32[16]{0} parameter(1)
  %pair = (f32[8]{0}, f32[16]{0}) tuple(%x, %y)
  ROOT %out = f32[16]{0} negate(%pair#1)
}
""",
}

# A fusion within one, as a TPU's compiler joins a layer's slice with the exchange and the product that follow it.
NESTED = """
%slice (a: f32[12,8,16], i: s32[]) -> f32[8,16] {
  %a = f32[12,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,16]{2,1,0} dynamic-slice(%a, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = f32[8,16]{1,0} bitcast(%one)
}

%update (b: f32[12,8,16], new: f32[8,16], j: s32[]) -> f32[12,8,16] {
  %b = f32[12,8,16]{2,1,0} parameter(0)
  %new = f32[8,16]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %nought = s32[] constant(0)
  %wide = f32[1,8,16]{2,1,0} bitcast(%new)
  ROOT %put = f32[12,8,16]{2,1,0} dynamic-update-slice(%b, %wide, %j, %nought, %nought)
}

%joined (stack: f32[12,8,16], all: f32[4,8,16], n: s32[]) -> f32[12,8,16] {
  %stack = f32[12,8,16]{2,1,0} parameter(0)
  %all = f32[4,8,16]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %layer = f32[8,16]{1,0} fusion(%stack, %n), kind=kLoop, calls=%slice
  %reduced = f32[8,16]{1,0} custom-call(%layer, %all), custom_call_target="x"
  ROOT %out = f32[12,8,16]{2,1,0} fusion(%stack, %reduced, %n), kind=kLoop, calls=%update
}

ENTRY %main (x: f32[12,8,16], y: f32[4,8,16], at: s32[]) -> f32[12,8,16] {
  %x = f32[12,8,16]{2,1,0} parameter(0)
  %y = f32[4,8,16]{2,1,0} parameter(1)
  %at = s32[]{:S(6)} parameter(2)
  ROOT %f = f32[12,8,16]{2,1,0} fusion(%x, %y, %at), kind=kOutput, calls=%joined
}
"""


def compiled_text(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_contractions_in_nested_loops_are_counted_as_often_as_they_run():
    x, weights = jnp.ones((8, 16)), jnp.ones((5, 16, 16))

    def layer(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

    program = read_program(compiled_text(lambda x, w: jax.lax.scan(layer, x, w)[0], x, weights), {"data": 1})
    assert sum(o.flops * o.count for o in program.operations) == 5 * 3 * 2 * 8 * 16 * 16
    assert not program.collectives


@pytest.mark.parametrize("written", ELEMENTS)
def test_an_element_of_a_tuple_is_read_as_what_it_is(written):
    (operation,) = read_program(ELEMENTS[written], {"data": 1}).operations
    assert operation.bytes == 4 * (16 + 16)


def test_of_a_slice_in_a_fusion_within_a_fusion_only_the_slice_is_moved():
    (operation,) = read_program(NESTED, {"data": 1}).operations
    layer = 4 * 8 * 16
    assert operation.bytes == layer + 4 * layer + layer  # read of x and of y, and written to x


def test_a_convolution_counts_where_its_window_meets_inputs():
    program = read_program(PADDED, {"data": 1})
    (operation,) = program.operations
    positions = np.arange(4)[:, None] * 3 + np.arange(4)
    pairs = np.sum((positions % 4 == 0) & (positions <= 12))
    assert operation.flops == 2 * 8 * 16 * 32 * pairs
    assert operation.bytes == 4 * (4 * 8 * 32 + 4 * 8 * 16)  # the weights lie in the memory on the chip


@pytest.mark.parametrize("axes", [("tensor",), ("data", "fsdp"), ("fsdp",), ("data", "fsdp", "tensor")])
def test_collectives_name_their_mesh_axes_and_what_they_move(axes):
    mesh = make_mesh(MESH)
    devices = int(np.prod([SIZES[axis] for axis in axes]))

    def total(x):
        def turn(x, _):
            return jax.lax.psum(x, axes) / devices, None

        return jax.lax.scan(turn, x, None, length=7)[0]

    mapped = jax.shard_map(total, mesh=mesh, in_specs=P(axes), out_specs=P(axes), check_vma=False)
    x = jax.ShapeDtypeStruct((8 * devices, 3), jnp.float32, sharding=NamedSharding(mesh, P(axes)))
    (found,) = read_program(compiled_text(mapped, x), SIZES).collectives
    assert (found.kind, found.axes, found.bytes, found.count) == ("all-reduce", axes, 8 * 3 * 4, 7)
    assert found.received == 2 * (devices - 1) / devices * 8 * 3 * 4


def test_gathers_count_the_whole_that_they_make():
    mesh = make_mesh(MESH)
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        text = (
            jax.jit(lambda x: jax.lax.with_sharding_constraint(2 * x, P()), out_shardings=NamedSharding(mesh, P()))
            .lower(x)
            .compile()
            .as_text()
        )
    (found,) = read_program(text, SIZES).collectives
    assert (found.kind, found.axes, found.bytes, found.received) == ("all-gather", ("fsdp",), 192, 96)


def test_a_loop_without_a_known_end_is_refused():
    text = compiled_text(lambda x: jax.lax.while_loop(lambda x: x[0] < 9.0, lambda x: x * 2, x), jnp.ones(3))
    with pytest.raises(ValueError, match="a loop whose turns are not in the program's text"):
        read_program(text, {"data": 1})


def test_a_plan_of_a_tpu_pod_adds_up():
    pytest.importorskip("libtpu")
    cfg = tiny_config(mesh__fsdp=4, batch_size=8, model__dtype="bfloat16")
    plan = make_plan(cfg, "v5e:2x2")
    memory = plan["memory"]
    assert plan["fits"] and plan["devices"] == 4
    assert memory["moments"] == 2 * memory["parameters"] + 2 * 4  # and two counters
    assert memory["parameters"] == plan["model_parameters"] * 4 / 4
    assert memory["total"] == sum(size for name, size in memory.items() if name not in ("total", "limit"))
    tokens = cfg.batch_size * cfg.model.context_length / 4
    assert plan["model_flops"] == tokens * train_flops_per_token(cfg.model)
    attention = tokens * 12 * cfg.model.num_layers * cfg.model.context_length * cfg.model.embed_dim
    assert plan["contraction_flops"] >= plan["model_flops"] - attention
    assert {row["axes"] for row in plan["collectives"]} == {("fsdp",)}
    assert 0 < plan["mfu_one_after_another"] <= plan["mfu_at_most"] <= 1


def test_a_plan_of_what_does_not_fit_says_what_it_would_need():
    pytest.importorskip("libtpu")
    cfg = tiny_config(mesh__fsdp=4, batch_size=4 * 2**17, model__context_length=256)
    plan = make_plan(cfg, "v5e:2x2")
    assert not plan["fits"] and "seconds" not in plan
    assert plan["memory"]["total"] > plan["memory"]["limit"] > 15e9


def run(*arguments):
    return call("plan", "--config=configs/quickstart.py:small", *arguments, XLA_FLAGS="")


def test_a_plan_of_gpus_adds_up_or_says_what_it_needs(tmp_path):
    arguments = "--topology=h100:2x4", "--config.mesh.fsdp=8", "--config.model.dtype=bfloat16", f"--out={tmp_path}"
    done = run(*arguments)
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        assert done.returncode == 2
        assert "needs the GPU compiler; use pip install -r requirements-gpu.txt" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["devices"] == 8 and plan["fits"]
    assert {axis for c in plan["collectives"] for axis in c["axes"]} == {"fsdp"}
    assert set(plan["kernels"]) == {"dot_product_attention_fwd", "dot_product_attention_bwd"}
    assert plan["contraction_flops"] + plan["kernel_flops"] >= 0.9 * plan["model_flops"]
    assert 0 < plan["mfu_one_after_another"] <= plan["mfu_at_most"] <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: --topology is missing; use --topology=v5e:4x4"),
        (
            ["--topology=v9:4x4"],
            "error: --topology=v9:4x4: must be one of v4, v5e, v5p, v6e, tpu7x, h100, a colon and a shape",
        ),
        (["--topology=h100:2x2x2"], "error: --topology=h100:2x2x2: must be one of v4, "),
        (["--topology=v5e:3x5"], "error: --topology=v5e:3x5: "),
        (["--topology=v5e:2x2"], "error: mesh: is of 1 devices, but the topology has 4; use --config.mesh.fsdp=4"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(arguments, message, tmp_path):
    pytest.importorskip("libtpu")
    done = run(*arguments, f"--out={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_the_command_leaves_a_plan_and_its_plot(tmp_path):
    pytest.importorskip("libtpu")
    done = run("--topology=v5e:2x2", "--config.mesh.fsdp=4", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["topology"] == "v5e:2x2" and (tmp_path / "plan.png").stat().st_size > 1000
    assert "MFU at most" in done.stdout and "fits" in done.stdout
    assert plan["run"]["fits"] and plan["run"]["total"]["steps"] == 1000 and plan["rungs"] == []
    assert "on 4 chips at an ASSUMED MFU of 40%" in done.stdout
