"""Official PyTorch weights in and out: the authors' `pytorch_model.bin` <-> a workdir of ours.

python -m tokenformer_jax.convert --from_torch=FILE --workdir=W --config=configs/pile.py:150m
python -m tokenformer_jax.convert --from_torch=FILE --workdir=W --num_heads=12 --context_length=2048 [--tokenizer=T]
python -m tokenformer_jax.convert --to_torch=FILE --workdir=W [--step=N]

FILE ends in .bin, .pt or .pth (which need torch), .safetensors or .npz. Tensors are read, stored code is never run.
"""

import contextlib
import dataclasses
import functools
import operator
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from safetensors.numpy import load_file, save_file

from tokenformer_jax.checkpoint import Record, write_workdir
from tokenformer_jax.config import (
    Config,
    ModelConfig,
    UserError,
    config_flag,
    load_config,
    read_config,
    require_empty,
    run_command,
    workdir_flag,
)
from tokenformer_jax.corpus import prepare
from tokenformer_jax.data import data_identity, train_batches
from tokenformer_jax.evaluate import load_trained
from tokenformer_jax.sharding import make_mesh, this_process
from tokenformer_jax.step import make_step
from tokenformer_jax.tokenizer import load_tokenizer
from tokenformer_jax.transformer import Params, abstract_model, count_params, initial_tau

StateDict = Mapping[str, np.ndarray]

TORCH_ENDINGS = (".bin", ".pt", ".pth")
ENDINGS = (*TORCH_ENDINGS, ".safetensors", ".npz")
FLOATS = tuple(map(np.dtype, (np.float32, np.float16, jnp.bfloat16)))
WRAPPERS = ("module", "model", "state_dict")  # keys under which training frameworks keep the state dict
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
    "qkv_tokens",
    "out_tokens",
    "ffn_tokens",
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
            raise UserError(f"{source}: {name} is {found.dtype}; float32, float16 or bfloat16 would do")
        target[...] = found
    return params


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


# Files.


def check_file_name(path: pathlib.Path) -> None:
    """Raises a UserError where the ending is unknown, or needs torch and torch is not installed."""
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.suffix in TORCH_ENDINGS:
        try:
            import torch  # noqa: F401
        except ImportError:
            raise UserError(
                f"{path}: {path.suffix} needs torch, which is not installed; .safetensors or .npz would do without"
            ) from None


