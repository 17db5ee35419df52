"""TokenFormer (arXiv 2410.23168) for transformers: what `convert --to_hub_format` writes loads into it.

>>> from transformers import AutoModelForCausalLM
>>> model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The copy in such a folder holds `pytorch.py` too, and needs torch and transformers alone.
"""

from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenformer_jax.pytorch import Layers

# Its name in what a model returns; transformers is changing it.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class TokenFormerConfig(PretrainedConfig):
    """The keys of `configs/base.py`'s model that say what it computes, and τ of each projection (None: √N)."""

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "embed_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "context_length",
    }

    def __init__(
        self,
        vocab_size: int = 50304,
        context_length: int = 2048,
        num_layers: int = 12,
        num_heads: int = 12,
        embed_dim: int = 768,
        qkv_tokens: int = 768,
        out_tokens: int = 768,
        ffn_tokens: int = 3072,
        pad_tokens_to: int = 0,
        rotary_fraction: float = 0.25,
        normalizer: str = "l2_norm_gelu",
        gelu: str = "erf",
        tau: dict[str, float] | None = None,
        use_cache: bool = True,
        **others: Any,
    ):
        self.vocab_size, self.context_length = vocab_size, context_length
        self.num_layers, self.num_heads, self.embed_dim = num_layers, num_heads, embed_dim
        self.qkv_tokens, self.out_tokens, self.ffn_tokens = qkv_tokens, out_tokens, ffn_tokens
        self.pad_tokens_to, self.rotary_fraction = pad_tokens_to, rotary_fraction
        self.normalizer, self.gelu, self.tau = normalizer, gelu, tau
        self.use_cache = use_cache
        super().__init__(**others)

    def of_layers(self) -> dict[str, Any]:
        """The arguments of `Layers`; counts of parameter tokens with the padding."""
        same = "vocab_size embed_dim num_layers num_heads rotary_fraction normalizer gelu tau".split()
        counts = ("qkv_tokens", "out_tokens", "ffn_tokens")
        multiple = self.pad_tokens_to or 1
        padded = {key: -(-getattr(self, key) // multiple) * multiple for key in counts}
        return {key: getattr(self, key) for key in same} | padded


class TokenFormerForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TokenFormerConfig
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: TokenFormerConfig):
        super().__init__(config)
        self.sequential = Layers(**config.of_layers())
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.sequential.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        first: Any = self.sequential["0"]
        first["word_embeddings"] = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers has it: `attention_mask` [B, S] is 0 at padding, on either side; `labels` are not shifted."""
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
        logits = self.sequential(
            input_ids,
            position_ids,
            visible(input_ids, past, attention_mask),
            None if cache is None else lambda layer: lambda k, v: cache.update(k, v, layer),
            slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep,
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache})


def visible(tokens: torch.Tensor, past: int, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which of all keys each of `tokens` sees, bool [.., L, S]; None where it is simply those up to its own."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask  # ready made, as for a cache of fixed length
    if not past and (attention_mask is None or bool(attention_mask.all())):
        return None
    keys = torch.arange(past + tokens.shape[1], device=tokens.device)
    queries = keys[past:, None]
    seen = keys <= queries
    if attention_mask is None:
        return seen
    return (seen & attention_mask.bool()[:, None, None]) | (keys == queries)  # padding sees itself: no row is empty
