"""Official PyTorch weights in and out: the authors' `pytorch_model.bin` <-> a workdir of ours."""

import dataclasses
import functools
import operator
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tokenformer_jax.config import SIZES, Config, ModelConfig, read_config
from tokenformer_jax.configs import base
from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokenformer_jax.devices.sharding import make_mesh, replicated
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import replace_file
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.nn.layers import Params, count_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.checkpoints import save_one
from tokenformer_jax.storage.record import Record
from tokenformer_jax.storage.state_dicts import StateDict, check_file_name, write_state_dict
from tokenformer_jax.storage.trained import Trained, load_trained
from tokenformer_jax.storage.workdir import load_config, new_workdir, require_empty
from tokenformer_jax.training.state import TauRamp
from tokenformer_jax.training.step import make_step
from tokenformer_jax.training.tasks import task_of

FLOATS = tuple(map(np.dtype, (np.float32, np.float16, jnp.bfloat16)))
PROJECTIONS = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "out": "attention.proj",
    "ffn": "mlp",
}
# What GPT-NeoX saves beside the parameters: tables and masks that follow from the sizes.
BUFFERS = re.compile(r"sequential\.\d+\.attention\.(rotary_emb\.inv_freq|bias|masked_bias)")
FIXED = (
    "projection",
    "gelu",
    "tau_tokens",
    "vocab_size",
    "num_layers",
    "embed_dim",
    *SIZES,
)


class Slot(NamedTuple):
    """Where an official tensor lives in our parameters."""

    path: tuple[str, ...]
    layer: int | None = None  # its place on the leading axis, over which ours are stacked

    def of(self, params: Params) -> Any:
        leaf: Any = functools.reduce(operator.getitem, self.path, params)
        return leaf if self.layer is None else leaf[self.layer]


def name_table(num_layers: int) -> dict[str, Slot]:
    """Official name -> our place, for all 10 * num_layers + 3 tensors; both directions read it."""
    table = {"sequential.0.word_embeddings.weight": Slot(("embed",))}
    for layer in range(num_layers):
        for ours, theirs in PROJECTIONS.items():
            for kind in ("key", "value"):
                name = f"sequential.{layer + 2}.{theirs}.{kind}_param_tokens"
                table[name] = Slot(("blocks", ours, f"{kind}s"), layer)
    norm = f"sequential.{num_layers + 3}.norm"
    return table | {f"{norm}.weight": Slot(("norm_scale",)), f"{norm}.bias": Slot(("norm_bias",))}


def to_official(params: Params) -> dict[str, np.ndarray]:
    """Our parameters -> the official state dict, float32, bit for bit."""
    params = jax.device_get(params)
    return {name: slot.of(params) for name, slot in name_table(len(params["blocks"]["query"]["keys"])).items()}


def from_official(state_dict: StateDict, source: str = "state dict") -> Params:
    """The official state dict (float32, float16 or bfloat16) -> our parameters, as float32 arrays of the host.

    Raises:
      UserError: names, after `source`, the tensors that are missing, unknown, or of another shape or dtype.
    """
    cfg = model_config(state_dict, num_heads=1, context_length=1, source=source)
    state_dict = _official_names(state_dict, source)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract_model(cfg)[1])
    for name, slot in name_table(cfg.num_layers).items():
        found, target = state_dict[name], slot.of(params)  # a view
        if found.shape != target.shape:
            raise UserError(
                f"{source}: {name} has shape {list(found.shape)}, the other tensors ask for {list(target.shape)}"
            )
        if found.dtype not in FLOATS:
            raise UserError(f"{source}: {name} is {found.dtype}; use float32, float16 or bfloat16")
        target[...] = found
    require_finite(to_official(params), source)
    return params


def require_finite(arrays: StateDict, source: str) -> None:
    """Raises a UserError that names, after `source`, the tensors with NaN or infinities."""
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise UserError(f"{source}: the model is broken: NaN or infinities in {_few(broken)}")


