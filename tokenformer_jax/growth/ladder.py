"""A ladder: one run that grows on its way. Its rungs change the config, from their step on.

config.rungs = (
    dict(step=600_000, model=dict(qkv_tokens=2176, out_tokens=2176, ffn_tokens=8704)),
    dict(step=660_000, model=dict(qkv_tokens=4864, …), optimizer=dict(peak_learning_rate=3e-4), batch_size=1024),
)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenformer_jax.config import FREE_MODEL_KEYS, SIZES, Config, ModelConfig, read_config, validate
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.recipes import RECIPES

RUNG_KEYS = (
    "model optimizer grow mesh batch_size accumulation log_every eval_every eval_batches checkpoint_every"
).split()


def stages(cfg: Config) -> list[Config]:
    """The plain configs of a run, in order: the first as `cfg` says, and one a rung, which keeps what it doesn't name.

    `steps` of a stage is the step at which the next one begins, or the run ends; a learning-rate schedule spans it.

    Raises:
      UserError: names the rung and the key that cannot be.
    """
    steps: list[Any] = [*(rung.get("step") for rung in cfg.rungs), cfg.steps]
    tree = dataclasses.asdict(cfg) | {"rungs": (), "steps": steps[0]}
    result: list[Config] = []
    for number, end in enumerate(steps):
        try:
            began = steps[number - 1] if number else 0
            if type(end) is not int or end <= began:
                name = "steps" if number == len(cfg.rungs) else f"rungs[{number}].step"
                raise UserError(f"{name} = {end!r}: must be a step after {began}, where the stage before begins")
            if number:
                tree = _changed(tree, cfg.rungs[number - 1])
            stage = read_config(tree | {"steps": end})
            if number:
                _check_rung(result[-1], stage, end - began)
            result.append(stage)
        except UserError as error:
            raise UserError(f"rungs[{number - 1}]: {error}" if number else str(error)) from None
    return result


def _changed(tree: dict[str, Any], rung: dict[str, Any]) -> dict[str, Any]:
    for key, value in rung.items():
        if key == "step":
            continue
        if key not in RUNG_KEYS:
            raise UserError(f"key {key!r} cannot change on the way; step, {', '.join(RUNG_KEYS)} can")
        tree = tree | {key: tree[key] | value if isinstance(value, Mapping) else value}
    return tree


def _check_rung(before: Config, stage: Config, length: int) -> None:
    check_growth(before.model, stage.model, stage.grow.recipe)
    if before.model.tokens == stage.model.tokens:
        raise UserError("model: no token count changes; a rung makes one larger, such as model.ffn_tokens")
    try:
        validate(dataclasses.replace(stage, model=before.model))
    except UserError as error:
        raise UserError(f"the model that is to grow: {error}") from None
    if not stage.grow.restart_schedule:
        raise UserError("grow.restart_schedule = False: each rung has a learning-rate schedule of its own; use True")
    warmup = stage.optimizer.warmup_steps
    if warmup >= length:
        raise UserError(f"optimizer.warmup_steps = {warmup}: must be below the rung's {length} steps")


def check_growth(old: ModelConfig, new: ModelConfig, recipe: str) -> None:
    """Raises a UserError unless `new` is `old` with more parameter tokens (or as many), which the recipe can append."""
    check_same_but_sizes(old, new, "growth")
    old_padded, new_padded = old.padding_counted(), new.padding_counted()
    for size in SIZES:
        named, count = getattr(old, size), getattr(new, size)
        before, after = getattr(old_padded, size), getattr(new_padded, size)
        if count < named or after < before:
            raise UserError(f"model.{size} = {count}: the source has {before} already; growing takes that or more")
        if count != named and after == before:
            raise UserError(f"model.{size} = {count}: the source's {named} are padded to {before}; more would do")
    if all(getattr(old_padded, size) == getattr(new_padded, size) for size in SIZES):
        return
    if new.projection == "linear":
        raise UserError("model.projection = 'linear': a plain Transformer has no parameter tokens to grow")
    if new.normalizer == "softmax":
        raise UserError("model.normalizer = 'softmax': growth is not lossless with it; l2_norm_gelu would do")
    if new.normalizer not in RECIPES[recipe].normalizers:
        raise UserError(
            f"grow.recipe = {recipe!r}: needs model.normalizer = {' or '.join(RECIPES[recipe].normalizers)}, "
            f"not {new.normalizer!r}; zero_keys would do"
        )
    if new.tau_tokens and not RECIPES[recipe].ramps:
        raise UserError(f"grow.recipe = {recipe!r}: changes τ, which model.tau_tokens fixes; zero_keys would do")
    for name, before in old.tokens.items():
        after = new.tokens[name]
        size = f"{name}_tokens" if name in ("ffn", "out") else "qkv_tokens"
        if recipe == "split" and after % before:
            raise UserError(
                f"model.{size} = {after}: grow.recipe = 'split' takes a multiple of the source's {before}; "
                f"{after // before * before} or {(after // before + 1) * before} would do"
            )
        least = before + min(before, new.embed_dim)
        if recipe == "isometric" and before < after < least:
            raise UserError(
                f"model.{size} = {after}: grow.recipe = 'isometric' takes the source's {before} or at least {least}"
            )


def check_same_but_sizes(old: ModelConfig, new: ModelConfig, what: str) -> None:
    """Raises a UserError where two models differ in more than token counts and what may always change."""
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name not in (*SIZES, "pad_tokens_to", *FREE_MODEL_KEYS) and after != before:
            raise UserError(
                f"model.{field.name} = {after!r}: the source has {before!r}; {what} changes token counts only"
            )


def shifted(stage: Config, planned_start: int, start: int) -> Config:
    """The stage, as long as planned, for a rung that began at `start` since the loss had stopped falling."""
    return dataclasses.replace(stage, steps=start + stage.steps - planned_start)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Whether the validation loss of a stage still falls."""

    step: int = 0  # of the last evaluation
    best_loss: float | None = None
    stale: int = 0  # evaluations since that did not improve on it

    def after(self, step: int, loss: float, min_improvement: float) -> "Plateau":
        if self.best_loss is None or loss <= self.best_loss - min_improvement:
            return Plateau(step, loss)
        return Plateau(step, self.best_loss, self.stale + 1)

    def reached(self, patience: int) -> bool:
        """Whether so many evaluations in a row brought nothing; never with a patience of 0."""
        return 0 < patience <= self.stale
