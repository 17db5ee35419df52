"""What `plan` says of a whole run: hours and cost of every rung, checks before compiling, settings that would fit."""

import dataclasses
import json

import jax
import pytest

from tests.commands import call, complaint
from tests.helpers import tiny_config, write_config
from tokenformer_jax.config import IndivisibleBatch, read_config
from tokenformer_jax.configs import ladder
from tokenformer_jax.devices.hardware import CHIPS
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.ladder import stages, with_budget
from tokenformer_jax.planning.fit import ACTIVATIONS, MOST_TRIES, changes, find_fit, meshes
from tokenformer_jax.planning.plan import state_bytes, step_on
from tokenformer_jax.planning.whole_run import Since, bill, check_mesh, chips_of, describe_bill, run_stages
from tokenformer_jax.training.step import make_step
from tokenformer_jax.training.tasks import flops_per_token

RUNGS = ({"step": 4, "model": {"ffn_tokens": 128}}, {"step": 6, "model": {"ffn_tokens": 192}, "batch_size": 16})
NO_WARMUP = {"optimizer__warmup_steps": 0}


@pytest.mark.parametrize("mfu", [0.2, 0.4])
@pytest.mark.parametrize("chip, devices, chips", [("v5e", 16, 16), ("h100", 8, 8), ("tpu7x", 8, 4)])
def test_the_papers_ladder_is_billed_rung_by_rung(mfu, chip, devices, chips):
    plan = stages(read_config(ladder.get_config("all").to_dict()))
    sheet = CHIPS[chip]
    each = sheet if devices == chips else sheet._replace(flops=sheet.flops / 2)
    run = bill(plan, devices, chips, each, mfu, price=2.0)
    assert [row["steps"] for row in run["stages"]] == [600_000, 60_000, 60_000, 60_000]
    assert [round(row["parameters"] / 1e6, 1) for row in run["stages"]] == [123.6, 354.2, 753.8, 1309.7]
    total = run["total"]
    assert total["tokens"] == 780_000 * 512 * 1024
    assert total["hours"] == pytest.approx(total["train_flops"] / (chips * sheet.flops * mfu) / 3600)
    assert total["chip_hours"] == pytest.approx(total["hours"] * chips)
    assert total["cost"] == pytest.approx(2 * total["chip_hours"])
    for key, value in total.items():
        assert value == pytest.approx(sum(row[key] for row in run["stages"]))


def test_steps_that_a_source_has_trained_are_not_billed():
    plan = stages(tiny_config(rungs=RUNGS, steps=10, **NO_WARMUP))
    steps = {
        start: [row["steps"] for row in bill(plan, 1, 1, CHIPS["v5e"], 0.4, 0.0, Since(start))["stages"]]
        for start in (0, 5)
    }
    assert steps == {0: [4, 2, 4], 5: [0, 1, 4]}
    assert "cost" not in bill(plan, 1, 1, CHIPS["v5e"], 0.4)["total"]


def test_a_rung_whose_new_tokens_learn_alone_takes_less_memory_and_fewer_flops():
    for train in ("all", "new"):
        rungs = ({**RUNGS[0], "grow": {"train": train}},)
        plan = stages(tiny_config(rungs=rungs, steps=10, **NO_WARMUP))
        step, row = step_on(plan[1], jax.devices()[:1], plan[0]), bill(plan, 1, 1, CHIPS["v5e"], 0.4)["stages"][1]
        learn = 2 * 2 * 32 * 32 if train == "new" else row["parameters"]  # keys and values, 2 layers, width 32
        assert state_bytes(step.abstract_state)["moments"] == pytest.approx(2 * 4 * learn, abs=16)
        assert step.flops_per_token == flops_per_token(plan[1]) - 2 * (row["parameters"] - learn)
        assert row["train_flops"] == 6 * 128 * step.flops_per_token


def test_new_tokens_alone_are_planned_for_a_source():
    cfg = tiny_config(model__ffn_tokens=128, grow__train="new", **NO_WARMUP)
    with pytest.raises(UserError, match=r"^grow.train = 'new': .*; use --source=W, the run that grows$"):
        run_stages(cfg, Since())
    with pytest.raises(UserError, match=r"^--source: is at step 8 already; use more than config.steps = 8$"):
        run_stages(cfg, Since(8, grows_from=tiny_config()))
    with pytest.raises(UserError, match="ffn_tokens"):
        run_stages(cfg, Since(2, grows_from=tiny_config(model__ffn_tokens=192)))


def test_a_budget_is_billed_as_its_steps():
    budget, steps = (tiny_config(rungs=RUNGS, **NO_WARMUP, **end) for end in ({"train_tokens": 1791.0}, {"steps": 10}))
    bills = [bill(run_stages(cfg, Since()), 4, 4, CHIPS["v5e"], 0.4, 1.0) for cfg in (budget, steps)]
    assert bills[0] == bills[1] and bills[0]["total"]["tokens"] == 6 * 128 + 4 * 256


