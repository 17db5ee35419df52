"""Published models: repositories of the Hugging Face hub, and folders as those, read into arrays and their facts."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tokenformer_jax.config import FREE_MODEL_KEYS, SIZES, Config, ModelConfig
from tokenformer_jax.configs import pile, released
from tokenformer_jax.errors import UserError
from tokenformer_jax.files import local_path, parse_json
from tokenformer_jax.storage.official import PROJECTIONS, config_of, import_official, model_config
from tokenformer_jax.storage.state_dicts import read_state_dict
from tokenformer_jax.storage.workdir import require_empty

MODEL_TYPE = "tokenformer"  # of a config.json of ours
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there; INDEX where it is in parts
INDEX = ".index.json"
UNSAID = ("num_heads", "context_length", "rotary_fraction")  # what a model needs, and no tensor's shape says
# Keys of ours that the authors' own and the hub's configs name otherwise.
OTHER_NAMES = {
    "num_heads": ("num_attention_heads",),
    "context_length": ("max_position_embeddings", "seq_length"),
    "rotary_fraction": ("rotary_pct",),
    "normalizer": ("norm_activation_type",),
}


class Published(NamedTuple):
    """Weights under the authors' names, and what is said of them beside."""

    source: str  # for messages
    arrays: Mapping[str, np.ndarray]
    known: Mapping[str, Any]  # keys of ModelConfig that follow from no tensor
    by: str = ""  # what says them
    said: Mapping[str, Any] | None = None  # the same, where the config must not differ
    tau: Mapping[str, float] | None = None  # else √N
    tokenizer: str = ""  # its file

    def config(self, said: Mapping[str, Any]) -> Config:
        """A config for it: `said` for what follows from no tensor, the rest from the base.

        Raises:
          UserError: it does not fit the tensors, or leaves something unsaid.
        """
        for key in UNSAID:
            if key not in said:
                raise UserError(f"{key} is missing: {self.source} does not say it")
        return config_of(self.arrays, said, self.source)


def import_published(found: Published, cfg: Config, workdir: pathlib.Path, tokenizer: str | None) -> str:
    """Makes a workdir of it, with the tokenizer of this file, else with the config's, else with its own.

    Returns:
      What was done, in words.

    Raises:
      UserError: tensors, config and tokenizer do not fit, or the workdir is taken.
    """
    file = tokenizer or cfg.data.tokenizer or found.tokenizer
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=file))
    count = import_official(found.arrays, cfg, workdir, found.source, found.said, found.tau)
    model = ", ".join(f"{key} = {getattr(cfg.model, key)}" for key in UNSAID)
    if found.by and all(getattr(cfg.model, key) == value for key, value in found.known.items()):
        model += f" as {found.by} says"
    done = f"{workdir}: {count:,} parameters of {found.source} at step 0, {model}; train, grow, evaluate and generate "
    warning = "warning: no --tokenizer was given and a new one was trained: its ids are not those of the model"
    return f"{done}take it" + ("" if file else f"\n{warning}")


def read_for(workdir: pathlib.Path, way: str, name: str) -> Published:
    """What `--from_torch` (a file of the authors' weights alone) or `--from_hub` names, to make this workdir of.

    Raises:
      UserError: it cannot be read, or the workdir is taken.
    """
    require_empty(workdir, "holds something already")  # before anything is downloaded
    if way == "from_hub":
        return read_published(name)
    path = local_path(name, f"--{way}")
    return Published(str(path), read_state_dict(path), {"rotary_fraction": 0.25})


def read_published(name: str) -> Published:
    """A folder, or a repository of the hub, OWNER/NAME or OWNER/NAME@REVISION, which is downloaded once.

    Raises:
      UserError: it cannot be had, or holds no TokenFormer.
    """
    return _read_folder(name, _folder_of(name))


def _folder_of(name: str) -> pathlib.Path:
    flag = f"--from_hub={name}"
    if "://" in name:
        raise UserError(f"{flag}: is a URL; use OWNER/NAME, as the hub has it, or a folder of this machine")
    path = local_path(name, "--from_hub")
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{flag}: is a file; use --from_torch for it, or the folder that holds it")
    if name.partition("@")[0].count("/") != 1 or name[0] in "./~" or name.endswith("/"):
        raise UserError(f"{flag}: no such folder; use a folder, or OWNER/NAME for a repository of the hub")
    return _download(name)


