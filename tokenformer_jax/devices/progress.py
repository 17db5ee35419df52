"""How far a work is, and how long the rest of it will take."""

import sys
import time

import jax
from tqdm import tqdm

EVERY = 10.0  # seconds, between plain lines; the last one may come sooner


class Progress:
    """A bar with an ETA on a terminal; plain lines, now and then, everywhere else."""

    def __init__(self, start: int, total: int, unit: str = "step", quiet: float = 0.0, is_shown: bool | None = None):
        """`quiet`: seconds before the first line. `is_shown`: whether by this process; None: by the first one."""
        self.is_shown = jax.process_index() == 0 if is_shown is None else is_shown
        self.total, self.unit, self.plain = total, unit, self.is_shown and not sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=start,
            desc=unit,
            unit=f" {unit.split()[0]}",
            disable=self.plain or not self.is_shown,
            dynamic_ncols=True,
        )
        self.done, self.next_line = start, time.monotonic() + quiet
        self.start, self.began = start, 0.0  # from the first update on: what it waited for was compiled

    def update(self, done: int, text: str = "") -> None:
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.done)
        was_done, self.done = self.done, done
        now = time.monotonic()
        if not self.began:
            self.start, self.began = done, now
        if self.plain and now > self.next_line - EVERY * (was_done < done == self.total):
            self.next_line = now + EVERY
            line = f"{self.unit} {done}/{self.total}  {text}"
            if done > self.start:
                left = (now - self.began) / (done - self.start) * (self.total - done)
                line += f"  ETA {tqdm.format_interval(left)}"
            self.say(line)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self.is_shown:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