def test_the_table_has_every_rung_the_total_and_its_assumption():
    plan = stages(tiny_config(rungs=RUNGS, steps=10, **NO_WARMUP))
    text = describe_bill(bill(plan, 4, 4, CHIPS["v5e"], 0.35, 2.5))
    assert "ASSUMED MFU of 35%, 2.5 a chip-hour" in text and "measured on one H100" in text
    assert [line.split()[0] for line in text.splitlines()[4:]] == ["start", "rung", "rung", "total"]
    assert "cost" in text and "cost" not in describe_bill(bill(plan, 4, 4, CHIPS["v5e"], 0.35)).splitlines()[3]


@pytest.mark.parametrize(
    "topology, slices, chips", [("v5e:4x4", 1, 16), ("v5p:2x2x2", 3, 24), ("h100:8", 1, 8), ("h100:2x8", 2, 32)]
)
def test_chips_of_a_topology(topology, slices, chips):
    assert chips_of(topology, slices) == chips


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"mesh__fsdp": 16}, r" = 1 \* 1 \* 1 \* 16 = 16; use config.batch_size = 16$"),
        (
            {"accumulation": 3},
            r"= 3 \* 1 \* 1 \* 1 = 3; use config.batch_size = 6 or 9, or config.accumulation = [24] or",
        ),
        (
            {"accumulation": 4, "mesh__data": 2, "mesh__fsdp": 2},
            r"config.mesh.data \* config.mesh.fsdp = 4 \* 1 \* 2 \* 2 = 16; "
            "use config.batch_size = 16, or config.accumulation = 1 or 2",
        ),
    ],
)
def test_an_indivisible_batch_names_its_keys_and_what_was_given(overrides, message):
    with pytest.raises(IndivisibleBatch, match=f"^config.batch_size = 8: must divide by .*{message}") as raised:
        tiny_config(**overrides)
    assert raised.value.cfg.batch_size == 8


def test_an_indivisible_batch_of_a_rung_is_named_with_it():
    with pytest.raises(IndivisibleBatch, match=r"^rungs\[0\]: config.batch_size = 9: must divide by") as raised:
        stages(tiny_config(steps=10, mesh__fsdp=4, rungs=({**RUNGS[0], "batch_size": 9},)))
    assert raised.value.rung == 1


@pytest.mark.parametrize("devices, slices", [(1, 1), (4, 1), (8, 1), (8, 2), (6, 1)])
def test_every_mesh_offered_can_be_and_has_all_devices(devices, slices):
    cfg = tiny_config(accumulation=2)
    offered = list(meshes(cfg, devices, slices))
    assert offered or devices == 6  # 3 divides neither the batch nor the heads
    for other in offered:
        mesh = other.mesh
        assert mesh.slice * mesh.data * mesh.fsdp * mesh.tensor == devices and mesh.slice == slices
        assert other.accumulation <= 2 and dataclasses.replace(other, mesh=cfg.mesh, accumulation=2) == cfg
        assert read_config(dataclasses.asdict(other)) == other


def fake_compiler(limit, activations):
    """Reports what a device holds, were activations so many bytes a sequence, and half for each stronger remat."""
    seen = []

    def make(cfg):
        seen.append(cfg)
        rows = cfg.batch_size / cfg.accumulation / cfg.mesh.batch_shards
        held = sum(state_bytes(make_step(cfg, make_mesh(cfg.mesh)).abstract_state).values())
        needs = activations * rows / {"none": 1, "projections": 2, "full": 4}[cfg.model.remat]
        memory = {"state": held, ACTIVATIONS: needs, "total": held + needs, "limit": limit}
        return {"fits": held + needs <= limit, "memory": memory}

    return make, seen


MANY = {"mesh__fsdp": 8, "batch_size": 1 << 15}  # 65,536 tokens a device


@pytest.mark.parametrize(
    "overrides, limit, activations, expected",
    [
        ({"mesh__fsdp": 8}, 1.2e5, 1e5, "--config.model.remat=projections"),
        ({"mesh__fsdp": 8, "batch_size": 64}, 2e5, 1e5, "--config.model.remat=full --config.accumulation=2"),
        ({"mesh__fsdp": 8, "batch_size": 64}, 1.5e5, 3e5, "--config.model.remat=full --config.accumulation=8"),
        ({"mesh__fsdp": 8, "batch_size": 1 << 15}, 4e8, 1e5, "--config.accumulation=2"),  # 2 x 32,768 tokens a device
        ({"mesh__fsdp": 8, "batch_size": 1 << 15}, 1.2e8, 1e5, "--config.accumulation=4"),
        (
            {"mesh__fsdp": 8, "batch_size": 1 << 15},
            1.01e8,
            1e5,
            "--config.model.remat=projections --config.accumulation=4",
        ),
        ({"mesh__data": 8}, 2e5, 1e3, "--config.mesh.data=1 --config.mesh.fsdp=8"),
        ({"mesh__fsdp": 8}, 1e4, 1e3, None),
    ],
)
def test_what_fits_is_found_in_few_compilations(overrides, limit, activations, expected):
    cfg = tiny_config(**overrides)
    make, seen = fake_compiler(limit, activations)
    said = []
    first = make(cfg)
    assert not first["fits"]
    found = find_fit(cfg, jax.devices(), 1, make, said.append, first)
    assert (found and changes(cfg, found)) == expected
    assert len(said) == len(seen) - 1 <= MOST_TRIES
    assert not found or make(found)["fits"]
    assert all("of at most" in line for line in said)


