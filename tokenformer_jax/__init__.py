"""TokenFormer (arXiv 2410.23168) in JAX: train, grow without loss, train on, evaluate, generate.

>>> from tokenformer_jax import TokenFormer
>>> model = TokenFormer.load("runs/quickstart/grown")
>>> model.logits(tokens_BL)

Names of arrays end in their axes:

    B batch      D embedding, and a projection's input    N parameter tokens    R rank
    L length     E a projection's output                  V vocabulary          C positions of a chunk
    H heads      K head dim                               S cache length        P parts, or positions in a row
    Y layers     W width of what rotary turns at once     G groups              M of a group
    X texts      1 an axis of size 1
    H, W, C of images: height, width and channels; V: classes; P of patches: their numbers
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenformer_jax.api import TokenFormer
    from tokenformer_jax.classifier import TokenFormerClassifier
    from tokenformer_jax.config import Config, ModelConfig, read_config
    from tokenformer_jax.errors import UserError
    from tokenformer_jax.evaluation.sampling import Sampling
    from tokenformer_jax.nn.pattention import Pattention, pattention

__version__ = "0.1.0"
__all__ = [
    "Config",
    "ModelConfig",
    "Pattention",
    "Sampling",
    "TokenFormer",
    "TokenFormerClassifier",
    "UserError",
    "pattention",
    "read_config",
]
_HOMES = {
    "TokenFormer": "api",
    "TokenFormerClassifier": "classifier",
    "Config": "config",
    "ModelConfig": "config",
    "read_config": "config",
    "UserError": "errors",
    "Sampling": "evaluation.sampling",
    "Pattention": "nn.pattention",
    "pattention": "nn.pattention",
}

if [os.path.basename(name) for name in sys.argv[:1]] in (["-m"], ["tokenformer"]):  # Python begins to run a command
    importlib.import_module(f"{__name__}.environment")


def __getattr__(name: str) -> Any:  # imported when asked for, so that each command loads only what it needs
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