def _download(name: str) -> pathlib.Path:
    """The files of a repository that are needed, in the hub's cache: what is there already is not loaded again."""
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError:
        raise UserError(
            f"--from_hub={name}: needs huggingface_hub, which is not installed; use `pip install huggingface_hub`, or "
            "a folder of this machine"
        ) from None
    repository, _, revision = name.partition("@")
    where = constants.ENDPOINT
    try:
        for weights in WEIGHTS:
            parts = weights.replace(".", "*.")
            wanted = ["config.json", "tokenizer.json", parts, f"{weights}{INDEX}"]
            folder = pathlib.Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
            if any(folder.glob(parts)):
                break
        return folder
    except errors.GatedRepoError:
        reason = "is gated: ask for access on its page, then use `hf auth login` or HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = f"no such folder here, and no such repository on {where}, or a private one: then use HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"the repository has no revision {revision or 'main'!r}"
    except errors.HFValidationError:
        reason = "is no name of a repository; use OWNER/NAME, or a folder"
    except errors.LocalEntryNotFoundError as error:
        answer = getattr(error.__cause__, "response", None)
        state = f"{where} answers {answer.status_code}" if answer is not None else f"{where} cannot be reached"
        state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else state
        reason = f"{state}, and the cache {constants.HF_HUB_CACHE} does not hold all of it; use it once with a network"
    except Exception as error:  # of the network and of the disk, in many kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"the download ended early ({first}); the same command goes on with it"
    raise UserError(f"--from_hub={name}: {reason}")


def _read_folder(name: str, folder: pathlib.Path) -> Published:
    facts = _read_json(name, folder / "config.json") if (folder / "config.json").exists() else {}
    is_ours = facts.get("model_type") == MODEL_TYPE
    tau = _tau(name, facts.get("tau")) if is_ours else None
    arrays = _read_weights(name, folder)
    tokenizer = str(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else ""
    if is_ours:
        keys = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in FREE_MODEL_KEYS]
        said = {key: facts[key] for key in keys if key in facts}
        said = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
        return Published(name, arrays, said, "its config.json", said, tau, tokenizer)
    known, by = _preset(name, arrays)
    if not known:
        by = "its config.json"
        named = {key: [key, *others] for key, others in OTHER_NAMES.items()}
        known = {ours: facts[key] for ours, keys in named.items() for key in reversed(keys) if key in facts}
    return Published(name, arrays, {"rotary_fraction": 0.25} | known, by, tokenizer=tokenizer)


def _preset(name: str, arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], str]:
    """What the preset of a published model with tensors of these shapes says beside them, and its name."""
    found = model_config(arrays, num_heads=1, context_length=1, source=name)
    for preset in (pile, released):
        for variant in preset.VARIANTS:
            model = preset.get_config(variant).model
            if all(model[key] == getattr(found, key) for key in ("vocab_size", "num_layers", "embed_dim", *SIZES)):
                return {
                    key: model[key] for key in (*UNSAID, "normalizer")
                }, f"the preset {preset.__name__.split('.')[-1]}:{variant}"
    return {}, ""


def _tau(name: str, tau: Any) -> dict[str, float] | None:
    if tau is None:
        return None
    numbers = isinstance(tau, dict) and all(type(value) in (int, float) for value in tau.values())
    if not numbers or sorted(tau) != sorted(PROJECTIONS) or not all(0 < value < math.inf for value in tau.values()):
        raise UserError(f"{name}: config.json: tau = {tau!r}: must be a number for each of {', '.join(PROJECTIONS)}")
    return {key: float(value) for key, value in tau.items()}


def _read_weights(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    for weights in WEIGHTS:
        if (folder / weights).exists():
            return read_state_dict(folder / weights)
        if (folder / f"{weights}{INDEX}").exists():
            return _read_parts(name, folder, f"{weights}{INDEX}")
    names = ", ".join(f"{weights}, {weights}{INDEX}" for weights in WEIGHTS)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise UserError(f"{name}: holds no weights ({names}), but {found}; use the folder or repository of a model")


def _read_parts(name: str, folder: pathlib.Path, index: str) -> dict[str, np.ndarray]:
    """Weights in several files, by the index that says which tensor is where."""
    files = _read_json(name, folder / index).get("weight_map")
    ending = index.removesuffix(INDEX).partition(".")[2]
    if not isinstance(files, dict) or not files or not all(_is_plain(file, ending) for file in files.values()):
        raise UserError(f"{name}: {index}: has no weight_map from tensors to .{ending} files beside it")
    parts = sorted(set(files.values()))
    missing = [part for part in parts if not (folder / part).exists()]
    if missing:
        raise UserError(f"{name}: lacks {missing[0]}, {len(missing)} of the {len(parts)} files that {index} names")
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        arrays |= read_state_dict(folder / part)
        for tensor in (tensor for tensor, file in files.items() if file == part and tensor not in arrays):
            raise UserError(f"{name}: {part} lacks {tensor}, which {index} says is there")
    return arrays


def _is_plain(file: Any, ending: str) -> bool:
    """Whether it is the name of such a file, and no path that leads elsewhere."""
    return isinstance(file, str) and file == pathlib.PurePath(file).name and file.endswith(f".{ending}")


def _read_json(name: str, path: pathlib.Path) -> dict[str, Any]:
    try:
        tree = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {path.name}: not readable JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name}: {path.name}: holds {type(tree).__name__}, not keys and values")
    return tree