def test_a_batch_that_does_not_divide_gets_another_mesh():
    with pytest.raises(IndivisibleBatch) as raised:
        tiny_config(batch_size=6, mesh__fsdp=8)
    make, _ = fake_compiler(1e9, 1.0)
    found = find_fit(raised.value.cfg, jax.devices(), 1, make, lambda line: None)
    assert changes(raised.value.cfg, found) == "--config.mesh.fsdp=2 --config.mesh.tensor=4"


def test_changes_of_a_rung_are_said_as_its_keys():
    cfg = tiny_config(mesh__data=8)
    mesh = dataclasses.replace(cfg.mesh, data=1, fsdp=8)
    other = dataclasses.replace(cfg, mesh=mesh, accumulation=2)
    assert changes(cfg, other, 2) == "config.rungs[1] with mesh={'data': 1, 'fsdp': 8}, accumulation=2"


def test_a_mesh_of_other_devices_is_told_one_that_can_be():
    with pytest.raises(UserError, match=r"mesh: is of 1 devices, but the topology has 8; use --config.mesh.fsdp=8"):
        check_mesh(tiny_config(), 8, 1, 0)
    with pytest.raises(UserError, match=r"has 8; use --config.mesh.fsdp=2 --config.mesh.tensor=4"):
        check_mesh(tiny_config(batch_size=6), 8, 1, 0)
    rung = with_budget(stages(tiny_config(rungs=RUNGS, steps=10, **NO_WARMUP)))[1]
    with pytest.raises(UserError, match=r"rungs\[0\]: mesh: is of .* use config.rungs\[0\] with mesh={'fsdp': 8}"):
        check_mesh(rung, 8, 1, 1)


@pytest.fixture
def config(tmp_path):
    pytest.importorskip("libtpu")
    cfg = tiny_config(rungs=RUNGS, steps=10, mesh__fsdp=4, **NO_WARMUP)
    return write_config(tmp_path / "config.py", cfg)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mfu=0"], "--mfu=0: must be above 0"),
        (["--mfu=1.5"], "--mfu=1.5: must be above 0, and 1 at most; use 0.4"),
        (["--price=-1"], "--price=-1: must be 0 or above; use 2.0"),
        (["--from_step=10"], "--from_step=10: use 0 to 9, as config.steps = 10"),
        (["--from_step=1", "--config.train_tokens=1e6"], "--from_step=1: what was spent until there is not known"),
        (["--config.mesh.fsdp=2"], "mesh: is of 2 devices, but the topology has 4; use --config.mesh.fsdp=4"),
        (["--config.batch_size=6", "--nosuggest"], "config.batch_size = 6: must divide by config.accumulation"),
    ],
)
def test_a_mistake_is_told_before_anything_is_compiled(config, tmp_path, flags, message):
    said = complaint(call("plan", config, "--topology=v5e:2x2", *flags, f"--out={tmp_path}/out", XLA_FLAGS=""))
    assert message in said


def test_the_command_plans_and_bills_every_rung(config, tmp_path):
    (tmp_path / "out").mkdir()
    done = call("plan", config, "--topology=v5e:2x2", "--price=2", f"--out={tmp_path}/out", XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert sum(line.startswith("compiling ") for line in said) == 3 and "ASSUMED" in said[0]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [report["batch_size"] for report in (plan, *plan["rungs"])] == [8, 8, 16]
    assert all(report["fits"] for report in plan["rungs"]) and plan["run"]["fits"]
    assert [row["steps"] for row in plan["run"]["stages"]] == [4, 2, 4]
    for row, report in zip(plan["run"]["stages"], (plan, *plan["rungs"]), strict=True):
        assert row["parameters"] == report["model_parameters"]
        assert row["train_flops"] == pytest.approx(row["steps"] * report["model_flops"] * 4)
    assert "== rung 2" in done.stdout and "total" in done.stdout
    assert "warning: start: the compiled step allows an MFU of" in done.stdout


def test_the_command_finds_a_mesh_for_a_batch_that_does_not_divide(config, tmp_path):
    flags = "--config.batch_size=6", "--config.rungs=()", "--topology=v5e:2x2", f"--out={tmp_path}/out"
    done = call("plan", config, *flags, XLA_FLAGS="")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: config.batch_size = 6: ")
    assert last.endswith("; or --config.mesh.fsdp=2 --config.mesh.tensor=2, which fits")
