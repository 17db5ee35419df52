"""The public face: a language model as one immutable value, to be used from Python."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokenformer_jax.any_tokenformer import AnyTokenFormer, check_seed
from tokenformer_jax.config import ModelConfig, validate_model
from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_json
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.sampling import Sampling, checked, generate
from tokenformer_jax.files import local_path
from tokenformer_jax.nn import language
from tokenformer_jax.nn.language import abstract_model
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.adapters import adapted_config, adapted_tau, append, check_base, read_adapter
from tokenformer_jax.storage.fingerprint import model_fingerprint
from tokenformer_jax.storage.hub import read_published
from tokenformer_jax.storage.official import (
    check_tau,
    check_tokenizer,
    from_official,
    model_config,
    to_official,
)
from tokenformer_jax.storage.state_dicts import read_state_dict


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenFormer(AnyTokenFormer):
    """A model: what it is, its parameters, and its τ. Methods compute; none changes it.

    `params` is a nested dict of float32 arrays; those of a block are stacked over layers. Paths may begin with `~`,
    and those of workdirs may be gs://BUCKET/FOLDER.
    A UserError names the argument that cannot be used.
    """

    tokenizer: Tokenizer | None = None

    @staticmethod
    def network() -> Any:
        return language

    def checked(self, inputs: Any) -> jax.Array:
        return self._ids("inputs", inputs)

    def reads(self) -> str:
        ids = f"tokenizer of {self.tokenizer.vocab_size} ids" if self.tokenizer else "no tokenizer"
        return f"context {self.cfg.context_length}, {ids}"

    def assets(self) -> dict[str, str] | None:
        return {"tokenizer": self.tokenizer.to_json()} if self.tokenizer else None

    @staticmethod
    def fields_of(assets: Mapping[str, str]) -> tuple[Any, ...]:
        return (tokenizer_from_json(assets["tokenizer"]),)

    @classmethod
    def from_official(
        cls,
        weights: str | os.PathLike[str] | Mapping[str, np.ndarray],
        num_heads: int,
        rotary_fraction: float = 0.25,
        context_length: int = 2048,
        tokenizer: str | pathlib.Path | Tokenizer | None = None,
    ) -> "TokenFormer":
        """The authors' weights: a file (.bin and .pt need torch; .safetensors, .npz) or arrays by official name.

        `tokenizer` is the model's tokenizer.json. Raises UserError that names what is missing, unknown, mis-shaped or
        not finite.

        >>> model = TokenFormer.from_official("pytorch_model.bin", num_heads=12, tokenizer="20B_tokenizer.json")
        """
        source = "state dict" if isinstance(weights, Mapping) else str(weights)
        arrays = weights if isinstance(weights, Mapping) else read_state_dict(local_path(weights, "weights"))
        cfg = model_config(arrays, num_heads, rotary_fraction, context_length=context_length, source=source)
        validate_model(cfg)
        if isinstance(tokenizer, str | pathlib.Path):
            tokenizer = load_tokenizer(tokenizer)
        if tokenizer:
            check_tokenizer(tokenizer, cfg, "tokenizer", source)
        return cls(cfg, jax.tree.map(jnp.asarray, from_official(arrays, source)), initial_tau(cfg), tokenizer)

    @classmethod
    def from_hub(cls, name: str, **said: Any) -> "TokenFormer":
        """A repository of the Hugging Face hub, OWNER/NAME or OWNER/NAME@REVISION, or a folder in its form.

        `said` are keys of the model that it leaves unsaid, such as num_heads. Raises UserError that names what is
        missing, or what the hub refuses.

        >>> model = TokenFormer.from_hub("Haiyang-W/TokenFormer-450M")
        """
        found = read_published(name)
        cfg = found.config({**found.known, **said}).model
        tokenizer = load_tokenizer(found.tokenizer) if found.tokenizer else None
        if tokenizer:
            check_tokenizer(tokenizer, cfg, found.tokenizer, name)
        params = jax.tree.map(jnp.asarray, from_official(found.arrays, name))
        return cls(cfg, params, dict(found.tau or initial_tau(cfg)), tokenizer)

    def to_official(self) -> dict[str, np.ndarray]:
        """The parameters under the authors' names. Raises UserError where a τ is not √N, which theirs always is.

        >>> safetensors.numpy.save_file(model.to_official(), "model.safetensors")
        """
        check_tau(self.tau, self.cfg, "model")
        return to_official(self.params)

    def logits(self, tokens_BL: jax.Array) -> jax.Array:
        """Next-token logits, float32 [B, L, V], of int32 token ids [B, L].

        >>> model.logits(jnp.asarray([model.tokenizer.encode("import os")]))
        """
        return _logits(self.cfg, self.params, self.tau, self._ids("tokens_BL", tokens_BL))

    def loss(self, tokens_BL: jax.Array, targets_BL: jax.Array) -> jax.Array:
        """Mean next-token loss in nats over the padded vocabulary, a float32 scalar.

        >>> model.loss(ids[:, :-1], ids[:, 1:])
        """
        return _loss(self.cfg, self.params, self.tau, *self._pair(tokens_BL, targets_BL))

    def gradients(self, tokens_BL: jax.Array, targets_BL: jax.Array) -> Params:
        """The gradient of `loss`, in the shape of `params`.

        >>> model.gradients(ids[:, :-1], ids[:, 1:])["blocks"]["ffn"]["keys"]  # [layers, N, D]
        """
        return _gradients(self.cfg, self.params, self.tau, *self._pair(tokens_BL, targets_BL))

    def _pair(self, tokens_BL: Any, targets_BL: Any) -> tuple[jax.Array, jax.Array]:
        tokens, targets = self._ids("tokens_BL", tokens_BL), self._ids("targets_BL", targets_BL)
        if tokens.shape != targets.shape:
            raise UserError(f"targets_BL: has shape {list(targets.shape)}; use that of tokens_BL, {list(tokens.shape)}")
        return tokens, targets

    def _ids(self, name: str, ids: Any) -> jax.Array:
        """The ids as an array. Raises a UserError, which begins with the name, where they are none of this model."""
        try:
            ids = jnp.asarray(ids)
        except (TypeError, ValueError):  # such as a list of texts, or of lists of several lengths
            raise UserError(
                f"{name}: must be an array of token ids [B, L], all rows as long; use tokenizer.encode"
            ) from None
        if ids.ndim != 2 or 0 in ids.shape:
            raise UserError(
                f"{name}: has shape {list(ids.shape)}; use [B, L], such as [1, 5] for one text of 5 tokens; an empty "
                "text is [[tokenizer.end_of_text]]"
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise UserError(f"{name}: is {ids.dtype}; token ids are integers")
        if not isinstance(ids, jax.core.Tracer) and not 0 <= int(ids.min()) <= int(ids.max()) < self.cfg.vocab_size:
            raise UserError(
                f"{name}: holds ids from {int(ids.min())} to {int(ids.max())}; the model's are 0 to "
                f"{self.cfg.vocab_size - 1}"
            )
        return ids

    def adapted(self, *paths: str | os.PathLike[str]) -> "TokenFormer":
        """This model with the tokens of adapters (files of convert --to_adapter), which were trained on it.

        Raises UserError where one is of another model. This one stays as it is.

        >>> model.adapted("prose.safetensors")
        """
        adapters = [read_adapter(local_path(path, "adapter")) for path in paths]
        check_base(adapters, model_fingerprint(self.params, self.tau), "this model")
        cfg = adapted_config(self.cfg, adapters)
        params = jax.jit(functools.partial(append, counts=cfg.tokens))(self.params, [a.tokens for a in adapters])
        return dataclasses.replace(self, cfg=cfg, params=params, tau=adapted_tau(self.tau, adapters))

    def generate(
        self, prompt_BL: jax.Array, max_tokens: int, sampling: Sampling | None = None, seed: int = 0
    ) -> jax.Array:
        """Continuations, int32 [B, max_tokens], drawn with a KV cache. `Sampling(temperature=0.0)` is greedy.

        Raises UserError where prompt and continuation exceed the context, or the model is broken.

        >>> model.tokenizer.continuation(prompt, model.generate([prompt], 40)[0].tolist())
        """
        how = sampling or Sampling()
        how.check()
        check_seed(seed)
        num_ids = self.tokenizer.vocab_size if self.tokenizer else None
        prompt_BL = self._ids("prompt_BL", prompt_BL)
        stream = generate(self.cfg, self.params, self.tau, prompt_BL, max_tokens, how=how, seed=seed, num_ids=num_ids)
        return jnp.asarray(checked(jnp.concatenate(list(stream)).T))


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, params: Params, tau: dict[str, float], tokens_BL: jax.Array) -> jax.Array:
    return nnx.merge(abstract_model(cfg)[0], params)(tokens_BL, tau)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss(cfg, params, tau, tokens_BL, targets_BL) -> jax.Array:
    logits_BLV = _logits(cfg, params, tau, tokens_BL)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL).mean()


_gradients = jax.jit(jax.grad(_loss, argnums=1), static_argnums=0)
