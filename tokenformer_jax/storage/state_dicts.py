"""Files of PyTorch state dicts. Tensors are read, stored code is never run."""

import contextlib
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tokenformer_jax.errors import UserError

StateDict = Mapping[str, np.ndarray]

TORCH_ENDINGS = (".bin", ".pt", ".pth")
ENDINGS = (*TORCH_ENDINGS, ".safetensors", ".npz")
WRAPPERS = ("module", "model", "state_dict")  # keys under which training frameworks keep the state dict


def check_file_name(path: pathlib.Path) -> None:
    """Raises a UserError where the ending is unknown, or needs torch and torch is not installed."""
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.suffix in TORCH_ENDINGS:
        try:
            import torch  # noqa: F401
        except ImportError:
            raise UserError(
                f"{path}: {path.suffix} needs torch, which is not installed; use .safetensors or .npz"
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
        if path.suffix == ".npz" and "Object arrays" in str(error):
            reason = "it holds Python objects, whose code is never run"
        if path.suffix in TORCH_ENDINGS:
            reason += ", or with objects beside its tensors, whose code is never run"
        raise UserError(f"{path}: cannot be read ({reason}); use a state dict of tensors only") from None
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
        partial.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only its owner read it
        os.replace(partial, path)
    except Exception as error:  # safetensors and torch wrap OSError in kinds of their own
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
