"""The progress bar with an ETA, and profiles."""

import pathlib
import sys
import time

import jax
from tqdm import tqdm

from tokenformer_jax.buckets import Staged

PROFILED_STEPS = 5


class Progress:
    """A bar with an ETA on a terminal; plain lines, now and then, everywhere else."""

    def __init__(self, start: int, total: int, unit: str = "step"):
        self.total, self.unit = total, unit
        self.bar = tqdm(
            total=total,
            initial=start,
            unit=unit,
            disable=jax.process_index() != 0 or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.plain = jax.process_index() == 0 and not sys.stderr.isatty()
        self.start, self.began, self.said = start, 0.0, 0.0  # from the first update on: what it waited for was compiled

    def update(self, done: int, **figures: float) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if not self.began:
            self.start, self.began = done, now
        if self.plain and (now - self.said > 10 or done == self.total):
            self.said = now
            line = f"{self.unit} {done}/{self.total}  {text}"
            if done > self.start:
                line += f"  ETA {(now - self.began) / (done - self.start) * (self.total - done):.0f} s"
            self.say(line)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if jax.process_index() == 0:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


class Profiler:
    """Writes a profile of PROFILED_STEPS steps from step `at` on, to be seen in TensorBoard; 0 does nothing."""

    def __init__(self, at: int, workdir: pathlib.Path):
        self.at, self.workdir, self.running = at, workdir, False

    def __enter__(self) -> "Profiler":
        return self

    def before_step(self, step: int) -> None:
        if self.at and step == self.at:
            self.stage = Staged(self.workdir)
            jax.profiler.start_trace(str(self.stage.folder / "tensorboard"))
            self.running = True
        elif self.running and step >= self.at + PROFILED_STEPS:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
            self.stage.send()
            self.stage.remove()
