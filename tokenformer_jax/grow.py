"""Grows a trained model: more parameter tokens, the same function, verified before anything is written.

python -m tokenformer_jax.grow --source=W --config=configs/quickstart.py:grown --workdir=W2 [--step=N] [--recipe=split]

`recipes.py` says what new tokens hold; Adam's moments are padded with zeros. On a mesh each device pads its own part of
every array, and moments are read straight into the larger arrays.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from jax.experimental import multihost_utils

from tokenformer_jax.checkpoint import Checkpoints, write_workdir
from tokenformer_jax.config import (
    Config,
    ModelConfig,
    UserError,
    config_flag,
    require_empty,
    run_command,
    validate,
    workdir_flag,
)
from tokenformer_jax.corpus import TokenSplit, prepare
from tokenformer_jax.data import Batch, data_identity, eval_batches, keep_position, train_batches
from tokenformer_jax.evaluate import trained_config
from tokenformer_jax.ladder import check_growth, stages
from tokenformer_jax.recipes import RECIPES, Growth
from tokenformer_jax.sharding import constrain, make_mesh, this_process
from tokenformer_jax.step import Step, TauRamp, TrainState, make_step, put_batch, sum_losses
from tokenformer_jax.transformer import Params, abstract_model, count_params, init_params, initial_tau

LOGIT_BOUND = 5e-6  # of the largest logit; float32 rounding in other reduction orders stays below it
CHECKED_BATCHES, CHECKED_ROWS, CHECKED_LENGTH = 2, 4, 32  # the function of every position, so a few hundred will do


def pad(old: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
    """The array with zeros appended, up to the new shape.

    Tokens are sharded, and an appended one moves all borders between devices. So each device first gets all tokens of
    fewer columns, in one exchange, and appends to those; padding in place would gather whole columns on all of them.
    """
    if old.shape == new.shape:
        return old
    widths = [(0, after - before) for before, after in zip(old.shape, new.shape, strict=True)]
    return by_columns(jnp.pad(by_columns(old), widths))


def by_columns(x_LND: jax.Array) -> jax.Array:
    return constrain(x_LND, None, None, "columns")


def grow_state(
    state: TrainState, abstract: TrainState, cfg: ModelConfig, key: jax.Array, recipe: str, ramp_steps: int
) -> TrainState:
    """Appends parameter tokens to a state; a pure function, to be jitted with the grown state's shardings.

    Args:
      state: of the smaller model. Without its optimizer state (an empty tuple) only the model grows.
      abstract: shapes of the grown state.
      cfg: the grown model's config.
      key: PRNG key of what the new tokens hold.
      recipe: a key of `RECIPES`.
      ramp_steps: steps over which τ goes from what the recipe says to `initial_tau(cfg)`; 0 keeps it for good.

    Returns:
      The grown state. With a lossless recipe its model computes what the smaller one computes, up to rounding.
    """
    params = jax.tree.map(pad, state.params, abstract.params)
    drawn = init_params(cfg, key)["blocks"]
    blocks, tau = dict(params["blocks"]), dict(state.tau)
    for number, (name, tokens) in enumerate(token_counts(state).items()):
        if cfg.tokens[name] == tokens:
            continue
        born = jnp.float32(initial_tau(cfg)[name])
        grown = RECIPES[recipe].apply(
            Growth(
                keys_LND=blocks[name]["keys"],
                values_LNE=blocks[name]["values"],
                drawn_keys_LND=drawn[name]["keys"],
                drawn_values_LNE=drawn[name]["values"],
                is_new_N1=jnp.arange(cfg.tokens[name])[:, None] >= tokens,
                tokens=tokens,
                tau=state.tau[name].at(state.step),
                target=born,
                key=jax.random.fold_in(key, number),
            )
        )
        blocks[name] = {"keys": grown.keys_LND, "values": grown.values_LNE}
        target = born if ramp_steps else grown.tau
        tau[name] = TauRamp(grown.tau, target, state.step, state.step + ramp_steps)
    opt_state = jax.tree.map(pad, state.opt_state, abstract.opt_state) if state.opt_state else ()
    if RECIPES[recipe].resets_optimizer:
        opt_state = forget_moments(opt_state)
    return TrainState(state.step, params | {"blocks": blocks}, opt_state, tau)


def forget_moments(opt_state: Any) -> Any:
    """An optimizer state whose Adam begins anew, at the same point of its schedule."""
    is_adam = lambda part: isinstance(part, optax.ScaleByAdamState)  # noqa: E731
    return jax.tree.map(
        lambda part: jax.tree.map(jnp.zeros_like, part) if is_adam(part) else part, opt_state, is_leaf=is_adam
    )


def token_counts(state: TrainState) -> dict[str, int]:
    """Parameter tokens of each projection."""
    return {name: state.params["blocks"][name]["keys"].shape[1] for name in state.tau}


def measure(
    old: TrainState, new: TrainState, old_cfg: Config, cfg: Config, step: Step, batches: list[Batch]
) -> dict[str, Any]:
    """Runs both models on the same batches, in float32 at the highest matmul precision.

    Returns:
      The figures of `grow.json`: the largest difference of logits and the largest logit, the losses in nats a token,
      and the gradient norms at the new key and value tokens of each projection that grew.
    """
    with jax.set_mesh(step.mesh), jax.default_matmul_precision("highest"):
        compiled = jax.jit(comparison(old_cfg, cfg, step))
        each = jax.device_get([compiled(old, new, put_batch(step, batch)) for batch in batches])
    figures = jax.tree.map(lambda *values: float(np.mean(values)), *each)
    for name in ("max_logit_difference", "max_logit"):
        figures[name] = max(float(row[name]) for row in each)
    for kind in ("key", "value"):
        norms = [norms[f"{kind}s"] for norms in figures["gradient_norms"].values()]
        figures[f"new_{kind}_gradient_norm"] = math.hypot(*norms)
    return figures


def comparison(old_cfg: Config, cfg: Config, step: Step) -> Callable[[TrainState, TrainState, Batch], dict[str, Any]]:
    """What `measure` compiles: both models on one batch. A device holds no more of a stack than a layer at a time."""

    def model(cfg: Config) -> Any:
        graphdef, _, _ = abstract_model(dataclasses.replace(cfg.model, dtype="float32", remat="full"))
        return lambda params: nnx.merge(graphdef, params)

    old_model, new_model = model(old_cfg), model(cfg)
    grown = {name: count for name, count in old_cfg.model.tokens.items() if cfg.model.tokens[name] > count}
    shardings = jax.tree.map(lambda a: a.sharding, step.abstract_state.params)

    def norm_of_new(gradient_LND: jax.Array, tokens: int) -> jax.Array:
        is_new_N1 = jnp.arange(gradient_LND.shape[1])[:, None] >= tokens
        return jnp.linalg.norm(jnp.where(is_new_N1, gradient_LND, 0.0))  # a slice would move what is sharded

    def compare(old: TrainState, new: TrainState, batch: Batch) -> dict[str, Any]:
        segments = batch.segments_BL if cfg.data.mask_documents else None
        before, _ = old_model(old.params)(batch.tokens_BL, old.tau_now(), segments_BL=segments)

        def mean_loss(logits: jax.Array) -> jax.Array:
            nll, weights = sum_losses(logits, batch)
            return nll / weights

        def loss_after(params: Params) -> tuple[jax.Array, jax.Array]:
            after, _ = new_model(params)(batch.tokens_BL, new.tau_now(), segments_BL=segments)
            return mean_loss(after), after

        (loss, after), gradients = jax.value_and_grad(loss_after, has_aux=True)(new.params)
        gradients = jax.lax.with_sharding_constraint(gradients, shardings)
        norms = {
            name: jax.tree.map(lambda g, count=count: norm_of_new(g, count), gradients["blocks"][name])
            for name, count in grown.items()
        }
        return {
            "max_logit_difference": jnp.max(jnp.abs(after - before)),
            "max_logit": jnp.max(jnp.abs(before)),
            "loss_before": mean_loss(before),
            "loss_after": loss,
            "gradient_norms": norms,
        }

    return compare


def verify(figures: dict[str, Any], recipe: str) -> None:
    """Raises a UserError that names what failed: the function moved, or new tokens without a gradient."""
    difference, largest = figures["max_logit_difference"], figures["max_logit"]
    if RECIPES[recipe].lossless and not difference <= LOGIT_BOUND * max(largest, 1.0):
        raise UserError(
            f"the grown model's logits differ by {difference:.3g} from the source's, whose largest is {largest:.3g}; "
            f"the bound is {LOGIT_BOUND:g} of that; nothing was written"
        )
    for name, norms in figures["gradient_norms"].items():
        if RECIPES[recipe].learns and not max(norms.values()) > 0:
            raise UserError(f"no gradient reaches the new tokens of {name}: they could not learn; nothing was written")


def grow_model(
    old: TrainState, old_cfg: Config, cfg: Config, step: Step, validation: TokenSplit
) -> tuple[TrainState, dict[str, Any]]:
    """Grows a model on its mesh and verifies it on batches of the validation split.

    Args:
      old: the smaller model's state; its optimizer state is not looked at.
      old_cfg: its config, with the mesh of the larger one.
      cfg: the larger one's config.
      step: of the larger model.
      validation: the tokens to verify on.

    Returns:
      The grown state without optimizer state, and the figures of `grow.json`.

    Raises:
      UserError: the function moved, or new tokens could not learn.
    """
    step_number = int(old.step)
    old = old._replace(opt_state=())
    ramp_steps = 0 if cfg.model.tau_tokens else math.ceil(cfg.grow.tau_ramp * (cfg.steps - step_number))
    abstract = step.abstract_state._replace(opt_state=())
    key = jax.random.fold_in(jax.random.key(cfg.seed), step_number)
    seconds: dict[str, float] = {}
    with timed(seconds, "append"), jax.set_mesh(step.mesh):
        append = jax.jit(
            lambda state, key: grow_state(state, abstract, cfg.model, key, cfg.grow.recipe, ramp_steps),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )
        new = jax.block_until_ready(append(old, key))
    shards = cfg.mesh.data * cfg.mesh.fsdp
    rows, length = shards * max(1, CHECKED_ROWS // shards), min(CHECKED_LENGTH, cfg.model.context_length)
    batches = eval_batches(validation, rows, length, max_batches=CHECKED_BATCHES, **this_process())
    with timed(seconds, "verify"):
        measured = measure(old, new, old_cfg, cfg, step, list(batches))
    figures = {
        "step": step_number,
        "recipe": cfg.grow.recipe,
        "tau_ramp_steps": ramp_steps if RECIPES[cfg.grow.recipe].ramps else 0,
        "tokens_before": old_cfg.model.tokens,
        "tokens_after": cfg.model.tokens,
        "params_before": count_params(old.params),
        "params_after": count_params(new.params),
        "groups_before": group_sizes(old),
        "groups_after": group_sizes(new),
        **measured,
        "seconds": seconds,
    }
    verify(figures, cfg.grow.recipe)
    return new, figures


@contextlib.contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds that a phase takes; it must wait for what it computes."""
    began = time.monotonic()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - began


