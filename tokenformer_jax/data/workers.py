"""Tokenizing on all cores: a process for each, which is given units as it gets done with them."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tokenformer_jax.data.encode import Done, Job, encode_unit, part_record
from tokenformer_jax.data.tokenizer import Tokenizer
from tokenformer_jax.devices.progress import EVERY, Progress
from tokenformer_jax.errors import UserError

MB = 10**6


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_units(
    path: pathlib.Path, job: Job, tokenizer: Tokenizer, mine: Sequence[int], share: int, doing: str, is_shown: bool
) -> None:
    """Tokenizes these units of the job at `path`, but for what was done before, on one of `share` parts of the cores.

    Raises:
      UserError: the text cannot be read, or a process was killed.
      OSError: the tokens cannot be written.
    """
    left = [number for number in mine if not parts_of(path.parent, number)]
    available = max(1, cores() // share)
    report = Report(sum(job.units[number]["size"] for number in left), doing, is_shown)
    with contextlib.closing(report.bar):
        if len(left) < 2:
            for number in left:
                for progress in encode_unit(job, path.parent, tokenizer, number):
                    report.add(progress)
            return
        count = min(available, len(left))
        work = _Work(path, left, max(1, available // count), report)
        try:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(work.run, range(count)))
        finally:
            work.stop()


def parts_of(folder: pathlib.Path, number: int) -> list[dict[str, Any]]:
    """The records of a unit's parts; none where it is not done."""
    records: list[dict[str, Any]] = []
    while record := part_record(folder, number, len(records)):
        records.append(record)
        if record["is_last"]:
            return records
    return []


class _Work:
    """Processes, each led by a thread."""

    def __init__(self, path: pathlib.Path, units: Sequence[int], threads: int, report: "Report"):
        self.path, self.units, self.report = path, iter(units), report
        self.lock = threading.Lock()
        self.processes: list[subprocess.Popen[str]] = []
        package = str(pathlib.Path(__file__).parents[2])
        parallel = {"TOKENIZERS_PARALLELISM": "false"} if threads == 1 else {"RAYON_NUM_THREADS": str(threads)}
        self.environment = os.environ | parallel | {"PYTHONPATH": os.pathsep.join([package, *sys.path])}

    def next_unit(self) -> int | None:
        with self.lock:
            return next(self.units, None)

    def stop(self) -> None:
        """Ends the processes, and what the threads still wait for."""
        self.units = iter(())
        for process in self.processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()

    def run(self, _: int) -> None:
        command = [sys.executable, "-m", "tokenformer_jax.data.encode", str(self.path)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment
        )
        self.processes.append(process)
        try:
            while (number := self.next_unit()) is not None:
                self._give(process, number)
        except BaseException:
            self.units = iter(())  # the others end with what they have
            raise

    def _give(self, process: Any, number: int) -> None:
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise UserError(message["error"])
            if "not_written" in message:
                raise OSError(0, message["not_written"])
            if "done" in message:
                return
            with self.lock:
                self.report.add(Done(*message["progress"]))
        raise UserError(
            f"a process that tokenizes ended (exit code {process.wait()}), perhaps for want of memory; the same "
            "command goes on, with fewer cores (taskset) if need be"
        )


class Report:
    """MB that were read, and documents and MB of text a second."""

    def __init__(self, size: int, doing: str, is_shown: bool):
        self.bar = Progress(0, -(-size // MB), f"MB for {doing}", quiet=2 * EVERY, is_shown=is_shown)
        self.done, self.began = Done(0, 0, 0), time.monotonic()

    def add(self, new: Done) -> None:
        self.done = Done(*map(sum, zip(self.done, new, strict=True)))
        seconds = max(time.monotonic() - self.began, 1e-3)
        speed = f"{self.done.documents / seconds:,.0f} documents/s, {self.done.text / MB / seconds:.1f} MB/s of text"
        self.bar.update(min(-(-self.done.position // MB), self.bar.total), speed)
