"""Training steps of the PyTorch model, `tokenformer_jax.pytorch`, to measure against."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenformer_jax import pytorch
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.storage.official import to_official


class TokenFormer(pytorch.TokenFormer):
    """The model of a config, with its loss."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(
            cfg.vocab_size,
            cfg.embed_dim,
            cfg.num_layers,
            cfg.num_heads,
            cfg.tokens["query"],
            cfg.tokens["out"],
            cfg.tokens["ffn"],
            cfg.rotary_fraction,
            cfg.normalizer,
        )

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def load_params(self, params: Any) -> None:
        """Takes the parameters of our tree."""
        self.load_state_dict({name: torch.tensor(array) for name, array in to_official(params).items()})


def optimizer(model: TokenFormer, rate: float) -> torch.optim.Optimizer:
    """As our configs have it: no decay on the final norm."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def train_step(
    model: TokenFormer,
    adamw: torch.optim.Optimizer,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """The loss, which a device may still be computing; `loss_of` is model.loss or what torch.compile made of it."""
    loss = (loss_of or model.loss)(tokens, targets)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    return loss.detach()