def peak_host_bytes() -> int:
    """The most memory that a process of the run held so far, in this machine's count of resident pages."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(np.max(multihost_utils.process_allgather(np.float32(peak))))


def grow_moments(opt_state: Any, step: Step, recipe: str) -> Any:
    """Pads the optimizer state array by array, and frees each former one."""

    def grow_one(old: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
        if old.shape == new.shape:
            return jax.device_put(old, new.sharding)
        larger = jax.jit(lambda x: pad(x, new), out_shardings=new.sharding)(old)
        larger.block_until_ready()
        old.delete()
        return larger

    with jax.set_mesh(step.mesh):
        padded = jax.tree.map(grow_one, opt_state, step.abstract_state.opt_state)
    return forget_moments(padded) if RECIPES[recipe].resets_optimizer else padded


def history(figures: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's record keeps of a growth."""
    checks = "recipe", "max_logit_difference", "max_logit", "loss_before", "loss_after"
    return {
        "step": figures["step"],
        "from": figures["tokens_before"],
        "to": figures["tokens_after"],
        **{name: figures[name] for name in checks},
    }


def grow(source: pathlib.Path, cfg: Config, workdir: pathlib.Path, step_number: int | None = None) -> dict[str, Any]:
    """Grows the newest (or given) checkpoint of `source` to the config's token counts, into a new workdir.

    Where the config has rungs of its own, `train` climbs them later. The target appears whole or not at all; the source
    is only read. Returns what `grow.json` holds.

    Raises:
      UserError: where the two models do not fit, the target is taken, or a check fails; nothing is written then.
    """
    files = {"config.json": cfg.to_json()}
    cfg = stages(cfg)[0]
    checkpoints = Checkpoints(source / "checkpoints")
    step_number = checkpoints.choose(step_number)
    record, tokenizer = checkpoints.record(step_number), checkpoints.tokenizer(step_number)
    old_cfg = dataclasses.replace(cfg, model=trained_config(source, record).model)
    check_growth(old_cfg.model, cfg.model, cfg.grow.recipe)
    require_empty(workdir, "holds something already")
    if cfg.steps <= step_number:
        raise UserError(
            f"steps = {cfg.steps}: the source was trained for {step_number} already; a larger number would do"
        )
    validate(old_cfg)  # the source, too, must divide by the mesh
    if cfg.grow.restart_schedule:
        record = dataclasses.replace(record, schedule_start=step_number)
        if cfg.optimizer.warmup_steps >= cfg.steps - step_number:
            raise UserError(
                f"optimizer.warmup_steps = {cfg.optimizer.warmup_steps}: must be below the {cfg.steps - step_number} "
                f"steps from the source's {step_number} to steps = {cfg.steps}"
            )
    step = make_step(cfg, make_mesh(cfg.mesh), record.schedule_start)
    old_step = make_step(old_cfg, step.mesh)
    corpus = prepare(cfg, tokenizer)

    restoring: dict[str, float] = {}
    with timed(restoring, "restore"):
        wanted = old_step.abstract_state.without_moments()
        old = TrainState(**checkpoints.restore(step_number, wanted), opt_state=())
    new, figures = grow_model(old, old_cfg, cfg, step, corpus.validation)
    figures = {"source": str(source), **figures}
    del old  # the moments need its memory
    with timed(restoring, "restore"):
        wanted = {"opt_state": step.abstract_state.opt_state}
        opt_state = checkpoints.restore(step_number, wanted, padded=True)["opt_state"]
    if RECIPES[cfg.grow.recipe].resets_optimizer:
        opt_state = forget_moments(opt_state)
    new = new._replace(opt_state=opt_state)
    figures["seconds"] = seconds = restoring | figures["seconds"]

    data = train_batches(corpus.train, cfg, **this_process())
    identity = data_identity(corpus.train, cfg)
    if record.data == identity:  # other data begin at their beginning
        checkpoints.restore_data(step_number, data)
        keep_position(data, record.batch_size, cfg.batch_size)
    checkpoints.close()
    record = dataclasses.replace(
        record,
        model=dataclasses.asdict(cfg.model),
        data=identity,
        batch_size=cfg.batch_size,
        growth=[*record.growth, history(figures)],
        rung=0,
        plateau={},
    )
    began = time.monotonic()

    def finish() -> dict[str, str]:
        seconds["write"] = time.monotonic() - began
        figures["peak_host_bytes"] = peak_host_bytes()
        return files | {"grow.json": json.dumps(figures, indent=2) + "\n"}

    write_workdir(workdir, step_number, (new, data, tokenizer, record), finish)
    return figures


