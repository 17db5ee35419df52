"""Laws of what growth costs: no device gathers what is sharded, and a checkpoint is read in parts."""

import json
import math
import re

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from benchmarks import growth_cost
from tests.helpers import tiny_config
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.storage.arrays import storage_context
from tokenformer_jax.training.step import make_step

BEFORE, AFTER = 256, 512  # tokens; everything else of the model is smaller than a shard of these


def counts(tokens):
    return {f"model__{name}_tokens": tokens for name in ("qkv", "out", "ffn")}


@pytest.mark.parametrize(
    "recipe, fsdp, tensor",
    [("zero_keys", 2, 4), ("zero_keys", 8, 1), ("isometric", 2, 4), ("isometric", 8, 1), ("split", 2, 4)],
)
def test_no_device_holds_a_whole_array_that_is_sharded(recipe, fsdp, tensor):
    """Not even more than its shard: in all that XLA compiles, no buffer is larger than the shard of a grown array."""
    sizes = {"mesh__fsdp": fsdp, "mesh__tensor": tensor}
    small, large = (tiny_config(**sizes, **counts(n), grow__recipe=recipe) for n in (BEFORE, AFTER))
    mesh = make_mesh(large.mesh)
    old, new = (make_step(cfg, mesh).abstract_state for cfg in (small, large))
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(
                lambda state, key: grow_state(state, new, large.model, key, recipe, ramp_steps=4),
                out_shardings=jax.tree.map(lambda a: a.sharding, new),
            )
            .lower(old, jax.eval_shape(lambda: jax.random.key(0)))
            .compile()
        )
    shapes = re.findall(r"\b(?:f32|u32|s32|pred)\[([\d,]+)\]", compiled.as_text())
    shard = large.model.num_layers * AFTER * large.model.embed_dim // 8
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) <= shard


def test_a_stack_of_layers_is_stored_a_layer_at_a_time(tmp_path):
    """So that a reader of a part never needs the whole."""
    state = {"blocks": np.ones((3, 40, 8)), "embed": np.ones((40, 8))}
    with storage_context(state):
        ocp.save(tmp_path / "saved", state)
    stored = ocp.metadata(tmp_path / "saved").metadata
    assert stored["blocks"].storage_metadata.chunk_shape == (1, 40, 8)
    assert stored["embed"].storage_metadata.chunk_shape == (40, 8)


@pytest.mark.slow
def test_the_benchmark_runs_and_two_processes_grow_what_one_saved(tmp_path, monkeypatch, capsys):
    out = tmp_path / "cost.json"
    command = f"growth_cost --config=tiny --repeats=1 --processes=2 --folder={tmp_path} --out={out}"
    monkeypatch.setattr("sys.argv", command.split())
    growth_cost.main()
    (run,) = json.loads(out.read_text())["runs"]
    assert len(run["grow"]["peak_bytes"]) == 2
    assert run["grow"]["max_logit_difference"] <= 5e-6 * max(1, run["grow"]["max_logit"])
    assert "grow / copy" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]
