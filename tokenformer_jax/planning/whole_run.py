"""A whole run on a pod: each of its stages compiled, and the hours and the price of all its steps."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from tokenformer_jax.config import Config, IndivisibleBatch
from tokenformer_jax.devices.hardware import Chip
from tokenformer_jax.devices.sharding import MESH_AXES
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import run_path
from tokenformer_jax.growth.ladder import stages, with_budget
from tokenformer_jax.growth.recipes import check_growth
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.planning.fit import changes, find_fit, meshes
from tokenformer_jax.planning.plan import describe, devices_of, make_plan, tokens_of_stage
from tokenformer_jax.storage.trained import newest_good, open_checkpoint
from tokenformer_jax.training.step import step_flops_per_token
from tokenformer_jax.training.tasks import task_of

Say = Callable[[str], None]
MEASURED = "measured on one H100: 39% at 124M parameters, 43% at 1.4B; on TPUs and pods: not yet"


class Since(NamedTuple):
    """Where a run begins: at its birth, or as what a trained one grows into."""

    step: int = 0
    tokens: int = 0  # that were seen until there
    flops: float = 0.0
    grows_from: Config | None = None


BIRTH = Since()


def beginning(source: str | None, from_step: int, cfg: Config) -> Since:
    """Where a run of this config begins that grows from the newest checkpoint of a workdir, or from a step."""
    if source is None:
        return Since(from_step)
    if from_step:
        raise UserError(f"--from_step={from_step}: goes without --source, whose step is taken")

    def read(number: int) -> Since:
        old, _, record = open_checkpoint(workdir, number)
        before = dataclasses.replace(cfg, model=old.model)
        return Since(number, record.tokens, record.train_flops, before)

    workdir = run_path(source, "--source")
    return newest_good(workdir, None, read)


def plan_run(
    cfg: Config, topology: str, slices: int, mfu: float, price: float, since: Since, suggest: bool, say: Say
) -> dict[str, Any]:
    """Checks all stages of a run, says what it takes, and compiles the step of each.

    Returns:
      `plan.make_plan`'s report of the first stage; its "rungs" are those of the others; its "run" is `bill`'s.

    Raises:
      UserError: before anything is compiled.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu={mfu:g}: must be above 0, and 1 at most; use 0.4")
    if not 0 <= price < math.inf:
        raise UserError(f"--price={price:g}: must be 0 or above; use 2.0")
    devices, chip = devices_of(topology, slices)
    plan = run_stages(cfg, since)
    for number, stage in enumerate(plan):
        check_mesh(stage, len(devices), slices, number)
    run = bill(plan, len(devices), chips_of(topology, slices), chip, mfu, price, since)
    say(describe_bill(run))
    found = []
    for number, stage in enumerate(plan):
        name = run["stages"][number]["stage"]
        say(f"compiling {number + 1} of {len(plan)}: {name}; it can take minutes")
        before = plan[number - 1] if number else since.grows_from
        report = make_plan(stage, topology, slices, before)
        if not report["fits"] and suggest:
            say(f"{name} does not fit")
            make = functools.partial(make_plan, topology=topology, slices=slices, before=before)
            other = find_fit(stage, devices, slices, make, say, report, before)
            if other:
                report["would_fit"] = changes(stage, other, number)
        found.append(report | {"stage": name})
    run["fits"] = all(report["fits"] for report in found)
    return found[0] | {"rungs": found[1:], "run": run}


def run_stages(cfg: Config, since: Since) -> list[Config]:
    step, before = since.step, since.grows_from
    if step and cfg.budget and not before:
        raise UserError(
            f"--from_step={step}: what was spent until there is not known, which config.{cfg.budget} counts; "
            f"use --source=W, or config.steps and config.{cfg.budget} = 0"
        )
    plan = with_budget(stages(cfg), 0, step, since.tokens, since.flops)
    if not 0 <= step < plan[-1].steps:
        if before:
            raise UserError(f"--source: is at step {step} already; use more than config.steps = {plan[-1].steps}")
        raise UserError(f"--from_step={step}: use 0 to {plan[-1].steps - 1}, as config.steps = {plan[-1].steps}")
    if before:
        check_growth(before.model, plan[0].model, plan[0].grow.recipe)
    elif plan[0].grow.train == "new":
        raise UserError("grow.train = 'new': needs to know what does not learn; use --source=W, the run that grows")
    return plan


def check_mesh(stage: Config, devices: int, slices: int, rung: int) -> None:
    size = math.prod(getattr(stage.mesh, axis) for axis in MESH_AXES)
    if size != devices:
        other = next(meshes(stage, devices, slices), None)
        use = changes(stage, other, rung) if other else f"--config.mesh.fsdp={devices} and 1 for the others"
        where = f"rungs[{rung - 1}]: mesh" if rung else "mesh"
        raise UserError(f"{where}: is of {size} devices, but the topology has {devices}; use {use}")


