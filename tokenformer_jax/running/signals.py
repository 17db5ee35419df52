"""What asks a run to stop after its step: a signal, or the end of its time."""

import os
import signal
import threading
import time
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one ends the process.

    The end of `max_minutes` (0: none) is such a request, too.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        self.max_minutes, self.why = max_minutes, "stopped"

    def __enter__(self) -> "StopSignals":
        self.received = self.late = False
        self.began = time.monotonic()
        alone = jax.process_count() == 1  # several processes agree through jax, which listens to SIGTERM itself
        can_listen = alone and threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if can_listen else ()
        self.previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.__exit__()

    def stop_after(self, step: int) -> bool:
        """Whether to stop after this step; all processes give the same answer."""
        ends_now = not self.late and 0 < self.max_minutes * 60 <= time.monotonic() - self.began
        if ends_now:
            self.late, self.why = True, f"stopped after max_minutes = {self.max_minutes:g}"
        if jax.process_count() == 1:
            return self.received or self.late
        if ends_now and jax.process_index() == 0:  # clocks differ: one tells all, as a preemption does
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
