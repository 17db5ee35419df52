"""The language model in PyTorch, under the authors' parameter names: what `convert --to_torch` writes loads into it.

>>> from tokenformer_jax.pytorch import TokenFormer
>>> model = TokenFormer.load("model.safetensors", num_heads=4)
>>> model(tokens)  # int64 [B, L] -> float32 logits [B, L, V]

It needs torch, and safetensors for such files, but no other file of this project and no JAX: it may be copied.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def l2_normalized(s: torch.Tensor) -> torch.Tensor:
    """τ s / ‖s‖₂ for scores s [..., N] and τ = √N, which is all that the format knows; of zeros zeros."""
    return s * (math.sqrt(s.shape[-1]) / s.norm(dim=-1, keepdim=True).clamp_min(1e-12))


# Θ(s; √N), the paper's and two others that the authors' code has.
NORMALIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "l2_norm_gelu": lambda s: F.gelu(l2_normalized(s)),
    "gelu_l2_norm": lambda s: l2_normalized(F.gelu(s)),
    "softmax": lambda s: s.softmax(dim=-1) * s.shape[-1],
}


class Pattention(nn.Module):
    """Θ(x Kᵀ) V for N key tokens K and value tokens V; the paper's equation 4."""

    def __init__(self, tokens: int, dim: int, value_scale: float, normalizer: str):
        super().__init__()
        self.key_param_tokens = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.value_param_tokens = nn.Parameter(torch.randn(tokens, dim) * value_scale)
        self.normalizer = NORMALIZERS[normalizer]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalizer(x @ self.key_param_tokens.T) @ self.value_param_tokens


class Attention(nn.Module):
    def __init__(self, num_heads: int, projections: Mapping[str, Pattention]):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.proj = (projections[name] for name in ("query", "key", "value", "proj"))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            projection(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the first dims of each head by their position, pairing dim i with i + dims/2."""
    dims = cos.shape[-1]
    turned, rest = x[..., :dims], x[..., dims:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + Pattention(LN(x)); both norms without parameters."""

    def __init__(self, attention: Attention, mlp: Pattention):
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(F.layer_norm(x, x.shape[-1:]), cos, sin)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class TokenFormer(nn.Module):
    """int64 tokens [B, L] -> logits [B, L, V]; the embedding is tied."""

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        qkv_tokens: int,
        out_tokens: int,
        ffn_tokens: int,
        rotary_fraction: float = 0.25,
        normalizer: str = "l2_norm_gelu",
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads = {num_heads}: must divide embed_dim = {embed_dim}")
        self.rotary_dims = int(rotary_fraction * (embed_dim // num_heads))

        def projection(tokens: int) -> Pattention:
            return Pattention(tokens, embed_dim, 2 / num_layers / math.sqrt(embed_dim), normalizer)

        def block() -> Block:
            counts = {"query": qkv_tokens, "key": qkv_tokens, "value": qkv_tokens, "proj": out_tokens}
            attention = Attention(num_heads, {name: projection(tokens) for name, tokens in counts.items()})
            return Block(attention, projection(ffn_tokens))

        # The authors' numbers: in their pipeline 1 and num_layers + 2 have no parameters.
        embedding = nn.Embedding(vocab_size, embed_dim)
        nn.init.normal_(embedding.weight, std=0.02)
        parts: dict[str, nn.Module] = {"0": nn.ModuleDict({"word_embeddings": embedding})}
        parts |= {str(layer + 2): block() for layer in range(num_layers)}
        parts[str(num_layers + 3)] = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})
        self.sequential = nn.ModuleDict(parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], num_heads: int, **options: Any) -> "TokenFormer":
        """The model of a .safetensors file, or of a state dict that torch.save wrote; stored code is never run.

        Sizes are those of the tensors. `num_heads`, and `rotary_fraction` and `normalizer` in `options`, stand in no
        file: they are those of the model's config.
        """
        if os.fspath(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        return cls.of_state_dict(tensors, num_heads, **options)

    @classmethod
    def of_state_dict(cls, tensors: Mapping[str, torch.Tensor], num_heads: int, **options: Any) -> "TokenFormer":
        """The same of a state dict. Raises ValueError or RuntimeError where a tensor is missing or unknown."""
        embedding = "sequential.0.word_embeddings.weight"
        tokens = [f"sequential.2.{name}.key_param_tokens" for name in ("attention.query", "attention.proj", "mlp")]
        if missing := {embedding, *tokens} - set(tensors):
            raise ValueError(f"no state dict under the authors' names, as convert writes it: it lacks {min(missing)}")
        num_layers = len({name.split(".")[1] for name in tensors if ".mlp." in name})
        sizes = [*tensors[embedding].shape, num_layers, num_heads, *(len(tensors[name]) for name in tokens)]
        model = cls(*sizes, **options)
        model.load_state_dict(tensors)
        return model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first, *blocks, last = self.sequential.values()
        embedding: Any = first.word_embeddings
        x = embedding(tokens)
        dims, positions = self.rotary_dims, torch.arange(tokens.shape[1], device=tokens.device)
        frequencies = 10000.0 ** (-torch.arange(0, dims, 2, device=tokens.device) / max(dims, 1))
        angles = (positions[:, None] * frequencies).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        for block in blocks:
            x = block(x, cos, sin)
        norm: Any = last.norm
        return norm(x) @ embedding.weight.T
