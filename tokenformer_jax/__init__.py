"""TokenFormer (arXiv 2410.23168) in JAX: train, grow without loss, train on, evaluate, generate.

>>> from tokenformer_jax import TokenFormer
>>> model = TokenFormer.load("runs/quickstart/grown")
>>> model.logits(tokens_BL)
"""

import importlib
from typing import Any

_FACE = {
    "TokenFormer": "api",
    "Pattention": "nn.pattention",
    "pattention": "nn.pattention",
    "Sampling": "evaluation.sampling",
    "Config": "config",
    "ModelConfig": "config",
    "UserError": "errors",
    "read_config": "config",
}
__all__ = list(_FACE)


def __getattr__(name: str) -> Any:  # imported when asked for, so that each command loads only what it needs
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FACE[name]}"), name)
