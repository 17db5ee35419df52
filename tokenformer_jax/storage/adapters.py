"""Adapters as files: the new tokens of a run that trained those alone, apart from the base that they were appended to.

A file is a `.safetensors` with the tokens of each projection that grew. Its metadata is a sealed JSON text: the base's
fingerprint and τ, τ of both together, how it was trained, and a checksum of the tokens. Put on that base, the model is
the adapted run's, to the bit; left off, nothing of the base has changed. Several are appended one after another.
"""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tokenformer_jax.config import ModelConfig, validate
from tokenformer_jax.devices.sharding import constrain, replicated
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import make_folder, sealed, unsealed
from tokenformer_jax.nn.layers import Params, count_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.trained import PutOn, Trained, load_trained
from tokenformer_jax.training import nested
from tokenformer_jax.training.state import TauRamp
from tokenformer_jax.training.step import make_step

FORMAT = "tokenformer_jax adapter 1"


class Adapter(NamedTuple):
    source: str  # the file's name
    tokens: dict[str, dict[str, np.ndarray]]  # projection -> keys [Y, M, D] and values [Y, M, E]
    base: str  # fingerprint of the model that they were appended to
    base_tau: dict[str, float]
    tau: dict[str, float]  # of both together
    history: dict[str, Any]  # step, tokens seen, growth; for people

    @property
    def counts(self) -> dict[str, int]:
        """How many tokens it adds to each projection."""
        return {name: part["keys"].shape[1] for name, part in self.tokens.items()}


def export_adapter(workdir: pathlib.Path, path: pathlib.Path, step_number: int | None = None) -> tuple[int, int]:
    """Writes the tokens that a run of `grow --train=new` has trained.

    Returns:
      The step, and the number of parameters in the file.

    Raises:
      UserError: all of the run's model has learnt, or the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"--to_adapter={path}: must end in .safetensors")
    run = load_trained(workdir, step_number)
    growth = run.record.growth[-1] if run.record.growth else {}
    if growth.get("train") != "new":
        raise UserError(f"{workdir}: has no tokens that learnt alone; grow --train=new makes a run that has")
    tokens: Any = {
        name: {kind: x[:, first:] for kind, x in run.state.params["blocks"][name].items()}
        for name, first in growth["from"].items()
        if growth["to"][name] > first
    }
    if jax.process_count() > 1:
        tokens = multihost_utils.process_allgather(tokens, tiled=True)
    tokens = jax.tree.map(np.asarray, tokens)
    history = {"step": run.step_number, "tokens": run.record.tokens, "data": run.record.data, "growth": growth}
    tau = run.state.tau_values()
    if jax.process_index() == 0:
        _write(path, Adapter(str(path), tokens, growth["base"], growth["base_tau"], tau, history))
    return run.step_number, count_params(tokens)


def in_evaluate(path: pathlib.Path, workdir: pathlib.Path) -> str:
    """A line on how a file is used."""
    return f" that learnt alone\nevaluate and generate put them on the run that it grew from: --adapter={path}"


def _write(path: pathlib.Path, adapter: Adapter) -> None:
    arrays = {f"{name}.{kind}": x for name, part in adapter.tokens.items() for kind, x in part.items()}
    said = {name: getattr(adapter, name) for name in ("base", "base_tau", "tau", "history")}
    about = sealed({"format": FORMAT, **said, "sha256": _digest(arrays)})
    partial = path.with_name(f".{path.name}.partial")
    try:
        make_folder(path.parent)
        partial.write_bytes(save(arrays, {"adapter": about}))
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def read_adapter(path: pathlib.Path) -> Adapter:
    """Reads a file of `export_adapter`. Raises a UserError where it is none, or is damaged."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; convert --to_adapter={path} makes one")
    try:
        with safe_open(path, "numpy") as file:
            about = (file.metadata() or {}).get("adapter")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        raise UserError(f"{path}: cannot be read: damaged, or no .safetensors") from None
    if about is None:
        raise UserError(f"{path}: holds tensors, but no adapter of tokenformer_jax; convert --to_adapter makes one")
    try:
        said = unsealed(about)
        if said.pop("sha256") != _digest(arrays):
            raise ValueError
    except (ValueError, KeyError):
        raise UserError(f"{path}: damaged: its checksum differs; make it anew by convert --to_adapter") from None
    if said.pop("format") != FORMAT:
        raise UserError(f"{path}: is of another version; make it anew by convert --to_adapter")
    tokens: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        projection, _, kind = name.partition(".")
        tokens.setdefault(projection, {})[kind] = array
    return Adapter(str(path), tokens, **said)


