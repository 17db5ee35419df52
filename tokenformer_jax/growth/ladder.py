"""A ladder: one run that grows on its way. Its rungs change the config, from their step on.

config.rungs = (
    dict(step=600_000, model=dict(qkv_tokens=2176, out_tokens=2176, ffn_tokens=8704)),
    dict(step=660_000, model=dict(qkv_tokens=4864, …), optimizer=dict(peak_learning_rate=3e-4), batch_size=1024),
)
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tokenformer_jax.config import BUDGETS, Config, GrowConfig, IndivisibleBatch, read_config, validate
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.slope import slope
from tokenformer_jax.growth.recipes import check_growth
from tokenformer_jax.training.tasks import flops_per_token, task_of

SCHEDULE_KEYS = ("schedule", "decay_fraction", "decay", "warmup_steps")  # the same in all stages of one schedule
RUNG_KEYS = (
    "model optimizer grow mesh batch_size accumulation log_every eval_every eval_batches checkpoint_every"
).split()


def stages(cfg: Config) -> list[Config]:
    """The plain configs of a run, in order: the first as `cfg` says, and one a rung, which keeps what it doesn't name.

    `steps` of a stage is the step at which the next one begins, or the run ends.
    Where a budget says the end, `with_budget` fills it in.

    Raises:
      UserError: names the rung and the key that cannot be.
    """
    steps: list[Any] = [*(rung.get("step") for rung in cfg.rungs), cfg.steps]
    if cfg.budget:
        steps[-1] = max(step for step in (0, *steps[:-1]) if type(step) is int) + 1
    tree = dataclasses.asdict(cfg) | {"rungs": ()} | dict.fromkeys(BUDGETS, 0.0)
    result: list[Config] = []
    for number, end in enumerate(steps):
        try:
            began = steps[number - 1] if number else 0
            if type(end) is not int or end <= began:
                name = "steps" if number == len(cfg.rungs) else f"rungs[{number}].step"
                raise UserError(f"{name} = {end!r}: must be a step after {began}, where the stage before begins")
            if number:
                tree = _changed(tree, cfg.rungs[number - 1])
            if is_open := bool(cfg.budget) and number == len(cfg.rungs):
                tree |= {cfg.budget: getattr(cfg, cfg.budget)}
            stage = read_config(tree | {"steps": end})
            if number:
                _check_rung(result[-1], stage, math.inf if is_open else end - began)
            result.append(stage)
        except IndivisibleBatch as error:
            raise IndivisibleBatch(_named(number, error), error.cfg, number) from None
        except UserError as error:
            raise UserError(_named(number, error)) from None
    alone = any(stage.grow.train == "new" for stage in result)
    if alone and cfg.optimizer.average:
        raise UserError(
            f"optimizer.average = {cfg.optimizer.average}: a mean of weights that stay is of no use; with "
            "grow.train = 'new' use 0"
        )
    if cfg.train_flops and alone:
        raise UserError(
            f"train_flops = {cfg.train_flops:g}: is planned for models that learn as a whole; with grow.train = 'new' "
            "use steps or train_tokens"
        )
    return result


def _named(number: int, error: UserError) -> str:
    return f"rungs[{number - 1}]: {error}" if number else str(error)


def _changed(tree: dict[str, Any], rung: dict[str, Any]) -> dict[str, Any]:
    for key, value in rung.items():
        if key == "step":
            continue
        if key not in RUNG_KEYS:
            raise UserError(f"key {key!r} cannot change on the way; step, {', '.join(RUNG_KEYS)} can")
        tree = tree | {key: tree[key] | value if isinstance(value, Mapping) else value}
    return tree


def _check_rung(before: Config, stage: Config, length: float) -> None:
    check_growth(before.model, stage.model, stage.grow.recipe)
    if before.model.tokens == stage.model.tokens:
        raise UserError("model: no token count changes; a rung makes one larger, such as model.ffn_tokens")
    try:
        validate(dataclasses.replace(stage, model=before.model))
    except UserError as error:
        raise UserError(f"the model that is to grow: {error}") from None
    kept = before.optimizer.average
    if stage.optimizer.average != kept:
        raise UserError(f"optimizer.average = {stage.optimizer.average!r}: the stage before has {kept!r}; use that")
    warmup = stage.optimizer.warmup_steps
    if stage.grow.restart_schedule:
        if warmup >= length:
            raise UserError(f"optimizer.warmup_steps = {warmup}: must be below the rung's {length} steps")
        return
    for key in SCHEDULE_KEYS:
        old, new = getattr(before.optimizer, key), getattr(stage.optimizer, key)
        if old != new:
            raise UserError(
                f"optimizer.{key} = {new!r}: the stage before has {old!r}, and grow.restart_schedule = False goes on "
                "with its schedule; use that"
            )
    if before.grow.may_begin_early and stage.optimizer.schedule == "cosine":
        key = "patience" if before.grow.patience else "slope"
        raise UserError(
            f"grow.{key} = {getattr(before.grow, key)}: with grow.restart_schedule = False an early rung would make a "
            "cosine's rate jump; use optimizer.schedule = 'wsd'"
        )


def schedule_end(plan: list[Config], rung: int) -> int:
    """The step at which the learning-rate schedule of a stage ends: its own end, or that of those which continue it."""
    end = rung
    while end + 1 < len(plan) and not plan[end + 1].grow.restart_schedule:
        end += 1
    return plan[end].steps


def with_budget(plan: list[Config], rung: int = 0, step: int = 0, tokens: int = 0, flops: float = 0.0) -> list[Config]:
    """The stages, with the last one's `steps` where the run has spent its budget, if the config has one.

    Args:
      rung, step: where the run stands. The step is the planned one, also where this rung began early.
      tokens, flops: what it has spent so far.

    Raises:
      UserError: the budget is too small.
    """
    last = plan[-1]
    key = last.budget
    if not key:
        return plan
    budget, spent = getattr(last, key), flops if key == "train_flops" else tokens / _tokens_of(last, key)
    *costs, cost = (_cost_of_a_step(stage, key) for stage in plan)
    unit = key.removeprefix("train_")
    if budget < cost:
        raise UserError(f"{key} = {budget:.15g}: is less than one step's {cost:.15g} {unit}; use that or more")
    for stage, each in list(zip(plan, costs, strict=False))[rung:]:
        spent, step = spent + (stage.steps - step) * each, stage.steps
    left = (budget - spent) / cost
    steps = step + math.ceil(round(left, 6) if key != "train_tokens" else left)  # sums are rounded
    if rung + 1 < len(plan) and steps <= step:
        raise UserError(f"{key} = {budget:.15g}: the rungs before the last take {spent:.15g} {unit}; use more")
    length = steps - (plan[-2].steps if costs else 0)
    if step < steps and last.optimizer.warmup_steps >= length:
        raise UserError(
            f"optimizer.warmup_steps = {last.optimizer.warmup_steps}: must be below the {length} steps "
            f"that {key} = {budget:.15g} leaves"
        )
    return [*plan[:-1], dataclasses.replace(last, steps=steps)]


def _cost_of_a_step(stage: Config, key: str) -> float:
    task = task_of(stage)
    tokens = task.tokens_per_step(stage)
    if key == "train_flops":
        return tokens * flops_per_token(stage)
    return tokens / _tokens_of(stage, key)


def _tokens_of(stage: Config, key: str) -> int:
    """Tokens of an epoch, or 1."""
    return stage.data.train_examples * stage.model.positions if key == "train_epochs" else 1


def shifted(stage: Config, planned_start: int, start: int) -> Config:
    """The stage, as long as planned, for a rung that began at `start` since the loss had stopped falling."""
    return dataclasses.replace(stage, steps=start + stage.steps - planned_start)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Whether the validation loss of a stage still falls, and how much more FLOPs bring."""

    step: int = 0  # of the last evaluation
    best_loss: float | None = None
    stale: int = 0  # evaluations since that did not improve on it
    seen: tuple[
        tuple[float, float], ...
    ] = ()  # all FLOPs and loss of evaluations, from half of the last one's FLOPs on

    def after(self, step: int, loss: float, flops: float, min_improvement: float) -> "Plateau":
        best, is_finite = self.best_loss, math.isfinite(loss)
        before = [each for each in self.seen if each[0] <= flops / 2][-1:]  # to interpolate from
        since = [each for each in self.seen if flops / 2 < each[0] < flops]
        seen = (*before, *since, (flops, loss)) if is_finite else self.seen
        if is_finite and (best is None or not math.isfinite(best) or loss <= best - min_improvement):
            return Plateau(step, loss, seen=seen)
        return Plateau(step, best, self.stale + 1, seen)  # also where the loss is not finite: that is no improvement

    @property
    def slope(self) -> float | None:
        """Nats that the last doubling of all FLOPs has brought; None where the stage has not seen one."""
        if not self.seen:
            return None
        flops_E, losses_E = zip(*self.seen, strict=True)
        return slope(flops_E, losses_E, flops_E[-1])

    def reached(self, grow: GrowConfig) -> bool:
        """Whether `grow.patience` evaluations in a row brought nothing, or twice the FLOPs less than `grow.slope`."""
        slope = self.slope
        return 0 < grow.patience <= self.stale or (slope is not None and slope < grow.slope)
