"""What a run reports: rows of metrics, progress and evaluations."""

import pathlib
import time

import jax

from tokenformer_jax.devices.hardware import peak_flops
from tokenformer_jax.evaluation.perplexity import evaluate_split
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.running.run import BadStep, Run, is_time
from tokenformer_jax.storage.metrics_file import MetricsWriter, Row
from tokenformer_jax.training.metrics import Progress, train_flops_per_token
from tokenformer_jax.training.step import Metrics


class Log:
    """What the loop reports: rows of metrics, progress and evaluations."""

    def __init__(self, run: Run, workdir: pathlib.Path):
        self.run, self.workdir = run, workdir
        self.writer = MetricsWriter(workdir, run.start, count_params(run.state.params))
        self.progress = Progress(run.start, run.cfg.steps)
        self.step_tokens = run.cfg.batch_size * run.cfg.model.context_length
        self.last_step, self.last_time = run.start, time.monotonic()
        for rollback in run.record.rollbacks:
            if rollback["to"] <= run.start < rollback["from"]:  # later rows were dropped
                self.writer.write(run.figures(run.start) | {"step": rollback["from"], "rollback": rollback})
                self.say(f"rolled back from step {rollback['from']} to step {rollback['to']}: {rollback['why']}")
        used = f", on {run.step.mesh.size} of {jax.device_count()} devices" if jax.device_count() > 1 else ""
        self.say(
            f"{count_params(run.state.params):,} parameters, {run.corpus.train.num_tokens:,} training tokens, "
            f"from step {run.start} to step {run.cfg.steps}{used}"
        )

    def step(self, n: int, metrics: Metrics) -> None:
        """Reads the metrics of step n, waiting for it; raises a BadStep where it is one that may not be skipped."""
        cfg = self.run.cfg
        arrays = jax.device_get(metrics)
        norms = arrays.pop("grad_norms")
        figures = {name: float(value) for name, value in arrays.items()}
        if why := self.run.what_is_bad(figures, norms):
            bad = BadStep(n, self.run.examples(n), why)
            self.run.skipped += 1
            if cfg.non_finite != "skip" or self.run.skipped > cfg.non_finite_limit:
                raise bad
            self.writer.write(self.run.figures(n) | {"skipped": {"examples": bad.examples, "why": why}})
            self.say(f"step {n} is skipped: {why}")
            return
        self.run.skipped = 0
        self.run.losses.append(figures["loss"])
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
        run.plateau = run.plateau.after(n, figures["loss"], run.cfg.grow.min_improvement)
        self.write_once(run.figures(n) | {f"eval_{name}": value for name, value in figures.items()}, "eval_loss")
        self.say(
            f"step {n}: validation loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte"
        )
        self.last_time += time.monotonic() - began

    def first_evaluation(self) -> None:
        """Evaluates the state that the run starts from, unless that was done and nothing depends on it."""
        n = self.run.start
        done = self.run.plateau.step == n or self.writer.holds(self.run.figures(n), "eval_loss")
        if not done or (self.run.cfg.grow.patience and self.run.plateau.step != n):
            self.evaluation(n)

    def growth(self) -> None:
        """The growth that the run starts from, as a row."""
        self.write_once(self.run.figures(self.run.start) | {"growth": self.run.record.growth[-1]}, "growth")

    def write_once(self, row: Row, name: str) -> None:
        """Writes a row unless an earlier start did: what a run starts from may be told again."""
        if row["step"] != self.run.start or not self.writer.holds(row, name):
            self.writer.write(row)

    def say(self, line: str) -> None:
        self.progress.say(line)

    def close(self) -> None:
        self.writer.close()
        self.progress.close()
