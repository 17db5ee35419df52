"""Parts under a deadline, and the processes that do them: what is left over when one fails or the time ends."""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.accelerator_work import NO_MEMORY, Figures
from tokenformer_jax.files import replace_file


class FailedError(Exception):
    """A worker's last line; `no_memory` where it ran out of the device's."""

    def __init__(self, what: str, no_memory: bool = False):
        super().__init__(what)
        self.no_memory = no_memory


class Clock:
    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic):
        self.now, self.began, self.seconds = now, now(), 60 * minutes

    def elapsed(self) -> float:
        return self.now() - self.began

    def left(self) -> float:
        return self.seconds - self.elapsed()


class Worker:
    """A process that holds the device for one task; see `accelerator_work`. Ended with all that it started."""

    def __init__(self, task: str, arguments: Figures, folder: pathlib.Path, env: dict[str, str] | None = None):
        self.name = f"{task} {json.dumps(arguments)}"
        self.errors = (folder / f"{task}_{time.monotonic_ns()}.log").open("w")
        command = [sys.executable, "-m", "benchmarks.accelerator_work", task, json.dumps(arguments)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=worker_environment(folder) | (env or {}),
            text=True,
            start_new_session=True,  # a group of its own, so that it can be ended as a whole
        )
        self.failed = False
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, command: Figures | None, seconds: float, partial: Callable[[Figures], None] | None = None) -> Figures:
        """Its reply to a command, or without one to how it was called; `partial` gets what comes before.

        Raises:
          FailedError: it failed, ended or took longer.
        """
        if command is not None:
            assert self.process.stdin
            with contextlib.suppress(OSError):  # it has ended: its last line says why
                self.process.stdin.write(json.dumps(command) + "\n")
                self.process.stdin.flush()
        end = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.01, end - time.monotonic()))
            except queue.Empty:
                self.failed = True
                raise FailedError(f"took longer than {seconds:.0f} s; {self.last_line()}") from None
            self.failed = line is None or '"error"' in line[:10]
            if line is None:
                last = self.last_line()
                raise FailedError(f"ended with {self.process.wait(10)}; {last}", bool(NO_MEMORY.search(last)))
            said = json.loads(line)
            if "reply" in said:
                return said["reply"]
            if "error" in said:
                raise FailedError(said["error"]["what"], said["error"]["no_memory"])
            if partial:
                partial(said["partial"])

    def last_lines(self) -> list[str]:
        """Of its standard error."""
        text = pathlib.Path(self.errors.name).read_text(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-40:]

    def last_line(self) -> str:
        return ["it said nothing", *self.last_lines()][-1].strip()[:400]

    def stop(self) -> None:
        """Lets it end, for a moment; then ends it and what it started."""
        with contextlib.suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()


def worker_environment(folder: pathlib.Path) -> dict[str, str]:
    """Memory is asked for as it is needed, up to nearly all: several workers share the device."""
    env = dict(os.environ)
    if env.get("JAX_PLATFORMS") != "cpu":  # where compiling is measured, nothing compiled is at hand
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
    return env | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


class Run:
    """The results so far, the clock, and the workers; `launch` makes a worker."""

    def __init__(self, out: pathlib.Path, clock: Clock, tiny: bool, folder: pathlib.Path, launch: Any = Worker):
        self.out, self.clock, self.tiny, self.folder, self._launch = out, clock, tiny, folder, launch
        self.results: Figures = {"parts": {}}
        self.workers: list[Any] = []
        self.beside: dict[str, tuple[Any, float]] = {}  # what runs beside other parts, and since when, by its own part
        self.wanted: set[str] = set()  # parts that were asked for

    def launch(self, task: str, env: dict[str, str] | None = None, **arguments: Any) -> Any:
        worker = self._launch(task, arguments, self.folder, env)
        self.workers.append(worker)
        return worker

    def stop(self, *workers: Any) -> None:
        for worker in workers:
            if worker not in self.workers:
                continue
            self.workers.remove(worker)
            worker.stop()
            if worker.failed:
                with self.out.with_suffix(".log").open("a") as log:
                    log.write("\n".join([f"==== {worker.name}", *worker.last_lines(), ""]))

    def limit(self, seconds: float) -> float:
        """A timeout: no part goes on when the time is over."""
        return max(0.01, min(seconds, self.clock.left()))

    def write(self) -> None:
        told = json.dumps(self.results | {"elapsed_seconds": self.clock.elapsed()}, indent=1)
        replace_file(self.out, told + "\n")

    def part(self, name: str) -> Figures:
        return self.results["parts"].setdefault(name, {})

    def add(self, name: str, figures: Figures) -> None:
        self.part(name).update(figures)
        self.write()

    def say(self, text: str) -> None:
        print(f"[{self.clock.elapsed():5.0f} s, {self.clock.left():4.0f} s left] {text}", flush=True)


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    estimate: float  # seconds that must be left
    do: Callable[[Run], None]


def run_parts(run: Run, parts: list[Part]) -> None:
    """Every part that there is time for; what fails is told and left behind."""
    run.wanted = {part.name for part in parts}
    for part in parts:
        figures = run.part(part.name)
        if run.clock.left() < part.estimate:
            figures["status"] = "skipped"
            figures["why"] = f"takes about {part.estimate:.0f} s, and {max(0.0, run.clock.left()):.0f} s are left"
            run.say(f"{part.name}: skipped, {figures['why']}")
            run.write()
            continue
        run.say(f"{part.name}: begins, about {part.estimate:.0f} s")
        began = run.clock.now()
        try:
            part.do(run)
            figures["status"] = "done"
        except Exception as error:
            figures |= {"status": "failed", "why": str(error) or type(error).__name__}
            run.say(f"{part.name}: failed: {figures['why']}")
        finally:
            beside = [worker for worker, _ in run.beside.values()]
            run.stop(*[worker for worker in run.workers if worker not in beside])
        figures["took_seconds"] = run.clock.now() - began
        run.say(f"{part.name}: {figures['status']} in {figures['took_seconds']:.0f} s")
        run.write()


def alone(run: Run, part: str, task: str, seconds: float, under: str = "", **arguments: Any) -> None:
    """A task from beginning to end, whose figures are written as they come."""
    collect(run, run.launch(task, **arguments), part, seconds, under)


def collect(run: Run, worker: Any, part: str, seconds: float, under: str = "") -> None:
    def put(figures: Figures) -> None:
        run.add(part, {under: run.part(part).get(under, {}) | figures} if under else figures)

    put(worker.ask(None, run.limit(seconds), put))
