"""The training loop."""

import contextlib
import pathlib

import jax

from tokenformer_jax.config import Config
from tokenformer_jax.running.log import Log
from tokenformer_jax.running.run import (
    BadStep,
    Run,
    agree_with_workdir,
    climb,
    is_time,
    open_run,
    roll_back,
)
from tokenformer_jax.running.signals import StopSignals
from tokenformer_jax.storage.workdir import only_writer
from tokenformer_jax.training.metrics import Profiler
from tokenformer_jax.training.step import put_batch


def train(cfg: Config, workdir: pathlib.Path) -> None:
    """Trains up to `cfg.steps`, from the workdir's newest checkpoint if it has one, and leaves a checkpoint.

    On its way the model climbs the config's rungs. SIGINT or SIGTERM saves and returns; the same call then goes on
    bit-identically, also in the middle of a growth.
    """
    agree_with_workdir(cfg, workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_writer(workdir))
        run = open_run(cfg, workdir)
        stack.enter_context(contextlib.closing(run.checkpoints))
        profiler = stack.enter_context(Profiler(cfg.profile_at, workdir))
        signals = stack.enter_context(StopSignals())
        while True:
            try:
                with contextlib.closing(Log(run, workdir)) as log, jax.transfer_guard("disallow"):
                    finished = train_stage(run, log, profiler, signals)
            except BadStep as error:
                run = roll_back(run, workdir, error)
                continue
            if not finished or run.is_last:
                return
            run = climb(run)


def train_stage(run: "Run", log: "Log", profiler: Profiler, signals: "StopSignals") -> bool:
    """Trains to the stage's end, or until the loss has stopped falling and another rung follows.

    The state of the stage's last step is saved. Returns False where a signal stopped it before.
    """
    cfg = run.cfg
    grown_now = bool(run.record.growth) and run.record.growth[-1]["step"] == run.start
    if grown_now:
        log.growth()
    if grown_now or (run.start and is_time(run.start, cfg.eval_every, cfg.steps)):
        log.first_evaluation()
    unread = None  # the step that was dispatched last: the loop reads one behind
    n = run.start
    while n < cfg.steps and not (run.plateau.reached(cfg.grow.patience) and not run.is_last):
        n += 1
        profiler.before_step(n)
        batch = put_batch(run.step, next(run.data))
        if n == run.start + 1:
            run.step.compile(run.state, batch)
        run.state, metrics = run.step.train(run.state, batch)
        if unread:
            log.step(*unread)
        unread = n, metrics
        stopping = signals.stop_after(n)
        saving = stopping or is_time(n, cfg.checkpoint_every, cfg.steps)
        evaluating = not stopping and is_time(n, cfg.eval_every, cfg.steps)
        if saving or evaluating:  # these wait for step n in any case
            log.step(*unread)
            unread = None
        if saving:
            run.save(n)
        if evaluating:
            log.evaluation(n)
        if stopping:
            run.checkpoints.wait()
            log.say(f"stopped and saved at step {n}; the same command goes on from there")
            return False
    run.checkpoints.wait()
    run.save(n)
    run.checkpoints.wait()
    if run.is_last:
        log.say(f"done at step {n}: the checkpoint and metrics.jsonl are in {log.workdir}")
    return True
