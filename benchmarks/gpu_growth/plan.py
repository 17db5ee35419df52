"""What benchmarks/gpu_growth trains: sizes, lineages and their budgets, and how large a budget fits the time."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from configs import base
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.training.language import train_flops_per_token

DECAY = 0.2  # of a budget
RAMP = 0.25  # of a rung, up to its first budget: where zero_keys' τ goes to its target
# Parameter tokens of attention, whose feed-forward has 4 times as many; or of both. (0, H): plain Transformer, H wide.
Size = int | tuple[int, int]
SMALLER = 0.2  # of what a ladder of three sizes spends before its last rung: spent on the smallest


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of everything; those of the study by default."""

    tokens: tuple[int, int, int] = (16, 64, 256)  # n of the small, the middle and the large model
    rates: tuple[float, float, float] = (2e-3, 2e-3, 1e-3)  # their peak learning rates
    width: int = 256
    layers: int = 6
    heads: int = 4
    context: int = 256
    vocabulary: int = 8192
    dtype: str = "bfloat16"
    batch: int = 64  # windows a step
    chunk: int = 25  # steps a dispatch
    warmup: int = 200  # steps
    evaluate_every: int = 100  # steps
    evaluated: int = 16  # batches of an evaluation
    last_evaluations: int = 8  # so many times as many at the end of a run, if there is as much text
    max_tokens: int = 320_000_000
    held_out: int = 100  # one file of so many is for validation

    def config(self, n: Size) -> Config:
        attention, ffn = n if isinstance(n, tuple) else (n, 4 * n)
        tree = base.get_config()
        tree.batch_size = self.batch
        tree.model.update(vocab_size=self.vocabulary, context_length=self.context, num_layers=self.layers)
        tree.model.update(num_heads=self.heads, embed_dim=self.width, dtype=self.dtype)
        tree.model.update(qkv_tokens=attention, out_tokens=attention, ffn_tokens=ffn)
        tree.model.projection = "pattention" if attention else "linear"
        return read_config(tree.to_dict())

    def flops(self, n: Size) -> float:
        """Training FLOPs of a step."""
        return train_flops_per_token(self.config(n).model) * self.batch * self.context

    def steps(self, flops: float, n: Size) -> int:
        """About so many FLOPs in steps: whole chunks, one at least."""
        return max(1, round(flops / self.flops(n) / self.chunk)) * self.chunk


TINY: dict[str, Any] = {
    "tokens": (4, 8, 16),
    "rates": (1e-2, 1e-2, 1e-2),
    **{"width": 16, "layers": 1, "heads": 2, "context": 16, "vocabulary": 300, "dtype": "float32"},
    **{"batch": 8, "chunk": 5, "warmup": 5, "evaluate_every": 10, "evaluated": 8, "last_evaluations": 2},
    **{"max_tokens": 60_000, "held_out": 5},
}
SETTINGS = {"full": Setting(), "tiny": Setting(**TINY)}


class Rung(NamedTuple):
    """A size, from a step of its lineage on."""

    step: int
    n: Size
    rate: float
    recipe: str = ""  # how it grew; empty at birth
    ramp: int = 0  # steps in which τ goes to its target; 0: it never does
    falls: tuple[int, int] = (0, 0)  # steps between which the rate goes to zero; the next rung warms up again
    warmup: int = 0  # steps, of the first rung; 0: as the setting has it


class Trunk(NamedTuple):
    """Training at constant rates, of one model for each seed. Lineages that have grown alike so far share it."""

    seeds: tuple[int, ...]
    rungs: tuple[Rung, ...]

    @property
    def name(self) -> str:
        parts = [f"{r.recipe}{r.ramp}-n{r.n}-{r.rate:g}-at{r.step}" for r in self.rungs]
        parts += [f"falls{start}to{end}" for start, end in (rung.falls for rung in self.rungs) if end]
        parts += [f"warmup{rung.warmup}" for rung in self.rungs if rung.warmup]
        return f"seed{'+'.join(map(str, self.seeds))}-" + "-".join(parts)

    @property
    def last(self) -> Rung:
        return self.rungs[-1]

    def rates(self, steps: np.ndarray, warmup: int) -> np.ndarray:
        """The learning rates of these steps of the last rung."""
        before = self.rungs[-2].falls if len(self.rungs) > 1 else ()
        begins, (start, end) = self.last.step if any(before) else 0, self.last.falls
        falling = np.clip((end - steps) / (end - start), 0, 1) if end else 1
        return self.last.rate * np.minimum(1, (steps - begins + 1) / (self.rungs[0].warmup or warmup)) * falling

    def up_to(self, step: int) -> "Trunk":
        """The part that leads to the state at a step, before that step's growth."""
        return Trunk(self.seeds, tuple(rung for rung in self.rungs if rung.step < step or rung.step == 0))


