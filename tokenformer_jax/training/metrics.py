"""The progress bar with an ETA, FLOPs and profiles."""

import pathlib
import sys
import time

import jax
from tqdm import tqdm

from tokenformer_jax.config import ModelConfig

PROFILED_STEPS = 5


def train_flops_per_token(cfg: ModelConfig) -> float:
    """Model FLOPs of forward and backward for one token: 6 a weight, and 12 · layers · L · D for attention.

    The attention's L × L product is counted whole, as is customary; rematerialisation is not counted.
    """
    per_layer = 4 * cfg.embed_dim + 2 * cfg.ffn_tokens  # a plain Transformer's rows of width D
    if cfg.projection == "pattention":
        per_layer = 2 * sum(cfg.tokens.values())  # a key and a value each
    weights = cfg.embed_dim * (cfg.num_layers * per_layer + cfg.vocab_size)
    return 6.0 * weights + 12.0 * cfg.num_layers * cfg.context_length * cfg.embed_dim


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
        self.start, self.began, self.said = start, time.monotonic(), 0.0

    def update(self, done: int, **figures: float) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if self.plain and (now - self.said > 10 or done == self.total):
            self.said = now
            eta = (now - self.began) / max(done - self.start, 1) * (self.total - done)
            self.say(f"{self.unit} {done}/{self.total}  {text}  ETA {eta:.0f} s")

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if jax.process_index() == 0:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()


class Profiler:
    """Writes a profile of PROFILED_STEPS steps from step `at` on, to be seen in TensorBoard; 0 does nothing."""

    def __init__(self, at: int, workdir: pathlib.Path):
        self.at, self.directory, self.running = at, workdir / "tensorboard", False

    def __enter__(self) -> "Profiler":
        return self

    def before_step(self, step: int) -> None:
        if self.at and step == self.at:
            jax.profiler.start_trace(str(self.directory))
            self.running = True
        elif self.running and step >= self.at + PROFILED_STEPS:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