def model_config(
    state_dict: StateDict,
    num_heads: int,
    rotary_fraction: float = 0.25,
    *,
    context_length: int,
    source: str = "state dict",
) -> ModelConfig:
    """The config of an official state dict: sizes from its tensors, and what they do not say from the caller.

    Raises:
      UserError: names, after `source`, the tensors that are missing or unknown.
    """
    state_dict = _official_names(state_dict, source)
    layers = {name.split(".")[1] for name in state_dict if re.match(r"sequential\.\d+\.(attention|mlp)\.", name)}
    table = name_table(max(1, len(layers)))
    missing = [name for name in table if name not in state_dict]
    unknown = [name for name in state_dict if name not in table]
    if missing or unknown:
        faults = "; ".join(f"{verb} {_few(names)}" for verb, names in (("lacks", missing), ("adds", unknown)) if names)
        raise UserError(f"{source}: no official TokenFormer, by its names of {len(layers)} layers: it {faults}")

    def shape(name: str) -> tuple[int, int]:
        found = state_dict[f"sequential.{name}"].shape
        if len(found) != 2:
            raise UserError(f"{source}: sequential.{name} has shape {list(found)}; it must have two axes")
        return found

    vocab_size, embed_dim = shape("0.word_embeddings.weight")
    return ModelConfig(
        projection="pattention",
        normalizer="l2_norm_gelu",
        gelu="erf",
        tau_tokens=0,
        vocab_size=vocab_size,
        context_length=context_length,
        num_layers=len(layers),
        num_heads=num_heads,
        embed_dim=embed_dim,
        qkv_tokens=shape("2.attention.query.key_param_tokens")[0],
        out_tokens=shape("2.attention.proj.key_param_tokens")[0],
        ffn_tokens=shape("2.mlp.key_param_tokens")[0],
        rotary_fraction=rotary_fraction,
        dropout=0.0,
        stochastic_depth=0.0,
        dtype="float32",
        remat="none",
    )


def _official_names(state_dict: StateDict, source: str) -> StateDict:
    """Undoes DeepSpeed's pipeline names, and leaves the known buffers out."""
    named: dict[str, np.ndarray] = {}
    for name, array in state_dict.items():
        official = re.sub(r"^tied_modules\.embed\.", "sequential.0.", name)
        official = re.sub(r"^(?=\d+\.)", "sequential.", official)
        if official in named:
            raise UserError(f"{source}: {name} is there twice, under another name as well")
        if not BUFFERS.fullmatch(official):
            named[official] = array
    return named


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def config_of(state_dict: StateDict, said: Mapping[str, Any], source: str) -> Config:
    """A config for a state dict: sizes from its tensors, `said` for what they do not say, the rest from base."""
    model = model_config(state_dict, num_heads=1, context_length=1, source=source)
    return read_config(base.get_config().to_dict() | {"model": dataclasses.asdict(model) | dict(said)})


def import_official(
    state_dict: StateDict,
    cfg: Config,
    workdir: pathlib.Path,
    source: str = "state dict",
    said: Mapping[str, Any] | None = None,
    tau: Mapping[str, float] | None = None,
) -> int:
    """Makes a workdir at step 0 that train, grow, evaluate and generate take; whole or not at all.

    The optimizer and the data start anew, τ is the given one, else √N, and the tokenizer is the config's. `said` is
    what the source says of its model beside the tensors, keys of `ModelConfig`.

    Returns:
      The number of parameters.

    Raises:
      UserError: where the state dict, the config and the tokenizer do not fit, or the workdir is taken.
    """
    model = cfg.model
    if model.image_size:
        raise UserError(f"--config: task = {cfg.task!r}: {source} is a language model; use a preset such as pile:150m")
    found = model_config(
        state_dict, model.num_heads, model.rotary_fraction, context_length=model.context_length, source=source
    )
    theirs = {key: getattr(found, key) for key in FIXED} | dict(said or {})
    differing = [key for key, value in theirs.items() if getattr(model, key) != value]
    if differing:
        pairs = (f"model.{key} = {getattr(model, key)!r} for the file's {theirs[key]!r}" for key in differing)
        raise UserError(f"{source}: does not fit the config, which has {', '.join(pairs)}")
    for key in ("vocab_size", "num_layers", "embed_dim", *SIZES):
        ours, stored = getattr(model.padding_counted(), key), getattr(found, key)
        if ours != stored:
            padding = f" with model.pad_tokens_to = {model.pad_tokens_to}" if model.pad_tokens_to else ""
            raise UserError(
                f"{source}: model.{key} = {getattr(model, key)}{padding} asks for {ours}, its tensors have {stored}"
            )
    require_empty(workdir, "holds something already")
    if cfg.data.tokenizer:
        check_tokenizer(load_tokenizer(cfg.data.tokenizer), model, f"data.tokenizer = {cfg.data.tokenizer!r}", source)
    params = from_official(state_dict, source)
    make_workdir(params, tau or initial_tau(model), cfg, workdir)
    return count_params(params)


