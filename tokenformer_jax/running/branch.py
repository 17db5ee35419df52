"""A branch: a run that leaves another one at a checkpoint, and ends with the decay of its learning rate.

From one run at a constant rate come finished models of any budget.
"""

import dataclasses
import math
import pathlib
import shutil
from typing import Any

import jax

from tokenformer_jax.config import BUDGETS, Config
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import replace_file
from tokenformer_jax.growth.ladder import stages
from tokenformer_jax.running.run import end_of_schedule, stage_of
from tokenformer_jax.storage.checkpoints import Checkpoints
from tokenformer_jax.storage.record import Record
from tokenformer_jax.storage.workdir import load_config, new_workdir, require_empty
from tokenformer_jax.training.schedule import learning_rate


def branch(source: pathlib.Path, number: int, workdir: pathlib.Path, decay_fraction: float | None = None) -> Config:
    """Makes a workdir of a checkpoint of the source, whose learning rate decays from there on; returns its config.

    That is the config of a "wsd" run which ends where the branch does, and training leads to the same state, bit for
    bit. A workdir that is there already, since training of the branch was stopped, stays.

    Args:
      source: the workdir of a run, which is only read.
      number: a step with a checkpoint, at which the source's rate was at its peak.
      workdir: of the branch.
      decay_fraction: of the whole schedule; by default what the source's config says.

    Raises:
      UserError: there is no such checkpoint, or the rate was not at its peak there.
    """
    if (workdir / "config.json").exists():
        return load_config(workdir / "config.json")
    require_empty(workdir, "holds other files and no run")
    theirs = load_config(source / "config.json")
    checkpoints = Checkpoints(source / "checkpoints")
    record = checkpoints.record(checkpoints.choose(number))
    checkpoints.close()
    check_source(theirs, source, number, record)
    cfg = branch_config(theirs, number, record, decay_fraction)
    with new_workdir(workdir) as folder:
        if jax.process_index() == 0:
            name = pathlib.Path("checkpoints") / str(number)
            shutil.copytree(source / name, folder / name)
            replace_file(folder / "config.json", cfg.to_json())
    return cfg


def check_source(theirs: Config, source: pathlib.Path, number: int, record: Record) -> None:
    """Raises a UserError where the source's rate is not at its peak at that step."""
    plan, stage = stage_of(stages(theirs), record, number, source)
    optimizer, end = stage.optimizer, end_of_schedule(plan, record.rung, stage)
    rate = float(learning_rate(optimizer, end, record.schedule_start)(number))
    if not math.isclose(rate, optimizer.peak_learning_rate, rel_tol=1e-6):
        raise UserError(
            f"--decay_from={number}: the learning rate of {source} is {rate:.3g} there, not at its peak of "
            f"{optimizer.peak_learning_rate:.3g} (optimizer.schedule = {optimizer.schedule!r}); use a step between "
            "warm-up and decay of a run with 'constant' or 'wsd'"
        )


def branch_config(theirs: Config, number: int, record: Record, decay_fraction: float | None) -> Config:
    """The config whose schedule begins to decay at that step."""
    fraction = theirs.optimizer.decay_fraction if decay_fraction is None else decay_fraction
    done = number - record.schedule_start
    if not 0 < fraction < 1:
        raise UserError(f"--decay_fraction={fraction}: must be above 0 and below 1")
    length = max(1, round(done * fraction / (1 - fraction)))
    rungs = theirs.rungs[: record.rung]
    # Rungs that began early, since the loss no longer fell, move the end by as much.
    early = record.growth[-1]["step"] - rungs[-1]["step"] if rungs else 0
    optimizer = dataclasses.replace(theirs.optimizer, schedule="wsd", decay_fraction=fraction)
    no_budget: Any = dict.fromkeys(BUDGETS, 0.0)
    return dataclasses.replace(theirs, steps=number + length - early, rungs=rungs, optimizer=optimizer, **no_budget)
