"""The training loop: it dispatches step n, then reads step n - 1, and decides what is done next."""

import contextlib
import pathlib
import sys

import jax

from tokenformer_jax.config import Config
from tokenformer_jax.evaluation.perplexity import evaluate_split
from tokenformer_jax.running.log import Log
from tokenformer_jax.running.run import Run, check_workdir, next_rung, open_run, roll_back
from tokenformer_jax.running.signals import StopSignals
from tokenformer_jax.storage.arrays import by_name
from tokenformer_jax.storage.workdir import only_writer
from tokenformer_jax.training.non_finite import BadStep, what_is_bad
from tokenformer_jax.training.profiler import Profiler
from tokenformer_jax.training.step import Metrics, put_batch


def train(cfg: Config, workdir: pathlib.Path) -> bool:
    """Trains up to `cfg.steps` or a budget, from the workdir's newest checkpoint if it has one; leaves a checkpoint.

    On its way the model grows to each of the config's rungs. SIGINT, SIGTERM or the end of `cfg.max_minutes` saves and
    returns False; the same call then goes on bit-identically, also in the middle of a growth. True: it has finished.
    """
    check_workdir(cfg, workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_writer(workdir))
        run = open_run(cfg, workdir)
        stack.enter_context(run.checkpoints)
        if run.is_past_its_end:
            say_nothing_to_do(run, workdir)
            return True
        profiler = stack.enter_context(Profiler(cfg.profile_at, workdir))
        signals = stack.enter_context(StopSignals(cfg.max_minutes))
        while True:
            try:
                with Log(run, workdir) as log, jax.transfer_guard("disallow"):
                    finished = train_stage(run, log, profiler, signals)
            except BadStep as error:
                run = roll_back(run, workdir, error)
                continue
            if not finished or run.is_last:
                return finished
            run = next_rung(run)


def say_nothing_to_do(run: Run, workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        key = run.cfg.budget or "steps"
        spent = {"steps": run.start, "train_tokens": run.record.tokens, "train_flops": run.record.train_flops}
        more = 2 * spent.get(key, getattr(run.cfg, key))
        print(
            f"nothing to do: {workdir} was trained to step {run.start} already, and {run.cfg.length} asks for "
            f"less; its config is kept; {key} = {more:.15g}, for instance, goes on",
            file=sys.stderr,
        )


def train_stage(run: Run, log: Log, profiler: Profiler, signals: StopSignals) -> bool:
    """Trains to the stage's end, or until the loss has stopped falling and another rung follows.

    The state of the stage's last step is saved. Returns False where it was asked to stop before.
    """
    cfg = run.cfg
    report_start(run, log)
    unread = None  # the step that was dispatched last: the loop reads one behind
    n = run.start
    while n < cfg.steps and not (run.plateau.reached(cfg.grow) and not run.is_last):
        n += 1
        profiler.before_step(n)
        batch = put_batch(run.step, next(run.data))
        if n == run.start + 1:
            run.step.compile(run.state, batch)
        run.state, metrics = run.step.train(run.state, batch)
        if unread:
            read_step(run, log, *unread)
        unread = n, metrics
        stopping = signals.stop_after(n)
        saving = stopping or is_time(n, cfg.checkpoint_every, cfg.steps)
        evaluating = not stopping and is_time(n, cfg.eval_every, cfg.steps)
        if saving or evaluating:  # these wait for step n in any case
            read_step(run, log, *unread)
            unread = None
        if saving:
            log.flush()  # what a resumed run does not write again
            run.save(n)
        if evaluating:
            evaluate(run, log, n)
        if stopping:
            run.save_at_last(n)
            log.say(f"{signals.why} and saved at step {n}; the same command goes on from there")
            return False
    run.save_at_last(n)
    if run.is_last:
        log.say(f"done at step {n}: the checkpoint and metrics.jsonl are in {log.workdir}")
    return True


def is_time(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps (0: never) and at the last step is due."""
    return step == last or (every > 0 and step % every == 0)


def report_start(run: Run, log: Log) -> None:
    """Reports and evaluates what the stage starts from: a growth, or a step whose evaluation was missed."""
    cfg, n = run.cfg, run.start
    grown_now = bool(run.record.growth) and run.record.growth[-1]["step"] == n
    if grown_now:
        log.growth()
    if not grown_now and not (n and is_time(n, cfg.eval_every, cfg.steps)):
        return
    counted = run.plateau.step == n
    if (cfg.grow.may_begin_early and not counted) or not (counted or log.holds_evaluation(n)):
        evaluate(run, log, n)


def read_step(run: Run, log: Log, n: int, metrics: Metrics) -> None:
    """Reads the metrics of step n, waiting for it; raises a BadStep where it is one that may not be skipped."""
    cfg = run.cfg
    arrays = jax.device_get(metrics)
    norms = arrays.pop("grad_norms")
    figures = {name: float(value) for name, value in arrays.items()}
    names = list(by_name(run.step.learned))
    why = what_is_bad(figures["loss"], figures["grad_norm"], norms, names, run.losses, cfg.loss_spike)
    if why:
        bad = BadStep(n, run.examples(n), why)
        run.skipped += 1
        if cfg.non_finite != "skip" or run.skipped > cfg.non_finite_limit:
            raise bad
        log.skipped(bad)
        return
    run.skipped = 0
    run.losses.append(figures["loss"])
    if is_time(n, cfg.log_every, cfg.steps):
        log.step(n, figures)
    elif n == run.start + 1:
        log.restart_clock(n)  # the first step compiles: it is timed alone


def evaluate(run: Run, log: Log, n: int) -> None:
    """Evaluates the state of step n."""
    with log.clock_stopped():
        figures = evaluate_split(run.step, run.state, run.corpus.validation, run.cfg, max_batches=run.cfg.eval_batches)
        flops = run.figures(n)["train_flops"]
        run.plateau = run.plateau.after(n, figures["loss"], flops, run.cfg.grow.min_improvement)
        log.evaluation(n, figures)
