"""An independent TokenFormer in PyTorch, to measure against: plain modules, as one would write it from the paper."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tokenformer_jax.config import ModelConfig


class Pattention(nn.Module):
    """gelu(S / ‖S‖ · √N) V of the scores S = x Kᵀ; the paper's equation 5."""

    def __init__(self, tokens: int, dim: int, value_scale: float):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.values = nn.Parameter(torch.randn(tokens, dim) * value_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ self.keys.T
        scale = math.sqrt(self.keys.shape[0]) / scores.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return F.gelu(scores * scale) @ self.values


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads, self.rotary_dims = cfg.num_heads, int(cfg.rotary_fraction * cfg.head_dim)
        scale = 2 / cfg.num_layers / math.sqrt(cfg.embed_dim)
        projections = {name: Pattention(tokens, cfg.embed_dim, scale) for name, tokens in cfg.tokens.items()}
        self.projections = nn.ModuleDict(projections)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        h = F.layer_norm(x, (dim,))
        q, k, v = (
            self.projections[name](h).view(batch, length, self.heads, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projections["out"](mixed.transpose(1, 2).reshape(batch, length, dim))
        return x + self.projections["ffn"](F.layer_norm(x, (dim,)))

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turned, rest = x[..., : self.rotary_dims], x[..., self.rotary_dims :]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat((turned * cos + torch.cat((-second, first), -1) * sin, rest), -1)


class TokenFormer(nn.Module):
    """tokens [B, L] -> logits [B, L, V]; the embedding is tied."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size, cfg.embed_dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.LayerNorm(cfg.embed_dim)
        dims = int(cfg.rotary_fraction * cfg.head_dim)
        angles = torch.arange(cfg.context_length)[:, None] * 10000.0 ** (-torch.arange(0, dims, 2) / dims)
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        cos, sin = (table[: tokens.shape[1]] for table in (self.cos, self.sin))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x) @ self.embed.weight.T

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def load(self, params: Any) -> None:
        """Takes the parameters of our tree."""
        arrays = {
            "embed.weight": params["embed"],
            "norm.weight": params["norm_scale"],
            "norm.bias": params["norm_bias"],
        }
        for name, tree in params["blocks"].items():
            for kind, stack in tree.items():
                arrays |= {f"blocks.{i}.projections.{name}.{kind}": layer for i, layer in enumerate(stack)}
        self.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


def optimizer(model: TokenFormer, rate: float) -> torch.optim.Optimizer:
    """As our configs have it: no decay on the final norm."""
    decayed = [p for name, p in model.named_parameters() if not name.startswith("norm")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": model.norm.parameters(), "weight_decay": 0.0}]
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
