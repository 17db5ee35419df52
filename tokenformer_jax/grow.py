"""Grows a trained model: more parameter tokens, the same function, verified before anything is written.

python -m tokenformer_jax.grow --source=W --config=configs/quickstart.py:grown --workdir=W2 [--step=N] [--values=zeros]

New keys are zero and new values come from the initialiser, Adam's moments are padded with zeros, and τ keeps its value
and is then ramped to √N: nothing changes at the moment of growth, and the new tokens can learn.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from tokenformer_jax.checkpoint import Checkpoints, write_workdir
from tokenformer_jax.config import (
    FREE_MODEL_KEYS,
    Config,
    ModelConfig,
    UserError,
    config_flag,
    load_config,
    require_empty,
    run_command,
    validate,
    workdir_flag,
)
from tokenformer_jax.corpus import prepare
from tokenformer_jax.data import Batch, data_identity, eval_batches, keep_position, train_batches
from tokenformer_jax.sharding import make_mesh, this_process
from tokenformer_jax.step import Step, TauRamp, TrainState, loss_sums, make_step, put_batch
from tokenformer_jax.transformer import Params, abstract_model, count_params, init_params, initial_tau

LOGIT_BOUND = 5e-6  # of the largest logit; float32 rounding in other reduction orders stays below it
CHECKED_BATCHES, CHECKED_ROWS = 2, 4


def grow_state(
    state: TrainState, abstract: TrainState, cfg: ModelConfig, key: jax.Array, values: str, ramp_steps: int
) -> TrainState:
    """Appends parameter tokens to a state; a pure function, to be jitted with the grown state's shardings.

    Args:
      state: of the smaller model.
      abstract: shapes of the grown state. Every array is padded to them with zeros: keys, and Adam's moments.
      cfg: the grown model's config.
      key: PRNG key of the new values.
      values: "initializer" draws them as at birth; with "zeros" the new tokens can never learn.
      ramp_steps: steps over which τ goes from its value now to `initial_tau(cfg)`; 0 keeps it for good.

    Returns:
      The grown state. Its model computes what the smaller one computes, up to rounding.
    """

    def pad(old: jax.Array, new: jax.ShapeDtypeStruct) -> jax.Array:
        if old.shape == new.shape:
            return old
        return jnp.pad(old, [(0, after - before) for before, after in zip(old.shape, new.shape, strict=True)])

    grown = jax.tree.map(pad, state, abstract)
    drawn = init_params(cfg, key)["blocks"]
    blocks, tau = dict(grown.params["blocks"]), dict(grown.tau)
    for name, tokens in token_counts(state).items():
        if cfg.tokens[name] == tokens:
            continue
        if values == "initializer":
            is_new = jnp.arange(cfg.tokens[name])[:, None] >= tokens
            blocks[name] |= {"values": jnp.where(is_new, drawn[name]["values"], blocks[name]["values"])}
        now = state.tau[name].at(state.step)
        target = jnp.float32(initial_tau(cfg)[name]) if ramp_steps else now
        tau[name] = TauRamp(now, target, state.step, state.step + ramp_steps)
    return grown._replace(params=grown.params | {"blocks": blocks}, tau=tau)


def token_counts(state: TrainState) -> dict[str, int]:
    """Parameter tokens of each projection."""
    return {name: state.params["blocks"][name]["keys"].shape[1] for name in state.tau}


def check_growth(old: ModelConfig, new: ModelConfig) -> None:
    """Raises a UserError unless `new` is `old` with more parameter tokens (or with the same)."""
    sizes = ("qkv_tokens", "out_tokens", "ffn_tokens")
    for field in dataclasses.fields(ModelConfig):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name in sizes and after < before:
            raise UserError(
                f"model.{field.name} = {after}: the source has {before} already; growing takes that or more"
            )
        if field.name not in (*sizes, *FREE_MODEL_KEYS) and after != before:
            raise UserError(
                f"model.{field.name} = {after!r}: the source has {before!r}; growth changes token counts only"
            )
    if any(getattr(old, size) != getattr(new, size) for size in sizes):
        if new.projection == "linear":
            raise UserError("model.projection = 'linear': a plain Transformer has no parameter tokens to grow")
        if new.normalizer == "softmax":
            raise UserError("model.normalizer = 'softmax': growth is not lossless with it; l2_norm_gelu would do")


def measure(
    old: TrainState, new: TrainState, old_cfg: Config, cfg: Config, step: Step, batches: list[Batch]
) -> dict[str, Any]:
    """Runs both models on the same batches, in float32 at the highest matmul precision.

    Returns:
      The figures of `grow.json`: the largest difference of logits and the largest logit, the losses in nats a token,
      and the gradient norms at the new key and value tokens of each projection that grew.
    """

    def model(cfg: Config) -> Any:
        graphdef, _, _ = abstract_model(dataclasses.replace(cfg.model, dtype="float32"))
        return lambda params: nnx.merge(graphdef, params)

    old_model, new_model = model(old_cfg), model(cfg)
    grown = {name: count for name, count in token_counts(old).items() if cfg.model.tokens[name] > count}

    def compare(old: TrainState, new: TrainState, batch: Batch) -> dict[str, Any]:
        segments = batch.segments_BL if cfg.data.mask_documents else None
        before, _ = old_model(old.params)(batch.tokens_BL, old.tau_now(), segments_BL=segments)
        after, _ = new_model(new.params)(batch.tokens_BL, new.tau_now(), segments_BL=segments)

        def mean_loss(model: Any, state: TrainState, params: Params) -> jax.Array:
            nll, weights = loss_sums(model(params), state.tau_now(), batch, cfg.data.mask_documents)
            return nll / weights

        loss_after, gradients = jax.value_and_grad(lambda params: mean_loss(new_model, new, params))(new.params)
        norms = {
            name: jax.tree.map(lambda g, count=count: jnp.linalg.norm(g[:, count:]), gradients["blocks"][name])
            for name, count in grown.items()
        }
        return {
            "max_logit_difference": jnp.max(jnp.abs(after - before)),
            "max_logit": jnp.max(jnp.abs(before)),
            "loss_before": mean_loss(old_model, old, old.params),
            "loss_after": loss_after,
            "gradient_norms": norms,
        }

    with jax.set_mesh(step.mesh), jax.default_matmul_precision("highest"):
        compiled = jax.jit(compare)
        each = jax.device_get([compiled(old, new, put_batch(step, batch)) for batch in batches])
    figures = jax.tree.map(lambda *values: float(np.mean(values)), *each)
    for name in ("max_logit_difference", "max_logit"):
        figures[name] = max(float(row[name]) for row in each)
    for kind in ("key", "value"):
        norms = [norms[f"{kind}s"] for norms in figures["gradient_norms"].values()]
        figures[f"new_{kind}_gradient_norm"] = math.hypot(*norms)
    return figures


def verify(figures: dict[str, Any], values: str) -> None:
    """Raises a UserError that names what failed: the function moved, or new tokens without a gradient."""
    difference, largest = figures["max_logit_difference"], figures["max_logit"]
    if not difference <= LOGIT_BOUND * max(largest, 1.0):
        raise UserError(
            f"the grown model's logits differ by {difference:.3g} from the source's, whose largest is {largest:.3g}; "
            f"the bound is {LOGIT_BOUND:g} of that; nothing was written"
        )
    for name, norms in figures["gradient_norms"].items():
        if values != "zeros" and not max(norms.values()) > 0:
            raise UserError(f"no gradient reaches the new tokens of {name}: they could not learn; nothing was written")


def grow(source: pathlib.Path, cfg: Config, workdir: pathlib.Path, step_number: int | None = None) -> dict[str, Any]:
    """Grows the newest (or given) checkpoint of `source` to the config's token counts, into a new workdir.

    The target appears whole or not at all; the source is only read. Returns what `grow.json` holds.

    Raises:
      UserError: where the two models do not fit, the target is taken, or a check fails; nothing is written then.
    """
    source_cfg = load_config(source / "config.json")
    check_growth(source_cfg.model, cfg.model)
    require_empty(workdir, "holds something already")
    checkpoints = Checkpoints(source / "checkpoints")
    step_number = checkpoints.choose(step_number)
    if cfg.steps <= step_number:
        raise UserError(
            f"steps = {cfg.steps}: the source was trained for {step_number} already; a larger number would do"
        )
    mesh = make_mesh(cfg.mesh)
    record, tokenizer = checkpoints.record(step_number), checkpoints.tokenizer(step_number)
    old_cfg = dataclasses.replace(cfg, model=source_cfg.model)
    validate(old_cfg)  # the source, too, must divide by the mesh
    old_step = make_step(old_cfg, mesh, record.schedule_start)
    if cfg.grow.restart_schedule:
        record = dataclasses.replace(record, schedule_start=step_number)
        if cfg.optimizer.warmup_steps >= cfg.steps - step_number:
            raise UserError(
                f"optimizer.warmup_steps = {cfg.optimizer.warmup_steps}: must be below the {cfg.steps - step_number} "
                f"steps from the source's {step_number} to steps = {cfg.steps}"
            )
    new_step = make_step(cfg, mesh, record.schedule_start)
    old_state = checkpoints.restore(step_number, old_step.abstract_state)

    ramp_steps = 0 if cfg.model.tau_tokens else math.ceil(cfg.grow.tau_ramp * (cfg.steps - step_number))
    grown_shardings = jax.tree.map(lambda a: a.sharding, new_step.abstract_state)
    key = jax.random.fold_in(jax.random.key(cfg.seed), step_number)
    with jax.set_mesh(mesh):
        pad = jax.jit(
            lambda state, key: grow_state(state, new_step.abstract_state, cfg.model, key, cfg.grow.values, ramp_steps),
            out_shardings=grown_shardings,
        )
        new_state = pad(old_state, key)

    corpus = prepare(cfg, tokenizer)
    shards = cfg.mesh.data * cfg.mesh.fsdp
    batches = eval_batches(
        corpus.validation,
        shards * max(1, CHECKED_ROWS // shards),
        cfg.model.context_length,
        max_batches=CHECKED_BATCHES,
        **this_process(),
    )
    tokens_before, tokens_after = source_cfg.model.tokens, cfg.model.tokens
    figures = {
        "source": str(source),
        "step": step_number,
        "values": cfg.grow.values,
        "tau_ramp_steps": ramp_steps,
        "tokens_before": tokens_before,
        "tokens_after": tokens_after,
        "params_before": count_params(old_state.params),
        "params_after": count_params(new_state.params),
        "groups_before": group_sizes(old_state),
        "groups_after": group_sizes(new_state),
        **measure(old_state, new_state, old_cfg, cfg, new_step, list(batches)),
    }
    verify(figures, cfg.grow.values)

    data = train_batches(corpus.train, cfg, **this_process())
    identity = data_identity(corpus.train, cfg)
    if record.data == identity:  # other data begin at their beginning
        checkpoints.restore_data(step_number, data)
        keep_position(data, record.batch_size, cfg.batch_size)
    checkpoints.close()
    growth = [*record.growth, {"step": step_number, "from": tokens_before, "to": tokens_after}]
    record = dataclasses.replace(record, data=identity, batch_size=cfg.batch_size, growth=growth)
    files = {"config.json": cfg.to_json(), "grow.json": json.dumps(figures, indent=2) + "\n"}
    write_workdir(workdir, step_number, (new_state, data, tokenizer, record), files)
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
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    cfg = _CONFIG()
    if _VALUES.value:
        cfg = dataclasses.replace(cfg, grow=dataclasses.replace(cfg.grow, values=_VALUES.value))
        validate(cfg)
    figures = grow(_SOURCE(), cfg, _WORKDIR(), _STEP.value)
    if jax.process_index() == 0:
        print(describe(figures))
        if figures["tokens_before"] == figures["tokens_after"]:
            print("no token count changed: the new workdir continues the same model")
        elif cfg.grow.values == "zeros":
            print("warning: with zero keys and zero values the new tokens have no gradient and can never learn")


if __name__ == "__main__":
    _CONFIG = config_flag()
    _SOURCE = workdir_flag("source", "the directory of the run to grow")
    _WORKDIR = workdir_flag(help_text="the new directory, which train then resumes")
    _STEP = flags.DEFINE_integer("step", None, "which checkpoint of the source; by default the newest")
    _VALUES = flags.DEFINE_string("values", None, "new values: initializer or zeros; overrides config.grow.values")
    run_command(main)