def group_sizes(state: TrainState) -> dict[str, dict[str, int]]:
    """Parameter tokens, parameters, and bytes with Adam's moments, of each part of a model and in all."""
    tokens = token_counts(state)
    groups = {name: tree for name, tree in state.params.items() if name != "blocks"} | state.params["blocks"]
    sizes = {
        name: {"tokens": tokens.get(name, 0), "params": count_params(tree), "bytes": 3 * 4 * count_params(tree)}
        for name, tree in groups.items()
    }
    return sizes | {"all": {key: sum(size[key] for size in sizes.values()) for key in ("tokens", "params", "bytes")}}


def describe(figures: dict[str, Any]) -> str:
    """The growth as a table for people."""
    lines = [f"{'':<12}{'parameter tokens':^20}  {'parameters':^28}  {'with moments, MB':^20}"]
    for name, after in figures["groups_after"].items():
        before = figures["groups_before"][name]
        tokens, params = (f"{before[key]:,} -> {after[key]:,}" for key in ("tokens", "params"))
        memory = f"{before['bytes'] / 1e6:,.1f} -> {after['bytes'] / 1e6:,.1f}"
        lines.append(f"{name:<12}{tokens if after['tokens'] else '':^20}  {params:^28}  {memory:^20}")
    lines.append(
        f"at step {figures['step']}: loss {figures['loss_before']:.5f} -> {figures['loss_after']:.5f}, largest change "
        f"of a logit {figures['max_logit_difference']:.2g} (largest logit {figures['max_logit']:.3g}), gradient norm "
        f"at new keys {figures['new_key_gradient_norm']:.3g}, at new values {figures['new_value_gradient_norm']:.3g}"
    )
    if "peak_host_bytes" in figures:
        spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in figures["seconds"].items())
        lines.append(f"{spent}; peak host memory {figures['peak_host_bytes'] / 1e9:.2f} GB")
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    cfg = _CONFIG()
    if _RECIPE.value:
        cfg = dataclasses.replace(cfg, grow=dataclasses.replace(cfg.grow, recipe=_RECIPE.value))
        validate(cfg)
    figures = grow(_SOURCE(), cfg, _WORKDIR(), _STEP.value)
    if jax.process_index() == 0:
        print(describe(figures))
        recipe = RECIPES[cfg.grow.recipe]
        if figures["tokens_before"] == figures["tokens_after"]:
            print("no token count changed: the new workdir continues the same model")
        elif not recipe.learns:
            print("warning: with zero keys and zero values the new tokens have no gradient and can never learn")
        elif not recipe.lossless:
            print(f"warning: {cfg.grow.recipe} is not lossless: the model has changed")


if __name__ == "__main__":
    _CONFIG = config_flag()
    _SOURCE = workdir_flag("source", "the directory of the run to grow")
    _WORKDIR = workdir_flag(help_text="the new directory, which train then resumes")
    _STEP = flags.DEFINE_integer("step", None, "which checkpoint of the source; by default the newest")
    _RECIPE = flags.DEFINE_string("recipe", None, f"{', '.join(RECIPES)}; overrides config.grow.recipe")
    run_command(main)
