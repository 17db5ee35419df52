"""The language model in PyTorch, under the authors' parameter names: what `convert --to_torch` writes loads into it.

>>> from tokenformer_jax.pytorch import TokenFormer
>>> model = TokenFormer.load("model.safetensors", num_heads=4)
>>> model(tokens)  # int64 [B, L] -> float32 logits [B, L, V]

It needs torch, and safetensors for such files, but no other file of this project and no JAX: it may be copied.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


def l2_normalized(s: torch.Tensor, tau: float) -> torch.Tensor:
    """τ s / ‖s‖₂ for scores s [..., N]; of zeros zeros."""
    return s * (tau / s.norm(dim=-1, keepdim=True).clamp_min(1e-12))


# Θ(s; τ), the paper's and two others that the authors' code has.
Gelu = Callable[[torch.Tensor], torch.Tensor]
NORMALIZERS: dict[str, Callable[[torch.Tensor, float, Gelu], torch.Tensor]] = {
    "l2_norm_gelu": lambda s, tau, gelu: gelu(l2_normalized(s, tau)),
    "gelu_l2_norm": lambda s, tau, gelu: l2_normalized(gelu(s), tau),
    "softmax": lambda s, tau, gelu: s.softmax(dim=-1) * tau**2,
}
GELUS: dict[str, Gelu] = {"erf": F.gelu, "tanh": functools.partial(F.gelu, approximate="tanh")}


class Pattention(nn.Module):
    """Θ(x Kᵀ; τ) V for N key tokens K and value tokens V; the paper's equation 4."""

    def __init__(self, tokens: int, dim: int, value_scale: float, normalizer: str, gelu: str, tau: float):
        super().__init__()
        self.key_param_tokens = nn.Parameter(torch.randn(tokens, dim) * 0.02)
        self.value_param_tokens = nn.Parameter(torch.randn(tokens, dim) * value_scale)
        self.normalizer, self.gelu, self.tau = NORMALIZERS[normalizer], GELUS[gelu], tau

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalizer(x @ self.key_param_tokens.T, self.tau, self.gelu) @ self.value_param_tokens


# A KV cache of one layer: takes keys and values [B, H, L, K], gives them after those of the positions before.
Cache = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Place(NamedTuple):
    """What attention must know of the positions."""

    cos: torch.Tensor  # [..., L, dims that rotary turns]
    sin: torch.Tensor
    mask: torch.Tensor | None  # [..., L, S], bool: which keys a query sees; without one those up to its own


def place(dims: int, positions: torch.Tensor, mask: torch.Tensor | None) -> Place:
    """For positions [B, L] of texts."""
    frequencies = 10000.0 ** (-torch.arange(0, dims, 2, device=positions.device) / max(dims, 1))
    angles = (positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
    return Place(angles.cos(), angles.sin(), mask)


class Attention(nn.Module):
    def __init__(self, num_heads: int, projections: Mapping[str, Pattention]):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.proj = (projections[name] for name in ("query", "key", "value", "proj"))

    def forward(self, x: torch.Tensor, at: Place, cache: Cache | None) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            projection(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        q, k = rotate(q, at.cos, at.sin), rotate(k, at.cos, at.sin)
        if cache:
            k, v = cache(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, at.mask, is_causal=at.mask is None)
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

    def forward(self, x: torch.Tensor, at: Place, cache: Cache | None = None) -> torch.Tensor:
        x = x + self.attention(F.layer_norm(x, x.shape[-1:]), at, cache)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class Layers(nn.ModuleDict):
    """Embedding, blocks and final norm under the authors' numbers: in their pipeline 1 and num_layers + 2 have no
    parameters.

    `tau` holds that of query, key, value, out and ffn; without it each is √N.
    """

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
        gelu: str = "erf",
        tau: Mapping[str, float] | None = None,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads = {num_heads}: must divide embed_dim = {embed_dim}")
        self.rotary_dims = int(rotary_fraction * (embed_dim // num_heads))
        counts = dict.fromkeys(("query", "key", "value"), qkv_tokens) | {"out": out_tokens, "ffn": ffn_tokens}

        def projection(name: str) -> Pattention:
            tokens = counts[name]
            value_scale = 2 / num_layers / math.sqrt(embed_dim)
            return Pattention(tokens, embed_dim, value_scale, normalizer, gelu, tau[name] if tau else math.sqrt(tokens))

        embedding = nn.Embedding(vocab_size, embed_dim)
        nn.init.normal_(embedding.weight, std=0.02)
        self["0"] = nn.ModuleDict({"word_embeddings": embedding})
        for layer in range(num_layers):
            parts = {"query": "query", "key": "key", "value": "value", "proj": "out"}
            attention = Attention(num_heads, {theirs: projection(name) for theirs, name in parts.items()})
            self[str(layer + 2)] = Block(attention, projection("ffn"))
        self[str(num_layers + 3)] = nn.ModuleDict({"norm": nn.LayerNorm(embed_dim)})

    @property
    def embedding(self) -> Any:
        first: Any = self["0"]
        return first.word_embeddings

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        caches: Callable[[int], Cache] | None = None,
        kept: Any = slice(None),
    ) -> torch.Tensor:
        """Logits [B, L, V] of int64 tokens [B, L], of the `kept` positions alone.

        `positions` [B, L] are 0, 1, … without; `mask` is that of `Place`; `caches` gives the cache of a layer.
        """
        _, *blocks, last = self.values()
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x, at = self.embedding(tokens), place(self.rotary_dims, positions, mask)
        for layer, block in enumerate(blocks):
            x = block(x, at, caches(layer) if caches else None)
        final: Any = last
        return final.norm(x[:, kept]) @ self.embedding.weight.T


class TokenFormer(nn.Module):
    """int64 tokens [B, L] -> logits [B, L, V]; the embedding is tied. Takes what `Layers` take."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__()
        self.sequential = Layers(*sizes, **options)

    @classmethod
    def load(cls, path: str | os.PathLike[str], num_heads: int, **options: Any) -> "TokenFormer":
        """The model of a .safetensors file, or of a state dict that torch.save wrote; stored code is never run.

        Sizes are those of the tensors. `num_heads`, and `rotary_fraction`, `normalizer`, `gelu` and `tau` in
        `options`, stand in no file: they are those of the model's config, and of its growth.
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
        return self.sequential(tokens)
