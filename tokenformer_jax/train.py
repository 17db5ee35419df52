"""Trains a config, or goes on with what the workdir holds.

python -m tokenformer_jax.train --config=configs/quickstart.py:small --workdir=W
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from tokenformer_jax.checkpoint import Checkpoints, DamagedError, Record
from tokenformer_jax.config import (
    FREE_MODEL_KEYS,
    Config,
    UserError,
    config_flag,
    load_config,
    require_empty,
    run_command,
    workdir_flag,
)
from tokenformer_jax.corpus import Corpus, prepare
from tokenformer_jax.data import data_identity, keep_position, train_batches
from tokenformer_jax.evaluate import evaluate_split
from tokenformer_jax.metrics import (
    MetricsWriter,
    Profiler,
    Progress,
    Row,
    environment,
    peak_flops,
    replace_file,
    train_flops_per_token,
)
from tokenformer_jax.sharding import make_mesh, this_process
from tokenformer_jax.step import Metrics, Step, TrainState, make_step, put_batch
from tokenformer_jax.transformer import count_params


def train(cfg: Config, workdir: pathlib.Path) -> None:
    """Trains up to `cfg.steps`, from the workdir's newest checkpoint if it has one, and leaves a checkpoint.

    SIGINT or SIGTERM saves and returns; the same call then goes on bit-identically.
    """
    agree_with_workdir(cfg, workdir)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(contextlib.closing(open_run(cfg, workdir)))
        log = stack.enter_context(contextlib.closing(Log(run, workdir)))
        profiler = stack.enter_context(Profiler(cfg.profile_at, workdir))
        signals = stack.enter_context(StopSignals())
        stack.enter_context(jax.transfer_guard("disallow"))

        grown_now = bool(run.record.growth) and run.record.growth[-1]["step"] == run.start
        if (grown_now or (run.start and is_time(run.start, cfg.eval_every, cfg.steps))) and not log.has_evaluation:
            log.evaluation(run.start)
        unread = None  # the step that was dispatched last: the loop reads one behind
        for n in range(run.start + 1, cfg.steps + 1):
            profiler.before_step(n)
            run.state, metrics = run.step.train(run.state, put_batch(run.step, next(run.data)))
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
                return
        run.checkpoints.wait()
        log.say(f"done at step {max(run.start, cfg.steps)}: the checkpoint and metrics.jsonl are in {workdir}")


def is_time(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps (0: never) and at the last step is due."""
    return step == last or (every > 0 and step % every == 0)


def agree_with_workdir(cfg: Config, workdir: pathlib.Path) -> None:
    """Raises a UserError where the workdir holds a run of another model, or something else."""
    path = workdir / "config.json"
    if path.exists():
        theirs = load_config(path).model
        for key, ours in dataclasses.asdict(cfg.model).items():
            if getattr(theirs, key) != ours and key not in FREE_MODEL_KEYS:
                raise UserError(
                    f"model.{key} = {ours!r}: {workdir} holds a run with {getattr(theirs, key)!r}; "
                    "use that, name another --workdir, or grow it"
                )
    else:
        require_empty(workdir, "holds other files and no run")


@dataclasses.dataclass
class Run:
    """A run in progress. Only `state` and the position of `data` change."""

    cfg: Config
    start: int  # steps that were done before
    step: Step
    state: TrainState
    data: Iterator[Any]
    corpus: Corpus
    checkpoints: Checkpoints
    record: Record  # as of `start`

    def figures(self, n: int) -> Row:
        """Where the run stands after step n."""
        tokens = (n - self.start) * self.cfg.batch_size * self.cfg.model.context_length
        return {
            "step": n,
            "tokens": self.record.tokens + tokens,
            "params": count_params(self.step.abstract_state.params),
            "train_flops": self.record.train_flops + tokens * train_flops_per_token(self.cfg.model),
        }

    def save(self, n: int) -> None:
        now = self.figures(n)
        record = dataclasses.replace(self.record, tokens=now["tokens"], train_flops=now["train_flops"])
        self.checkpoints.save(n, self.state, self.data, self.corpus.tokenizer, record)

    def close(self) -> None:
        self.checkpoints.close()


def open_run(cfg: Config, workdir: pathlib.Path) -> Run:
    """Starts a run in an empty workdir, or takes it up where its newest checkpoint left it."""
    checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.checkpoints_kept)
    run = resume(cfg, workdir, checkpoints) if checkpoints.steps else begin(cfg, checkpoints)
    if jax.process_index() == 0:
        replace_file(workdir / "config.json", cfg.to_json())
        replace_file(workdir / "environment.json", json.dumps(environment(), indent=2) + "\n")
    return run