def advise_division(error: IndivisibleBatch, topology: str, slices: int, say: Say) -> str:
    """The settings with which a batch divides and fits, as the end of the error's line; empty where none was found."""
    devices, _ = devices_of(topology, slices)
    say(f"{error}; looking for a mesh that divides it")
    other = find_fit(error.cfg, devices, slices, lambda other: make_plan(other, topology, slices), say)
    return (
        f"; or {changes(error.cfg, other, error.rung)}, which fits" if other else "; no mesh tried divides it and fits"
    )


def chips_of(topology: str, slices: int) -> int:
    return slices * math.prod(int(n) for n in topology.partition(":")[2].split("x"))


def bill(
    plan: list[Config], devices: int, chips: int, chip: Chip, mfu: float, price: float = 0.0, since: Since = BIRTH
) -> dict[str, Any]:
    """Hours, chip-hours and cost of each stage and of all, at an assumed MFU.

    Args:
      chip: of one device; a chip may be several.
      price: of a chip-hour, in any currency; 0: costs are left out.
      since: what was trained before, by the source that `grow` makes this run of.
    """
    rows: list[dict[str, Any]] = []
    began, before = since.step, since.grows_from
    for number, stage in enumerate(plan):
        task = task_of(stage)
        steps = max(0, stage.steps - began)
        began = max(began, stage.steps)
        step_flops = task.tokens_per_step(stage) * step_flops_per_token(stage, tokens_of_stage(stage, before))
        before = stage
        step_seconds = step_flops / (devices * chip.flops * mfu)
        rows.append(
            {
                "stage": f"rung {number}" if number else "start" if len(plan) > 1 else "run",
                "parameters": count_params(task.abstract_model(stage.model)[1]),
                "steps": steps,
                "tokens": steps * task.tokens_per_step(stage),
                "train_flops": steps * step_flops,
                "step_seconds": step_seconds,
                "hours": steps * step_seconds / 3600,
            }
        )
    for row in rows:
        row |= {"chip_hours": row["hours"] * chips} | ({"cost": row["hours"] * chips * price} if price else {})
    added = ("steps", "tokens", "train_flops", "hours", "chip_hours", *(["cost"] if price else []))
    total = {key: sum(row[key] for row in rows) for key in added}
    return {"assumed_mfu": mfu, "price": price, "chips": chips, "from_step": since.step, "stages": rows, "total": total}


def describe_bill(run: dict[str, Any]) -> str:
    """The bill as a table."""
    since = f"from step {run['from_step']:,} on" if run["from_step"] else "all steps"
    price = f", {run['price']:g} a chip-hour" if run["price"] else "; --price=2.0 adds what it costs"
    lines = [
        f"the whole run, {since}, on {run['chips']} chips at an ASSUMED MFU of {run['assumed_mfu']:.0%}{price}",
        f"  ({MEASURED})",
        "  not counted: compiling, evaluations, saves, stops",
        f"  {'':<10}{'parameters':>14}{'steps':>12}{'tokens':>10}{'FLOPs':>10}{'s a step':>10}{'hours':>10}"
        f"{'chip-hours':>13}" + (f"{'cost':>14}" if run["price"] else ""),
    ]
    rows = run["stages"] + ([{"stage": "total"} | run["total"]] if len(run["stages"]) > 1 else [])
    for row in rows:
        parameters = f"{row['parameters']:,}" if "parameters" in row else ""
        seconds = f"{row['step_seconds']:.4g}" if "step_seconds" in row else ""
        cost = f"{row['cost']:>14,.2f}" if "cost" in row else ""
        lines.append(
            f"  {row['stage']:<10}{parameters:>14}{row['steps']:>12,}{row['tokens']:>10.3g}{row['train_flops']:>10.3g}"
            f"{seconds:>10}{row['hours']:>10,.4g}{row['chip_hours']:>13,.1f}{cost}"
        )
    return "\n".join(lines)


def describe_run(found: dict[str, Any]) -> str:
    """The report of every stage, then the bill, and what speaks against them."""
    run, lines = found["run"], []
    reports = [found, *found["rungs"]]
    for report in reports:
        lines += [f"== {report['stage']}" if len(reports) > 1 else "", describe(report), ""]
        if not report["fits"]:
            fits = report.get("would_fit")
            lines += [f"{fits} would fit" if fits else "nothing tried fits: take a larger topology", ""]
    lines.append(describe_bill(run))
    for report in reports:
        if report.get("mfu_at_most", 1.0) < run["assumed_mfu"]:
            lines.append(
                f"warning: {report['stage']}: the compiled step allows an MFU of {report['mfu_at_most']:.0%} at most; "
                "use a lower --mfu"
            )
    if not run["fits"]:
        lines.append("hours and cost hold only for settings that fit")
    return "\n".join(lines).strip()
