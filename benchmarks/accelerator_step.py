"""The training step of several contenders at one size, compiled at the same time and measured in turn."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.accelerator_run import FailedError, Run
from benchmarks.accelerator_work import Figures

SECONDS = 1.0  # of steps that a contender takes in a round, about
GRACE = 5.0  # seconds at the end of --minutes in which nothing new begins


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to train: ours of a `projection`, or PyTorch's, with keys of the config and the environment of its own."""

    projection: str = "pattention"
    torch: bool = False
    overrides: Figures = dataclasses.field(default_factory=dict)
    env: dict[str, str] = dataclasses.field(default_factory=dict)


OURS = Contender()
TORCH = Contender(torch=True)
# Of a plain Transformer's hidden layer autodiff keeps four arrays; with "dots" one, which is also predicted faster.
PLAIN = Contender("linear", overrides={"model.remat": "dots"})


@dataclasses.dataclass(frozen=True)
class Steps:
    """Who is measured at which size. Their memory was predicted by `plan`, or PyTorch's by what autograd would keep."""

    size: str
    batch: int  # sequences of 1024
    contenders: dict[str, Contender]
    together: bool = True  # resident together and in turn, round by round; else one after the other, alone
    rounds: int = 4


STEPS = {
    "124m": Steps("124m", 32, {"torch": TORCH, "ours": OURS, "plain": PLAIN}),  # 30, 11, 9 GB
    "1b4_mesh": Steps("1b4_mesh", 12, {"torch": TORCH, "ours": OURS, "plain": PLAIN}, together=False),  # 72, 46, 47 GB
    "354m_mesh": Steps("354m_mesh", 16, {"torch": TORCH, "ours": OURS, "plain": PLAIN}),  # 29, 16, 15 GB
    # Ours with other flags: add a line to try one.
    "124m_variants": Steps(
        "124m",
        32,
        {
            "ours": OURS,
            "ours_projections": Contender(overrides={"model.remat": "projections"}),
            "ours_tanh": Contender(overrides={"model.gelu": "tanh"}),
            "plain_none": Contender("linear"),
        },
    ),
    "tiny": Steps("tiny", 8, {"torch": TORCH, "ours": OURS, "plain": PLAIN}, rounds=2),
}


class Entrant:
    """A contender at its size: its worker, and how many sequences fit."""

    def __init__(self, run: Run, steps: Steps, name: str):
        self.run, self.steps, self.name, self.contender = run, steps, name, steps.contenders[name]
        self.batch, self.figures, self.times = steps.batch, {"rounds": []}, []  # type: tuple[int, Figures, list[float]]
        self.launch()

    def launch(self) -> None:
        contender, size = self.contender, self.steps.size
        common = {"size": size, "batch": self.batch, "overrides": contender.overrides}
        if contender.torch:
            env = contender.env | {"JAX_PLATFORMS": "cpu"} | ({"OMP_NUM_THREADS": "1"} if self.run.tiny else {})
            self.worker = self.run.launch("train_torch", env, **common)
        else:
            self.worker = self.run.launch("train_jax", contender.env, projection=contender.projection, **common)
        self.compiled = False

    def halved(self, function: Callable[[], Figures]) -> Figures:
        """function(), with half the batch in a new process for as long as the device has not enough memory."""
        while True:
            try:
                return function()
            except FailedError as error:
                if not error.no_memory or self.batch == 1:
                    raise
                self.figures.setdefault("halved", []).append({"batch": self.batch, "why": str(error)})
                self.run.say(f"{self.name}: not enough memory for {self.batch} sequences, now {self.batch // 2}")
                self.batch //= 2
                self.run.stop(self.worker)
                self.launch()

    def compile(self) -> None:
        def wait() -> Figures:
            return self.worker.ask(None, self.run.limit(240))

        self.figures |= self.halved(wait)
        self.compiled = True

    def start(self) -> None:
        """Takes the device's memory, and the first step."""

        def first() -> Figures:
            if not self.compiled:  # a new process
                self.figures |= self.worker.ask(None, self.run.limit(240))
                self.compiled = True
            return self.worker.ask({"do": "start"}, self.run.limit(90))

        self.figures |= self.halved(first)
        trial = self.worker.ask({"do": "steps", "count": 1}, self.run.limit(90))["seconds"]
        self.count = max(2, min(50, round(SECONDS / trial))) if not self.run.tiny else 1

    def round(self) -> None:
        """Some steps; `times` gets the seconds of a token."""
        told = self.worker.ask({"do": "steps", "count": self.count}, self.run.limit(60))
        self.figures["rounds"].append(told["seconds"])
        self.figures |= {"last_loss": told["loss"], "steps_a_round": self.count}
        self.times.append(told["seconds"] / self.figures["tokens"])

    def finish(self) -> None:
        self.figures |= self.worker.ask({"do": "finish"}, self.run.limit(30))
        self.run.stop(self.worker)