def begin(cfg: Config, checkpoints: Checkpoints) -> Run:
    step = make_step(cfg, make_mesh(cfg.mesh))
    corpus = prepare(cfg)
    record = Record(data_identity(corpus.train, cfg), cfg.batch_size)
    state = step.init(jax.random.key(cfg.seed))
    data = train_batches(corpus.train, cfg, **this_process())
    return Run(cfg, 0, step, state, data, corpus, checkpoints, record)


def resume(cfg: Config, workdir: pathlib.Path, checkpoints: Checkpoints) -> Run:
    """Takes a run up at its newest checkpoint that can be read; others are set aside, which is said."""
    start = checkpoints.choose(None)
    try:
        record = checkpoints.record(start)
        step = make_step(cfg, make_mesh(cfg.mesh), record.schedule_start)
        corpus = prepare(cfg, checkpoints.tokenizer(start))
        identity = data_identity(corpus.train, cfg)
        if record.data != identity:
            raise UserError(
                f"config.data or config.seed: {workdir} was trained on {record.data}, and this is {identity}; "
                "use those, or go on with these in a new workdir, made from this one by grow"
            )
        data = train_batches(corpus.train, cfg, **this_process())
        state = checkpoints.restore(start, step.abstract_state)
        checkpoints.restore_data(start, data)
    except DamagedError as error:
        if len(checkpoints.steps) == 1:
            raise
        print(f"warning: {error}; moved to {checkpoints.set_aside(start)}", file=sys.stderr)
        return resume(cfg, workdir, checkpoints)
    keep_position(data, record.batch_size, cfg.batch_size)
    record = dataclasses.replace(record, batch_size=cfg.batch_size)
    return Run(cfg, start, step, state, data, corpus, checkpoints, record)


class Log:
    """What the loop reports: rows of metrics, progress and evaluations."""

    def __init__(self, run: Run, workdir: pathlib.Path):
        self.run = run
        self.writer = MetricsWriter(workdir, run.start)
        self.has_evaluation = self.writer.holds(run.start, "eval_loss")  # of the step that the run starts from
        self.progress = Progress(run.start, run.cfg.steps)
        self.step_tokens = run.cfg.batch_size * run.cfg.model.context_length
        self.last_step, self.last_time = run.start, time.monotonic()
        used = f", on {run.step.mesh.size} of {jax.device_count()} devices" if jax.device_count() > 1 else ""
        self.say(
            f"{count_params(run.state.params):,} parameters, {run.corpus.train.num_tokens:,} training tokens, "
            f"from step {run.start} to step {run.cfg.steps}{used}"
        )

    def step(self, n: int, metrics: Metrics) -> None:
        """Reads the metrics of step n, waiting for it; raises a UserError where its loss is not finite."""
        cfg = self.run.cfg
        figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(figures["loss"] + figures["grad_norm"]):
            raise UserError(
                f"step {n} has loss {figures['loss']} and grad_norm {figures['grad_norm']}; nothing was saved since; "
                f"a lower optimizer.peak_learning_rate than {cfg.optimizer.peak_learning_rate:g} may do"
            )
        due = is_time(n, cfg.log_every, cfg.steps)
        now = time.monotonic()
        speed = (n - self.last_step) * self.step_tokens / (now - self.last_time)
        if due or n == self.run.start + 1:  # the first step compiles: it is timed alone
            self.last_step, self.last_time = n, now
        if not due:
            return
        peak = peak_flops(self.run.step.mesh.size)
        utilisation = {"mfu": speed * train_flops_per_token(cfg.model) / peak} if peak else {}
        self.writer.write(self.run.figures(n) | figures | {"tokens_per_second": speed} | utilisation)
        rate = figures["learning_rate"]
        self.progress.update(n, loss=figures["loss"], learning_rate=rate, tokens_per_second=speed, **utilisation)

    def evaluation(self, n: int) -> None:
        """Evaluates the state of step n; the time it takes does not count as training's."""
        began = time.monotonic()
        run = self.run
        figures = evaluate_split(run.step, run.state, run.corpus.validation, run.cfg, max_batches=run.cfg.eval_batches)
        self.writer.write(run.figures(n) | {f"eval_{name}": value for name, value in figures.items()})
        self.say(
            f"step {n}: validation loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte"
        )
        self.last_time += time.monotonic() - began

    def say(self, line: str) -> None:
        self.progress.say(line)

    def close(self) -> None:
        self.writer.close()
        self.progress.close()


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one ends the process."""

    def __enter__(self) -> "StopSignals":
        self.received = False
        alone = jax.process_count() == 1  # several processes agree through jax, which listens to SIGTERM itself
        numbers = (signal.SIGINT, signal.SIGTERM) if alone else ()
        self.previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.__exit__()

    def stop_after(self, step: int) -> bool:
        """Whether to stop after this step; all processes give the same answer."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def main() -> None:
    train(_CONFIG(), _WORKDIR())


if __name__ == "__main__":
    _CONFIG = config_flag()
    _WORKDIR = workdir_flag()
    run_command(main)
