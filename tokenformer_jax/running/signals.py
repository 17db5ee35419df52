"""A signal that asks a run to stop after its step."""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one ends the process."""

    def __enter__(self) -> "StopSignals":
        self.received = False
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
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
