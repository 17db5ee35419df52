"""LoRA (arXiv 2106.09685) on every weight matrix of a plain Transformer's blocks, to measure against.

x W + x A B, with W frozen, A from N(0, 1 / its rows), and B zero at first. Arrays are stacked over layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.nn.layers import Linear, Params


class Adapted(nnx.Module):
    """A frozen projection, and what is added to it."""

    def __init__(self, base: Linear, a: jax.Array, b: jax.Array):
        self.base, self.a, self.b = base, nnx.Param(a), nnx.Param(b)

    def __call__(self, x_BLD: jax.Array, tau: None = None, key: Any = None) -> jax.Array:
        a, b = (part[...].astype(x_BLD.dtype) for part in (self.a, self.b))
        return self.base(x_BLD) + (x_BLD @ a) @ b


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """The weight matrices of a block."""
    dim, hidden = cfg.embed_dim, cfg.ffn_tokens
    return dict.fromkeys(("query", "key", "value", "out"), (dim, dim)) | {"up": (dim, hidden), "down": (hidden, dim)}


def rank(cfg: ModelConfig, params: int) -> int:
    """With which LoRA has about as many parameters."""
    return max(1, round(params / cfg.num_layers / sum(map(sum, shapes(cfg).values()))))


def init_lora(cfg: ModelConfig, rank: int, key: jax.Array) -> Params:
    keys = jax.random.split(key, 6)
    return {
        name: {
            "a": jax.random.normal(key, (cfg.num_layers, rows, rank)) / rows**0.5,
            "b": jnp.zeros((cfg.num_layers, rank, columns)),
        }
        for key, (name, (rows, columns)) in zip(keys, shapes(cfg).items(), strict=True)
    }


def adapt(model: Any, lora: Params) -> Any:
    """The plain Transformer with LoRA in its blocks."""
    for name, arrays in lora.items():
        owner = model.blocks.ffn if name in ("up", "down") else model.blocks
        setattr(owner, name, Adapted(getattr(owner, name), **arrays))
    return model