def measure_step(run: Run, part: str, steps: Steps, before: Callable[[Run], None] | None = None) -> None:
    """All compile at the same time; then they are measured while all else on the device rests.

    Where they fit together, each round has each of them in turn, and ratios are of the same round. `before` is called
    in between, to wait for what else uses the device.
    """
    entrants = {name: Entrant(run, steps, name) for name in steps.contenders}
    failed: Figures = {}
    together = (
        f"in turn, {steps.rounds} rounds" if steps.together else f"one after the other, {steps.rounds} rounds each"
    )
    run.add(part, {"size": steps.size, "asked_batch": steps.batch, "how": together})

    def attempt(name: str, do: Callable[[], Any]) -> bool:
        if name in failed:
            return False
        try:
            do()
            return True
        except FailedError as error:
            failed[name] = str(error)
            run.say(f"{part} {name}: failed: {error}")
            run.stop(entrants[name].worker)
            return False
        finally:
            summarise(run, part, entrants, failed)

    for name, entrant in entrants.items():
        if attempt(name, entrant.compile):
            run.say(f"{part} {name}: compiled in {entrant.figures['compile_seconds']:.1f} s")
    if before:
        before(run)

    def measure(names: list[str]) -> None:
        ready = [name for name in names if attempt(name, entrants[name].start)]
        for number in range(steps.rounds):
            if number and run.clock.left() < 3 * GRACE:
                break
            for name in ready:
                attempt(name, entrants[name].round)
        for name in names:
            attempt(name, entrants[name].finish)

    for names in [list(entrants)] if steps.together else [[name] for name in entrants]:
        measure(names)
    for name, figures in run.part(part)["contenders"].items():
        if "tokens_per_second" in figures:
            run.say(f"{part} {name}: {step_line(figures)}")
    if not any(entrant.times for entrant in entrants.values()):
        raise FailedError("; ".join(f"{name}: {why}" for name, why in failed.items()) or "nothing was measured")


def summarise(run: Run, part: str, entrants: dict[str, Entrant], failed: Figures) -> None:
    device = run.part("a")
    found: Figures = {}
    for name, entrant in entrants.items():
        figures = dict(entrant.figures)
        if name in failed:
            figures["failed"] = failed[name]
        if entrant.times:
            rate = 1 / statistics.median(entrant.times)
            flops = rate * figures["flops_per_token"]
            figures |= {
                "seconds_a_step": figures["tokens"] / rate,
                "tokens_per_second": rate,
                "model_flops_per_second": flops,
            }
            for key, ceiling in (("mfu", "peak_flops"), ("share_of_matrix_rate", "matrix_flops_per_second")):
                figures[key] = flops / device[ceiling] if device.get(ceiling) else None
        found[name] = figures
    ratios = {}
    ours = entrants.get("ours")
    for name, other in entrants.items():
        if ours and ours.times and other is not ours and other.times:
            pairs = zip(ours.times, other.times, strict=False)
            ratios[f"ours_over_{name}"] = statistics.median(theirs / mine for mine, theirs in pairs)
    run.add(part, {"contenders": found, "tokens_per_second_ratios": ratios})


def step_line(figures: Figures) -> str:
    share = " ".join(
        f"{figures[key]:.1%} of the {name}"
        for key, name in (("mfu", "peak"), ("share_of_matrix_rate", "matrix rate"))
        if figures.get(key)
    )
    return (
        f"{figures['batch']} sequences, {figures['seconds_a_step'] * 1e3:.1f} ms a step, "
        f"{figures['tokens_per_second']:,.0f} tokens/s, {share}, {figures.get('peak_bytes', 0) / 1e9:.1f} GB"
        f"{', NOT COMPILED: ' + figures['compile_error'] if figures.get('compile_error') else ''}"
    )
