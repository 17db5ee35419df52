"""When to grow, by the losses that two sizes reached from scratch: where they cross, and the smaller one's head start.

If a grown model goes on as the large one from scratch did at the same loss, growing at loss L saves what the small one
was ahead there: the large one's FLOPs to L, less the small one's. That is a bound, no promise.
"""

import itertools
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.report import read_run
from tokenformer_jax.evaluation.slope import slope
from tokenformer_jax.storage.workdir import load_config
from tokenformer_jax.training.schedule import decay_length

POINTS = 1000  # losses at which two curves are compared


class Curve(NamedTuple):
    """A run from scratch at one size, until its rate decays: the FLOPs of each loss that was the lowest so far."""

    name: str
    params: int
    losses_E: np.ndarray  # falling
    flops_E: np.ndarray
    steps_E: np.ndarray
    decays: bool  # the rate falls all along

    def at(self, losses: Any, what: np.ndarray) -> Any:
        """FLOPs or steps at a loss, interpolated over their logarithms."""
        return np.exp(np.interp(-losses, -self.losses_E, np.log(what)))


def read_curve(name: str, workdir: pathlib.Path) -> Curve | None:
    """None where the run has grown, or has fewer than two losses to go by."""
    rows, growths = read_run(workdir)
    cfg = load_config(workdir / "config.json")
    if growths:
        return None
    stable = cfg.steps - (decay_length(cfg.optimizer, cfg.steps) if cfg.optimizer.schedule == "wsd" else 0)
    falling: list[Any] = []
    for row in rows:
        new = math.isfinite(row["eval_loss"]) and (not falling or row["eval_loss"] < falling[-1]["eval_loss"])
        if new and 0 < row["step"] <= stable:
            falling.append(row)
    if len(falling) < 2:
        return None
    losses, flops, steps = (np.array([row[key] for row in falling]) for key in ("eval_loss", "train_flops", "step"))
    return Curve(name, falling[-1]["params"], losses, flops, steps, cfg.optimizer.schedule == "cosine")


def compare(small: Curve, large: Curve) -> dict[str, Any]:
    """Where two sizes cross and where the small one is furthest ahead, over the losses that both reached.

    None stands for what cannot be known from these runs.
    """
    low, high = max(small.losses_E[-1], large.losses_E[-1]), min(small.losses_E[0], large.losses_E[0])
    found: dict[str, Any] = {"small": small.name, "large": large.name, "crossing": None, "growth": None}
    found["comparable"] = bool(low < high)
    if low >= high:
        return found
    losses = np.linspace(high, low, POINTS)
    ahead = large.at(losses, large.flops_E) - small.at(losses, small.flops_E)
    behind = np.flatnonzero((ahead[:-1] > 0) & (ahead[1:] <= 0))
    if len(behind):
        at = losses[behind[-1] + 1]
        found["crossing"] = {"loss": at, "flops": float(large.at(at, large.flops_E))}
    best = int(np.argmax(ahead))
    if ahead[best] > 0:
        at = losses[best]
        spent = float(small.at(at, small.flops_E))
        found["growth"] = {"loss": at, "step": round(float(small.at(at, small.steps_E))), "flops": spent}
        found["growth"] |= {"saves_at_most_flops": float(ahead[best]), "still_gaining": best == POINTS - 1}
        found["growth"]["slope"] = slope(small.flops_E, small.losses_E, spent)
    return found


def advise(runs: dict[str, pathlib.Path]) -> list[dict[str, Any]]:
    """`compare` of each size with the next larger one.

    Raises:
      UserError: fewer than two of the runs tell anything.
    """
    curves = [curve for name, workdir in runs.items() if (curve := read_curve(name, workdir))]
    curves.sort(key=lambda curve: curve.params)
    if len({curve.params for curve in curves}) < 2:
        raise UserError(
            "--advise: needs runs from scratch of two sizes, each with two evaluations or more before its rate decays; "
            "use config.eval_every, and --runs=small=W,large=W2"
        )
    pairs = [pair for pair in itertools.pairwise(curves) if pair[0].params < pair[1].params]
    return [compare(*pair) | {"rates_decay": any(curve.decays for curve in pair)} for pair in pairs]


def describe(found: dict[str, Any]) -> str:
    """The advice of a pair, in sentences."""
    small, large, crossing, growth = (found[key] for key in ("small", "large", "crossing", "growth"))
    lines = [f"{small} -> {large}:"]
    if not found["comparable"]:
        return f"{lines[0]}\n  cannot be said: there is no loss that both reached; train one of them for longer"
    if not growth:
        return f"{lines[0]}\n  do not grow: {large} reached every loss for fewer FLOPs than {small}"
    if crossing:
        lines.append(
            f"they cross at {crossing['flops']:.3g} FLOPs: below that {small} is the better size, beyond it {large}"
        )
    else:
        lines.append(f"they do not cross yet: {small} is the better size for every budget seen here")
    lines.append(
        f"grow at step {growth['step']:,} of {small} (loss {growth['loss']:.3f}): there it is furthest ahead, and "
        f"growing saves {growth['saves_at_most_flops']:.3g} FLOPs at most"
    )
    if growth["still_gaining"]:
        lines.append("that is the last loss that both reached: longer runs may find a later step that saves more")
    if crossing:
        part = growth["saves_at_most_flops"] / crossing["flops"]
        lines.append(f"that is {part:.0%} of the FLOPs at the crossing, and less of any larger budget")
    if growth["slope"]:
        lines.append(f"its loss falls there by {growth['slope']:.2f} nats for twice the FLOPs: grow.slope, of a ladder")
    lines.append(
        f"this holds if the grown model learns as fast as {large} did at that loss. Grown early, under one schedule, "
        "it learned faster; grown late, slower (docs/growth_beyond.md)"
    )
    if found["rates_decay"]:
        lines.append("a cosine's losses on the way are too high: 'wsd' or 'constant' tells more (optimizer.schedule)")
    return "\n  ".join(lines)