def check_tokenizer(tokenizer: Tokenizer, model: ModelConfig, name: str, source: str) -> None:
    """Raises a UserError, which begins with the name, where a tokenizer has ids that the model does not embed."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{name}: has {tokenizer.vocab_size} ids, but {source} embeds {model.vocab_size}; "
            "use the tokenizer.json that the model was trained with"
        )


def make_workdir(
    params: Params,
    tau: Mapping[str, float],
    cfg: Config,
    workdir: pathlib.Path,
    assets: Mapping[str, str] | None = None,
) -> None:
    """Makes a workdir at step 0 with these parameters and a constant τ; optimizer and data start anew.

    Without assets, such as a tokenizer, they are those that the data make.

    Raises:
      UserError: the data cannot be used, or the workdir is taken.
    """
    require_empty(workdir, "holds something already")
    step = make_step(cfg, make_mesh(cfg.mesh))
    task = task_of(cfg)
    prepared = task.prepare(cfg, assets)
    data = task.train_batches(prepared, cfg, step.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state.params)
    state = step.init(jax.random.key(cfg.seed))._replace(params=jax.device_put(params, shardings))
    if state.average:
        state = state._replace(average=state.params)
    ramps = jax.device_get({name: TauRamp.constant(value) for name, value in tau.items()})
    state = state._replace(tau=jax.device_put(ramps, replicated(step.mesh)))
    record = Record(dataclasses.asdict(cfg.model), task.identity(prepared, cfg), cfg.batch_size)
    with new_workdir(workdir) as folder:
        save_one(folder / "checkpoints", 0, state, data, prepared.assets, record)
        if jax.process_index() == 0:
            replace_file(folder / "config.json", cfg.to_json())


def export_official(workdir: pathlib.Path, path: pathlib.Path, step_number: int | None = None) -> tuple[int, int]:
    """Writes the newest (or given) checkpoint of a workdir under the official names, bit for bit.

    Returns:
      The step, and the number of parameters.

    Raises:
      UserError: where the format cannot hold the model, or the file cannot be written.
    """
    check_file_name(path)
    model = load_config(workdir / "config.json").model
    if model.projection == "linear":
        raise UserError(f"{workdir}: model.projection = 'linear': the official format holds no plain Transformer")
    if model.gelu != "erf":
        raise UserError(f"{workdir}: model.gelu = {model.gelu!r}: the official code would compute with erf")
    run = load_trained(workdir, step_number)
    check_tau(run.state.tau_now(), run.cfg.model, str(workdir))
    arrays = official_arrays(run, workdir)
    if jax.process_index() == 0:
        write_state_dict(path, arrays)
    return run.step_number, run.num_params


def official_arrays(run: Trained, workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """`to_official` of a run's model, on every process. Raises a UserError where it is not finite."""
    if run.cfg.model.image_size:
        raise UserError(f"{workdir}: holds an image classifier; the official format is of language models")
    params = run.state.params
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    arrays = to_official(params)
    require_finite(arrays, f"step {run.step_number} of {workdir}")
    return arrays


def in_pytorch(path: pathlib.Path, workdir: pathlib.Path) -> str:
    """A line on how PyTorch loads an exported file, with what the file does not say of its model; none for .npz."""
    model = load_config(workdir / "config.json").model
    options = f"num_heads={model.num_heads}, rotary_fraction={model.rotary_fraction}, normalizer={model.normalizer!r}"
    if path.suffix == ".npz":
        return ""
    return f"\nin PyTorch: tokenformer_jax.pytorch.TokenFormer.load({str(path)!r}, {options})"


def check_tau(tau: Mapping[str, Any], model: ModelConfig, source: str) -> None:
    """Raises a UserError where a τ is not √N: the official format has no place for it."""
    for name, final in initial_tau(dataclasses.replace(model.padding_counted(), tau_tokens=0)).items():
        if np.float32(tau[name]) != np.float32(final):
            raise UserError(
                f"{source}: tau of {name} is {tau[name]:.6g}, but the official format takes it to be "
                f"sqrt({model.tokens[name]}) = {final:.6g}; use the model at the end of its ramp (grow.tau_ramp)"
            )
