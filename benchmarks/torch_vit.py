"""An image classifier in PyTorch, of its own definition, to compare with `nn/vision.py`.

It shares nothing with it: patches by a convolution, one layer's parameters at a time, attention by PyTorch's own.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Pattention(nn.Module):
    """gelu(x Kᵀ / ‖x Kᵀ‖ √N) V."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = F.normalize(x @ self.keys.T, dim=-1) * math.sqrt(len(self.keys))
        return F.gelu(scores) @ self.values


class Plain(nn.Module):
    """x W, or gelu(x W₁) W₂."""

    def __init__(self, *weights: torch.Tensor):
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *second = self.weights
        x = x @ first
        return F.gelu(x) @ second[0] if second else x


class Block(nn.Module):
    def __init__(self, parts: dict[str, nn.Module], num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.parts: Any = nn.ModuleDict(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        h = F.layer_norm(x, (dim,))
        q, k, v = (
            self.parts[f"p_{name}"](h).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.parts["p_out"](mixed)
        return x + self.parts["p_ffn"](F.layer_norm(x, (dim,)))


class ViT(nn.Module):
    """The classifier with the parameters of our tree, as NumPy arrays."""

    def __init__(self, params: Any, patch_size: int, channels: int, num_heads: int):
        super().__init__()
        own = {name: torch.tensor(array) for name, array in params.items() if name != "blocks"}
        dim = own["patch_bias"].shape[0]
        self.embed = nn.Conv2d(channels, dim, patch_size, patch_size)
        kernel = own["patch_weight"].reshape(patch_size, patch_size, channels, dim).permute(3, 2, 0, 1)
        self.embed.weight, self.embed.bias = nn.Parameter(kernel.contiguous()), nn.Parameter(own["patch_bias"])
        self.class_token = nn.Parameter(own["class_token"]) if "class_token" in own else None
        self.positions = nn.Parameter(own["positions"])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(own["head_bias"]))
        self.norm.weight, self.norm.bias = nn.Parameter(own["norm_scale"]), nn.Parameter(own["norm_bias"])
        self.head.weight, self.head.bias = nn.Parameter(own["head_weight"]), nn.Parameter(own["head_bias"])
        layers = len(next(iter(leaves(params["blocks"]).values())))
        self.blocks: Any = nn.ModuleList(Block(parts(params["blocks"], i), num_heads) for i in range(layers))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images [B, H, W, C], normalized."""
        x = self.embed(images.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.class_token is not None else x.mean(1))

    def gradients(self) -> dict[str, Any]:
        """In the shape of our tree, after `backward`."""

        def of(parameter: Any) -> Any:
            return parameter.grad.numpy()

        kernel = self.embed.weight.grad.permute(2, 3, 1, 0)  # type: ignore[union-attr]
        found = {
            "patch_weight": kernel.reshape(-1, kernel.shape[-1]).numpy(),
            "patch_bias": of(self.embed.bias),
            "positions": of(self.positions),
            "norm_scale": of(self.norm.weight),
            "norm_bias": of(self.norm.bias),
            "head_weight": of(self.head.weight),
            "head_bias": of(self.head.bias),
        }
        if self.class_token is not None:
            found["class_token"] = of(self.class_token)
        each = [
            {f"{name}/{n}": of(p) for name, part in block.parts.items() for n, p in part.named_parameters()}
            for block in self.blocks
        ]  # type: ignore[union-attr]
        return found | {"blocks": {name: [layer[name] for layer in each] for name in each[0]}}


def leaves(blocks: Any, prefix: str = "") -> dict[str, Any]:
    """Arrays of nested dicts by their path."""
    found: dict[str, Any] = {}
    for name, part in blocks.items():
        found |= leaves(part, f"{prefix}{name}/") if isinstance(part, dict) else {f"{prefix}{name}": part}
    return found


def parts(blocks: Any, layer: int) -> dict[str, nn.Module]:
    """A layer's projections."""
    arrays = {name: torch.tensor(array[layer]) for name, array in leaves(blocks).items()}
    if "query/keys" in arrays:
        names = ("query", "key", "value", "out", "ffn")
        return {f"p_{name}": Pattention(arrays[f"{name}/keys"], arrays[f"{name}/values"]) for name in names}
    plain: dict[str, nn.Module] = {
        f"p_{name}": Plain(arrays[f"{name}/weight"]) for name in ("query", "key", "value", "out")
    }
    return plain | {"p_ffn": Plain(arrays["ffn/up/weight"], arrays["ffn/down/weight"])}


def names_of_ours(projection: str) -> dict[str, str]:
    """What `gradients` calls a block's array -> its path in our tree."""
    if projection == "pattention":
        return {
            f"p_{n}/{kind}": f"{n}/{kind}" for n in "query key value out ffn".split() for kind in ("keys", "values")
        }
    plain = {f"p_{n}/weights.0": f"{n}/weight" for n in "query key value out".split()}
    return plain | {"p_ffn/weights.0": "ffn/up/weight", "p_ffn/weights.1": "ffn/down/weight"}
