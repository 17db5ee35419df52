"""Profiles of training steps."""

import pathlib

import jax

from tokenformer_jax.buckets import Staged

PROFILED_STEPS = 5


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