def check_base(adapters: Sequence[Adapter], fingerprint: str, source: str) -> None:
    """Raises a UserError for an adapter of another model."""
    for adapter in adapters:
        if adapter.base != fingerprint:
            raise UserError(
                f"{adapter.source}: was trained on the model {adapter.base}, but {source} is {fingerprint}; use the "
                f"run that it grew from, at step {adapter.history['growth']['step']}"
            )


def adapted_config(cfg: ModelConfig, adapters: Sequence[Adapter], multiple: int = 1) -> ModelConfig:
    """The config of a model with adapters, whose token counts are rounded up; it has no smaller sizes."""
    cfg = cfg.padding_counted()

    def size(name: str, count: int) -> int:
        total = count + sum(a.counts.get(name, 0) for a in adapters)
        return -(-total // multiple) * multiple

    return dataclasses.replace(
        cfg,
        qkv_tokens=size("query", cfg.qkv_tokens),
        out_tokens=size("out", cfg.out_tokens),
        ffn_tokens=size("ffn", cfg.ffn_tokens),
        nested=() if adapters else cfg.nested,
    )


def append(params: Params, adapters: Sequence[Params], counts: Mapping[str, int]) -> Params:
    """Parameters with the tokens of adapters, filled up with zeros, which add nothing; a pure function."""
    blocks = dict(params["blocks"])
    for name, count in counts.items():
        parts = [tokens[name] for tokens in adapters if name in tokens]

        def joined(kind: str, name: str = name, count: int = count, parts: Any = parts) -> jax.Array:
            arrays = [constrain(x, None, None, "columns") for x in (blocks[name][kind], *(p[kind] for p in parts))]
            left = count - sum(x.shape[1] for x in arrays)
            return jnp.pad(jnp.concatenate(arrays, axis=1), ((0, 0), (0, left), (0, 0)))

        blocks[name] = {kind: joined(kind) for kind in ("keys", "values")}
    return params | {"blocks": blocks}


def adapted_tau(tau: Mapping[str, float], adapters: Sequence[Adapter]) -> dict[str, float]:
    """τ with adapters: of one what it was trained with; of several τ² grows by what each of them adds to it."""
    if len(adapters) == 1:
        return dict(adapters[0].tau)
    more = {name: sum(a.tau[name] ** 2 - a.base_tau[name] ** 2 for a in adapters) for name in tau}
    return {name: math.sqrt(value**2 + more[name]) if more[name] else value for name, value in tau.items()}


def load_part(
    workdir: pathlib.Path,
    step_number: int | None = None,
    mesh: tuple[int, ...] | None = None,
    paths: Sequence[pathlib.Path] = (),
    part: float | None = None,
) -> Trained:
    """`load_trained`, with adapters put on, or of a nested model the size that has this part of the tokens.

    Raises a UserError where an adapter is not of this model, or the model has no such size.
    """
    adapters = [read_adapter(path) for path in paths]
    if adapters and part is not None:
        raise UserError(f"--tokens={part:g}: goes without --adapter, whose tokens belong to the whole model")
    run = load_trained(workdir, step_number, mesh)
    if adapters:
        check_base(adapters, run.fingerprint, f"step {run.step_number} of {workdir}")
        model = adapted_config(run.cfg.model, adapters, run.cfg.mesh.tensor)
        tokens = jax.device_put([adapter.tokens for adapter in adapters], replicated(run.step.mesh))
        now = run.state.tau_values()
        join = functools.partial(append, counts=model.tokens)
        run = changed(run, model, adapted_tau(now, adapters), join, tokens)
        return dataclasses.replace(run, adapters=tuple(PutOn(adapter.source, adapter.counts) for adapter in adapters))
    if part is None or part == 1.0 in run.cfg.model.nested:
        return run
    model = nested.at(run.cfg.model, part)
    nested.check_mesh(run.cfg.model, run.cfg.mesh.tensor)
    return changed(run, model, initial_tau(model), lambda params, _: nested.cut(params, model), ())


def changed(
    run: Trained, model: ModelConfig, tau: Mapping[str, float], change: Callable[[Params, Any], Params], arrays: Any
) -> Trained:
    """A run whose parameters are `change(params, arrays)`, with a τ of its own."""
    cfg = dataclasses.replace(run.cfg, model=model)
    validate(cfg)
    step = make_step(cfg, run.step.mesh, run.record.schedule_start)
    with jax.set_mesh(step.mesh):
        shardings = jax.tree.map(lambda a: a.sharding, step.abstract_state.params)
        params = jax.jit(change, out_shardings=shardings)(run.state.params, arrays)
    ramps = {name: TauRamp.constant(value) for name, value in tau.items()}
    state = run.state._replace(params=params, tau=jax.device_put(ramps, replicated(step.mesh)))
    return dataclasses.replace(run, cfg=cfg, step=step, state=state, num_params=count_params(params))
