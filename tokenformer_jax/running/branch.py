"""A branch: a run that leaves another one at a checkpoint, and ends with the decay of its learning rate.

From one run at a constant rate come finished models of any budget.
"""

import dataclasses
import math
import pathlib
from typing import Any

import jax

from tokenformer_jax.buckets import is_bucket
from tokenformer_jax.config import BUDGETS, Config
from tokenformer_jax.errors import UserError, listed
from tokenformer_jax.files import json_text, parse_json, replace_file
from tokenformer_jax.growth.ladder import stages
from tokenformer_jax.running.run import end_of_schedule, stage_of
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.in_bucket import copy_checkpoint
from tokenformer_jax.storage.workdir import load_config, new_workdir, require_empty
from tokenformer_jax.training.schedule import learning_rate


def branch(source: pathlib.Path, number: int, workdir: pathlib.Path, decay_fraction: float | None = None) -> Config:
    """Makes a workdir of a checkpoint of the source, whose learning rate decays from there on; returns its config.

    That is the config of a "wsd" run which ends where the branch does. Where the source has not grown, training leads
    to the same state, bit for bit; else τ keeps the ramp that was planned for the source. A workdir of the same branch
    stays, since its training may have been stopped.

    Args:
      source: the workdir of a run, which is only read.
      number: a step with a checkpoint, at which the source's rate was at its peak.
      workdir: of the branch.
      decay_fraction: of the whole schedule; by default what the source's config says.

    Raises:
      UserError: there is no such checkpoint, the rate was not at its peak there, or the workdir holds something else.
    """
    cfg = branch_config(source, number, decay_fraction)
    fraction = stages(cfg)[-1].optimizer.decay_fraction
    place = source if is_bucket(source) else source.absolute()
    origin = {"source": str(place), "step": number, "decay_fraction": fraction}
    if (workdir / "config.json").exists():
        if made_as(workdir) != origin:
            raise UserError(
                f"--workdir={workdir}: holds a run that did not leave {source} at step {number} with a decay_fraction "
                f"of {fraction:g}; name a new directory"
            )
        return load_config(workdir / "config.json")
    require_empty(workdir, "holds other files and no run")
    with new_workdir(workdir) as folder:
        if jax.process_index() == 0:
            copy_checkpoint(source / "checkpoints" / str(number), folder / "checkpoints" / str(number))
            replace_file(folder / "branch.json", json_text(origin, indent=2) + "\n")
            replace_file(folder / "config.json", cfg.to_json())
    return cfg


def made_as(workdir: pathlib.Path) -> Any:
    """What the branch of a workdir left, or None where it is no branch."""
    try:
        return parse_json((workdir / "branch.json").read_text())
    except (OSError, ValueError):
        return None


def branch_config(source: pathlib.Path, number: int, decay_fraction: float | None = None) -> Config:
    """The source's config, with a schedule that begins to decay at that step. Raises a UserError as `branch` does."""
    theirs, checkpoints = load_config(source / "config.json"), Checkpoints(source / "checkpoints")
    if number not in checkpoints.steps:
        raise UserError(f"--decay_from={number}: {checkpoints.directory} holds the steps {listed(checkpoints.steps)}")
    record = checkpoints.record(number)
    plan, stage = stage_of(stages(theirs), record, number, source)
    optimizer = stage.optimizer
    rate = float(learning_rate(optimizer, end_of_schedule(plan, record.rung, stage), record.schedule_start)(number))
    if not math.isclose(rate, optimizer.peak_learning_rate, rel_tol=1e-6):
        raise UserError(
            f"--decay_from={number}: the learning rate of {source} is {rate:.3g} there, not at its peak of "
            f"{optimizer.peak_learning_rate:.3g} (optimizer.schedule = {optimizer.schedule!r}); use a step between "
            "warm-up and decay of a run with 'constant' or 'wsd'"
        )
    fraction = optimizer.decay_fraction if decay_fraction is None else decay_fraction
    check_fraction(fraction)
    end = number + max(1, round((number - record.schedule_start) * fraction / (1 - fraction)))
    rungs = theirs.rungs[: record.rung]
    growth = record.growth[-1] if record.growth else {"step": 0}
    ramped = growth["step"] + growth.get("tau_ramp_steps", 0)
    if ramped > end:
        raise UserError(
            f"--decay_from={number}: the branch would end at step {end}, before τ reaches its target at step {ramped}; "
            "use a later step, or a larger --decay_fraction"
        )
    # Rungs that began early, since the loss no longer fell, move the end by as much.
    early = growth["step"] - rungs[-1]["step"] if rungs else 0
    decays = {"schedule": "wsd", "decay_fraction": fraction}
    no_budget: Any = dict.fromkeys(BUDGETS, 0.0)
    return dataclasses.replace(
        theirs,
        steps=end - early,
        rungs=tuple(rung | {"optimizer": rung.get("optimizer", {}) | decays} for rung in rungs),
        optimizer=dataclasses.replace(theirs.optimizer, **decays),  # type: ignore[arg-type]
        **no_budget,
    )


def check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"--decay_fraction={fraction:g}: must be above 0 and below 1; use 0.2, for instance")
