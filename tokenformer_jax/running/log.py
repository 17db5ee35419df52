"""What a run reports: rows of metrics, progress and evaluations. It decides nothing; the loop says when."""

import contextlib
import pathlib
import time
from collections.abc import Iterator

import jax

from tokenformer_jax.buckets import Unreachable
from tokenformer_jax.devices.hardware import peak_flops
from tokenformer_jax.devices.progress import Progress
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.running.run import Run
from tokenformer_jax.storage.metrics_file import MetricsWriter, Row
from tokenformer_jax.training.non_finite import BadStep
from tokenformer_jax.training.tasks import task_of


class Log:
    """Of one stage of a run, from its start on."""

    def __init__(self, run: Run, workdir: pathlib.Path):
        self.run, self.workdir, self.task = run, workdir, task_of(run.cfg)
        self.writer = MetricsWriter(run.cfg, workdir, run.start, count_params(run.state.params))
        self.progress = Progress(run.start, run.cfg.steps)
        self.restart_clock(run.start)
        for rollback in run.record.rollbacks:
            if rollback["to"] <= run.start < rollback["from"]:  # later rows were dropped
                self.writer.write(run.figures(run.start) | {"step": rollback["from"], "rollback": rollback})
                self.say(f"rolled back from step {rollback['from']} to step {rollback['to']}: {rollback['why']}")
        used, there = run.step.mesh.size, jax.device_count()
        learned = count_params(run.step.learned)
        alone = f" (of which {learned:,} learn)" if learned < count_params(run.state.params) else ""
        self.say(
            f"{count_params(run.state.params):,} parameters{alone}, {self.task.describe_data(run.corpus)}, "
            f"from step {run.start} to step {run.cfg.steps}{f', on {used} devices' if used > 1 else ''}"
        )
        if used < there:
            self.say(f"only {used} of {there} devices {'is' if used == 1 else 'are'} used; use {run.use_of_all(there)}")

    def restart_clock(self, n: int) -> None:
        """Speed is measured from the end of step n on."""
        self.last_step, self.last_time = n, time.monotonic()

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """For what does not count as training's time."""
        began = time.monotonic()
        yield
        self.last_time += time.monotonic() - began

    def step(self, n: int, figures: dict[str, float]) -> None:
        """The figures of step n, and the speed since those before."""
        cfg = self.run.cfg
        tokens = (n - self.last_step) * self.task.tokens_per_step(cfg)
        speed = tokens / (time.monotonic() - self.last_time)
        self.restart_clock(n)
        peak = peak_flops(self.run.step.mesh.size)
        utilisation = {"mfu": speed * self.run.step.flops_per_token / peak} if peak else {}
        self.writer.write(self.run.figures(n) | figures | {"tokens_per_second": speed} | utilisation)
        shown = {name: figures[name] for name in ("loss", "learning_rate")} | {"tokens_per_second": speed} | utilisation
        self.progress.update(n, "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))

    def skipped(self, bad: BadStep) -> None:
        self.writer.write(self.run.figures(bad.step) | {"skipped": {"examples": bad.examples, "why": bad.why}})
        self.say(f"step {bad.step} is skipped: {bad.why}")

    def evaluation(self, n: int, figures: dict[str, float]) -> None:
        self.write_once(self.run.figures(n) | {f"eval_{name}": value for name, value in figures.items()}, "eval_loss")
        self.say(f"step {n}: {self.task.describe(figures)}")

    def holds_evaluation(self, n: int) -> bool:
        """Whether an earlier start wrote the evaluation of step n."""
        return self.writer.holds(self.run.figures(n), "eval_loss")

    def growth(self) -> None:
        """The growth that the run starts from, as a row."""
        self.write_once(self.run.figures(self.run.start) | {"growth": self.run.record.growth[-1]}, "growth")

    def write_once(self, row: Row, name: str) -> None:
        """Writes a row unless an earlier start did: what a run starts from may be logged again."""
        if row["step"] != self.run.start or not self.writer.holds(row, name):
            self.writer.write(row)

    def say(self, line: str) -> None:
        self.progress.say(line)

    def flush(self) -> None:
        self.writer.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.writer.close(in_reach=not (kind and issubclass(kind, Unreachable)))
        self.progress.close()