class Run(NamedTuple):
    """A trunk up to a step, then the decay."""

    lineage: str
    trunk: Trunk
    budget: float  # part of the whole one
    trunk_steps: int
    decay_steps: int
    before: float  # FLOPs before the last rung

    @property
    def names(self) -> list[str]:
        """Of what it leaves, a run for each seed."""
        return [f"{self.lineage}, seed {seed}, {self.budget:g}" for seed in self.trunk.seeds]

    @property
    def steps(self) -> int:
        return self.trunk_steps + self.decay_steps


class Lineage(NamedTuple):
    """Runs of several budgets off one trunk; the first of `sizes` is born, the others grow."""

    name: str
    sizes: tuple[int, ...]  # 0 small, 1 middle, 2 large
    small: float  # part of the whole budget that is spent before the last rung
    budgets: tuple[float, ...]
    recipe: str = "zero_keys"
    seed: int = 0
    times_rate: float = 1.0  # of the setting's peak learning rates


FROM_SCRATCH = (0.25, 0.5, 0.75, 1.0)
GROWN = (0.5, 0.75, 1.0)
LINEAGES = (  # the most valuable first
    Lineage("large", (2,), 0, FROM_SCRATCH),
    Lineage("middle", (1,), 0, FROM_SCRATCH),
    Lineage("ladder, 25 % small", (0, 1, 2), 0.25, GROWN),
    Lineage("middle to large, 25 % small", (1, 2), 0.25, GROWN),
    Lineage("large, twice the rate", (2,), 0, (0.5,), times_rate=2),
    Lineage("middle, half the rate", (1,), 0, (0.5,), times_rate=0.5),
    Lineage("ladder, 12.5 % small", (0, 1, 2), 0.125, FROM_SCRATCH),
    Lineage("large", (2,), 0, FROM_SCRATCH, seed=1),
    Lineage("ladder, 25 % small", (0, 1, 2), 0.25, GROWN, seed=1),
    Lineage("middle", (1,), 0, FROM_SCRATCH, seed=1),
    Lineage("middle, twice the rate", (1,), 0, (0.5,), times_rate=2),
    Lineage("small", (0,), 0, (0.25, 0.5)),
    Lineage("ladder, 25 % small, random keys", (0, 1, 2), 0.25, GROWN, "random_keys"),
    Lineage("ladder, 50 % small", (0, 1, 2), 0.5, (0.75, 1.0)),
    Lineage("ladder, 25 % small, isometric", (0, 1, 2), 0.25, GROWN, "isometric"),
)


def runs_of(lineage: Lineage, setting: Setting, whole: float) -> list[Run]:
    """The runs of a lineage where the whole budget has so many FLOPs, in whole chunks of steps."""
    steps = setting.steps
    (n, rate), *larger = [(setting.tokens[size], setting.rates[size] * lineage.times_rate) for size in lineage.sizes]
    ends = [share * lineage.small * whole for share in (SMALLER, 1.0)[2 - len(larger) :]]
    rungs, spent = [Rung(0, n, rate)], 0.0
    for end, following, (n, rate) in zip(ends, [*ends[1:], lineage.budgets[0] * whole], larger, strict=False):
        before = rungs[-1]
        count = steps(end - spent, before.n)
        spent += count * setting.flops(before.n)
        ramp = max(1, round(RAMP * steps(following - spent, n)))
        rungs.append(Rung(before.step + count, n, rate, lineage.recipe, ramp))
    runs, trunk = [], Trunk((lineage.seed,), tuple(rungs))
    for budget in lineage.budgets:
        decay = steps(DECAY * budget * whole, n)
        trunk_steps = rungs[-1].step + max(steps(budget * whole - spent, n) - decay, setting.chunk)
        runs.append(Run(lineage.name, trunk, budget, trunk_steps, decay, spent))
    return runs


def marks(runs: list[Run]) -> dict[Trunk, set[int]]:
    """The steps of each trunk whose states others begin from."""
    found: dict[Trunk, set[int]] = {}
    for run in runs:
        for step in (*(rung.step for rung in run.trunk.rungs[1:]), run.trunk_steps):
            found.setdefault(run.trunk.up_to(step), set()).add(step)
    return found


def seconds(runs: list[Run], step_seconds: dict[Size, float]) -> float:
    """What these runs take together; what they share is trained once."""
    trunks = sum((max(ends) - part.last.step) * step_seconds[part.last.n] for part, ends in marks(runs).items())
    return trunks + sum(run.decay_steps * step_seconds[run.trunk.last.n] for run in runs)


def whole_budget(
    setting: Setting, lineages: tuple[Lineage, ...], step_seconds: dict[Size, float], left: float, limit: float
) -> tuple[float, str]:
    """FLOPs with which all lineages take the seconds left, or the longest run takes `limit` steps; and which it is."""
    guess = 1e5 * setting.flops(setting.tokens[-1])  # so long that whole chunks don't matter
    runs = [run for lineage in lineages for run in runs_of(lineage, setting, guess)]
    in_time, in_steps = left / seconds(runs, step_seconds), limit / max(run.steps for run in runs)
    return guess * min(in_time, in_steps), "time" if in_time < in_steps else "data"