def read_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads tensors by name; a file with anything but tensors, dicts and plain values is refused, not run.

    Raises:
      UserError: names the file, and what is wrong with it.
    """
    check_file_name(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        found = _read(path)
    except Exception as error:  # torch alone raises some eight kinds
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or not of this format"
        if path.suffix in TORCH_ENDINGS:
            reason += ", or with objects beside its tensors, whose code is never run"
        raise UserError(f"{path}: cannot be read ({reason}); a state dict of tensors only would do") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: holds {'nothing' if found == {} else type(found).__name__}, not a state dict")
    for name, array in found.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise UserError(f"{path}: not a state dict: {name!r} is a {type(array).__name__}, not a dense tensor")
    return found


def _read(path: pathlib.Path) -> Any:
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return dict(arrays)
    if path.suffix == ".safetensors":
        return load_file(path)
    import torch

    def to_numpy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return value
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # torch has no bfloat16 for numpy

    # Files from before torch 1.6 are no zip and cannot be mapped.
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    for key in WRAPPERS * 2:  # one may hold the other
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    return {name: to_numpy(value) for name, value in found.items()} if isinstance(found, dict) else found


def write_state_dict(path: pathlib.Path, arrays: StateDict) -> None:
    """Writes the file whole or not at all. Raises UserError where it cannot be written."""
    check_file_name(path)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            np.savez(partial, **arrays)  # type: ignore[arg-type]
        elif path.suffix == ".safetensors":
            save_file(dict(arrays), partial, metadata={"format": "pt"})
        else:
            import torch

            torch.save({name: torch.tensor(array) for name, array in arrays.items()}, partial)
        os.replace(partial, path)
    except Exception as error:  # safetensors and torch wrap OSError in kinds of their own
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


# The command.


def import_official(state_dict: StateDict, cfg: Config, workdir: pathlib.Path, source: str = "state dict") -> int:
    """Makes a workdir at step 0 that train, grow, evaluate and generate take; whole or not at all.

    The optimizer and the data start anew, τ is √N, and the tokenizer is the config's.

    Returns:
      The number of parameters.

    Raises:
      UserError: where the state dict, the config and the tokenizer do not fit, or the workdir is taken.
    """
    model = cfg.model
    found = model_config(
        state_dict, model.num_heads, model.rotary_fraction, context_length=model.context_length, source=source
    )
    differing = [key for key in FIXED if getattr(found, key) != getattr(model, key)]
    if not differing and found.tokens != model.tokens:
        differing = ["pad_tokens_to"]
    if differing:
        pairs = (f"model.{key} = {getattr(model, key)!r} for the file's {getattr(found, key)!r}" for key in differing)
        raise UserError(f"{source}: does not fit the config, which has {', '.join(pairs)}")
    require_empty(workdir, "holds something already")
    if cfg.data.tokenizer and (ids := load_tokenizer(cfg.data.tokenizer).vocab_size) > model.vocab_size:
        raise UserError(
            f"data.tokenizer = {cfg.data.tokenizer!r}: has {ids} ids, but {source} embeds {model.vocab_size}; "
            "the tokenizer.json that the model was trained with would do"
        )
    params = from_official(state_dict, source)
    step = make_step(cfg, make_mesh(cfg.mesh))
    corpus = prepare(cfg)
    data = train_batches(corpus.train, cfg, **this_process(step.mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state.params)
    state = step.init(jax.random.key(cfg.seed))._replace(params=jax.device_put(params, shardings))
    record = Record(dataclasses.asdict(cfg.model), data_identity(corpus.train, cfg), cfg.batch_size)
    write_workdir(workdir, 0, (state, data, corpus.tokenizer, record), lambda: {"config.json": cfg.to_json()})
    return count_params(params)


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
    if jax.process_index() == 0:
        write_state_dict(path, to_official(run.state.params))
    return run.step_number, run.num_params


def check_tau(tau: Mapping[str, Any], model: ModelConfig, source: str) -> None:
    """Raises a UserError where a τ is not √N: the official format has no place for it."""
    for name, final in initial_tau(dataclasses.replace(model.padding_counted(), tau_tokens=0)).items():
        if np.float32(tau[name]) != np.float32(final):
            raise UserError(
                f"{source}: tau of {name} is {tau[name]:.6g}, but the official format takes it to be "
                f"sqrt({model.tokens[name]}) = {final:.6g}; the model at the end of its ramp (grow.tau_ramp) would do"
            )


def command_config(state_dict: StateDict, source: str) -> Config:
    """The config of an import: --config, or the flags that say what the arrays do not."""
    unsaid = {name: flags.FLAGS[name] for name in ("num_heads", "context_length", "rotary_fraction")}
    if flags.FLAGS["config"].present:
        for name, flag in unsaid.items():
            if flag.present:
                raise UserError(f"--{name}={flag.value}: --config says it already; --config.model.{name} overrides it")
        cfg = _CONFIG()
    else:
        for name, flag in unsaid.items():
            if flag.value is None:
                raise UserError(f"--{name} is missing: {source} does not say it; --config=FILE:variant would do too")
        said: dict[str, Any] = {name: flag.value for name, flag in unsaid.items()}
        from configs import base  # so common a name that only the command may rely on it

        model = model_config(state_dict, **said, source=source)
        cfg = read_config(base.get_config().to_dict() | {"model": dataclasses.asdict(model)})
    tokenizer = _TOKENIZER.value or cfg.data.tokenizer
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=tokenizer))


def main() -> None:
    if bool(_FROM.value) == bool(_TO.value):
        raise UserError("--from_torch or --to_torch: give one of them, the file to read or the file to write")
    path, workdir = pathlib.Path(_FROM.value or _TO.value or "").expanduser(), _WORKDIR()
    if _TO.value:
        step_number, count = export_official(workdir, path, _STEP.value)
        if jax.process_index() == 0:
            print(f"{path}: step {step_number} of {workdir}, {count:,} parameters under the official names")
        return
    if _STEP.value is not None:
        raise UserError(f"--step={_STEP.value}: an imported model starts at step 0; leave it out")
    state_dict = read_state_dict(path)
    cfg = command_config(state_dict, str(path))
    count = import_official(state_dict, cfg, workdir, str(path))
    if jax.process_index() == 0:
        print(f"{workdir}: {count:,} parameters of {path} at step 0; train, grow, evaluate and generate take it")
        if not cfg.data.tokenizer:
            print("warning: no --tokenizer was given and a new one was trained: its ids are not those of the model")


if __name__ == "__main__":
    _CONFIG = config_flag()
    _WORKDIR = workdir_flag()
    _FROM = flags.DEFINE_string("from_torch", None, "the official state dict to read")
    _TO = flags.DEFINE_string("to_torch", None, "the official state dict to write")
    _STEP = flags.DEFINE_integer("step", None, "which checkpoint to write; by default the newest")
    _TOKENIZER = flags.DEFINE_string("tokenizer", None, "the model's tokenizer.json; overrides config.data.tokenizer")
    flags.DEFINE_integer("num_heads", None, "attention heads, where no --config says it")
    flags.DEFINE_integer("context_length", None, "tokens of context, where no --config says it")
    flags.DEFINE_float("rotary_fraction", 0.25, "part of each head's dims that rotary turns, likewise")
    run_command(main)
