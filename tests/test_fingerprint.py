"""Laws of fingerprints: the same however an array lies on devices, and another for every other array."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tokenformer_jax.files import sealed, unsealed
from tokenformer_jax.planning.hlo import read_program
from tokenformer_jax.planning.plan import compile_step, devices_of
from tokenformer_jax.storage import fingerprint as module
from tokenformer_jax.storage.fingerprint import as_text, fingerprints


def of(x, shape=None):
    return as_text(fingerprints({"x": x}, {"x": shape} if shape else None)["x"])


def drawn(shape, dtype="float32", seed=0):
    """An array of random bits."""
    dtype = jnp.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def formula(x):
    """The definition, in numpy, for arrays of 32-bit numbers."""
    bits, place = x.reshape(-1).view(np.uint32), np.arange(x.size, dtype=np.uint32)
    u = bits ^ place * np.uint32(0x9E3779B9)
    u = (u ^ u >> 15) * np.uint32(0x85EBCA6B)
    first = u ^ u >> 16
    v = first * np.uint32(0xC2B2AE35)
    return "".join(f"{int(lane.sum(dtype=np.uint32)):08x}" for lane in (first, v ^ v >> 15))


@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (5, 6), (2, 3, 5), (2, 3, 4, 5)], ids=str)
def test_it_is_the_sum_that_its_module_defines(shape):
    x = drawn(shape)
    assert of(jnp.asarray(x)) == formula(x)


def test_blocks_do_not_show(monkeypatch):
    x = drawn((3, 64, 10))
    whole = of(jnp.asarray(x))
    for size in (1, 20, 320):
        monkeypatch.setattr(module, "_BLOCK", size)
        module._fingerprint.clear_cache()
        assert of(jnp.asarray(x)) == whole
    monkeypatch.undo()
    module._fingerprint.clear_cache()


SPECS = [P(), P(None, "a"), P("b", None, "a"), P(None, ("b", "a")), P(("a", "b"), None, "c"), P("c", "b", "a")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8"])
def test_it_is_the_same_on_any_mesh(dtype):
    x = drawn((8, 16, 4), dtype)
    alone = of(jnp.asarray(x))
    for shape in ((2, 2, 2), (4, 1, 2), (1, 8, 1), (2, 4, 1)):
        mesh = jax.make_mesh(shape, ("a", "b", "c"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
        for spec in SPECS:
            assert of(jax.device_put(x, NamedSharding(mesh, spec))) == alone, (shape, spec)


@pytest.mark.parametrize("spec", [None, P(None, "a"), P("b", "a")], ids=str)
def test_padding_does_not_count(spec):
    x = drawn((2, 10, 3))
    padded = jnp.full((4, 16, 3), 7, jnp.float32).at[:2, :10].set(x)
    if spec is not None:
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        padded = jax.device_put(padded, NamedSharding(mesh, spec))
    assert of(padded, x.shape) == of(jnp.asarray(x))


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "float8_e4m3fn"]
)
def test_every_flipped_bit_changes_both_sums(dtype):
    x = drawn((2, 3), dtype)
    before = of(jnp.asarray(x))
    for byte, bit in itertools.product(range(x.nbytes), range(8)):
        other = x.copy()
        other.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
        after = of(jnp.asarray(other))
        assert after[:8] != before[:8] and after[8:] != before[8:], (byte, bit)


def test_other_kinds_of_arrays():
    assert of(jnp.asarray([True, False])) != of(jnp.asarray([False, True]))
    assert of(jnp.asarray([1, -2], jnp.int4)) != of(jnp.asarray([1, 2], jnp.int4))
    assert of(jax.random.key(1)) != of(jax.random.key(2))
    with jax.enable_x64():
        x = drawn((2, 3), "float64")
        before = of(jnp.asarray(x))
        for byte, bit in itertools.product(range(x.nbytes), range(8)):
            other = x.copy()
            other.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
            assert of(jnp.asarray(other)) != before


def test_elements_and_rows_that_change_places_show():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)  # numbers that have most of their bits in common
    seen = {of(jnp.asarray(x))}
    for i, j in itertools.combinations(range(24), 2):
        other = x.copy().reshape(-1)
        other[[i, j]] = other[[j, i]]
        seen.add(of(jnp.asarray(other.reshape(4, 6))))
    assert len(seen) == 1 + 24 * 23 // 2
    for order in list(itertools.permutations(range(4)))[1:]:
        seen.add(of(jnp.asarray(x[list(order)])))
    seen.add(of(jnp.asarray(x.T.reshape(4, 6))))
    assert len(seen) == 1 + 24 * 23 // 2 + 23 + 1


def test_computing_it_leaves_the_array_to_be_donated():
    x = jnp.asarray(drawn((256, 256), "float32"))
    before = formula(np.asarray(x))
    found = fingerprints({"x": x})["x"]
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(x))
    assert x.is_deleted() and as_text(found) == before


def test_a_changed_byte_of_sealed_json_shows_or_changes_nothing():
    tree = {"a": [1, 2.5], "b": {"text": "é"}, "c": None}
    raw = sealed(tree).encode()
    assert unsealed(raw.decode()) == tree == {k: v for k, v in json.loads(raw).items() if k != "checksum"}
    for byte, bit in itertools.product(range(len(raw)), range(8)):
        other = bytearray(raw)
        other[byte] ^= 1 << bit
        try:
            assert unsealed(other.decode()) == tree
        except ValueError:
            continue


def test_on_a_tpu_each_device_reads_its_shard_once_and_exchanges_nothing(tpu_compiler):
    pytest.importorskip("libtpu")
    devices, _ = devices_of("v5e:2x2")
    sharding = NamedSharding(Mesh(np.array(devices), "fsdp"), P(None, "fsdp"))
    x = jax.ShapeDtypeStruct((3, 512, 256), jnp.float32, sharding=sharding)
    _, text = compile_step(module._fingerprint.lower(x, x.shape, sharding))
    program = read_program(text, {"fsdp": 4})
    assert sum(o.bytes * o.count for o in program.operations) == pytest.approx(3 * 512 * 256 * 4 / 4, rel=0.01)
    assert not program.collectives
