"""The public face: a language model as one immutable value, to be used from Python."""

import dataclasses
import functools
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tokenformer_jax.config import ModelConfig, validate_model
from tokenformer_jax.data.tokenizer import Tokenizer
from tokenformer_jax.evaluation.sampling import Sampling, generate
from tokenformer_jax.files import local_path
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.recipes import check_growth
from tokenformer_jax.growth.shrink import check_shrinking, shrink_state
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.official import check_tau, from_official, model_config, to_official
from tokenformer_jax.storage.state_dicts import read_state_dict
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.state import TauRamp, TrainState


@dataclasses.dataclass(frozen=True)
class TokenFormer:
    """A model: what it is, its parameters, and its τ. Methods compute; none changes it.

    `params` is a nested dict of float32 arrays; those of a block are stacked over layers.
    """

    cfg: ModelConfig
    params: Params
    tau: dict[str, float]
    tokenizer: Tokenizer | None = None

    @classmethod
    def init(cls, cfg: ModelConfig, seed: int = 0) -> "TokenFormer":
        """A new model with the authors' initialisation.

        >>> model = TokenFormer.init(read_config(pile.get_config("150m").to_dict()).model)
        """
        params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(seed))
        return cls(cfg, params, initial_tau(cfg))

    @classmethod
    def load(cls, workdir: str | os.PathLike[str], step: int | None = None) -> "TokenFormer":
        """The newest (or given) checkpoint of a workdir of train, grow or convert, with its tokenizer.

        Raises UserError where there is none, or it cannot be read.

        >>> model = TokenFormer.load("runs/quickstart/grown")
        """
        run = load_trained(local_path(workdir, "workdir"), step)
        tau = {name: float(value) for name, value in run.state.tau_now().items()}
        return cls(run.cfg.model, run.state.params, tau, run.tokenizer)

    @classmethod
    def from_official(
        cls,
        weights: str | os.PathLike[str] | Mapping[str, np.ndarray],
        num_heads: int,
        rotary_fraction: float = 0.25,
        context_length: int = 2048,
    ) -> "TokenFormer":
        """The authors' weights: a file (.bin and .pt need torch; .safetensors, .npz) or arrays by official name.

        Raises UserError that names what is missing, unknown or mis-shaped.

        >>> model = TokenFormer.from_official("pytorch_model.bin", num_heads=12)
        """
        source = "state dict" if isinstance(weights, Mapping) else str(weights)
        arrays = weights if isinstance(weights, Mapping) else read_state_dict(local_path(weights, "weights"))
        cfg = model_config(arrays, num_heads, rotary_fraction, context_length=context_length, source=source)
        validate_model(cfg)
        return cls(cfg, jax.tree.map(jnp.asarray, from_official(arrays, source)), initial_tau(cfg))

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
        return _logits(self.cfg, self.params, self.tau, jnp.asarray(tokens_BL))

    def loss(self, tokens_BL: jax.Array, targets_BL: jax.Array) -> jax.Array:
        """Mean next-token loss in nats over the padded vocabulary, a float32 scalar.

        >>> model.loss(ids[:, :-1], ids[:, 1:])
        """
        return _loss(self.cfg, self.params, self.tau, jnp.asarray(tokens_BL), jnp.asarray(targets_BL))

    def gradients(self, tokens_BL: jax.Array, targets_BL: jax.Array) -> Params:
        """The gradient of `loss`, in the shape of `params`.

        >>> model.gradients(ids[:, :-1], ids[:, 1:])["blocks"]["ffn"]["keys"]  # [layers, N, D]
        """
        return _gradients(self.cfg, self.params, self.tau, jnp.asarray(tokens_BL), jnp.asarray(targets_BL))

    def grow(
        self,
        qkv_tokens: int | None = None,
        out_tokens: int | None = None,
        ffn_tokens: int | None = None,
        seed: int = 0,
    ) -> "TokenFormer":
        """A model with more parameter tokens that computes the same, up to rounding: zero keys, drawn values, τ kept.

        Raises UserError where a count would shrink. (The command `grow` carries the optimizer too, and checks.)

        >>> larger = model.grow(ffn_tokens=4 * model.cfg.ffn_tokens)
        """
        cfg = self._resized(qkv_tokens, out_tokens, ffn_tokens)
        check_growth(self.cfg, cfg, "zero_keys")
        state = self._state()
        abstract = state._replace(params=abstract_model(cfg)[1])
        grown = grow_state(state, abstract, cfg, jax.random.key(seed), "zero_keys", ramp_steps=0)
        return dataclasses.replace(self, cfg=cfg, params=grown.params)

    def shrink(
        self, qkv_tokens: int | None = None, out_tokens: int | None = None, ffn_tokens: int | None = None
    ) -> "TokenFormer":
        """A model without the least useful parameter tokens; right after `grow` it is the former model.

        Raises UserError where a count would grow, or none would shrink. `shrink.py` says what useful means.

        >>> smaller = model.shrink(ffn_tokens=model.cfg.ffn_tokens // 2)
        """
        cfg = self._resized(qkv_tokens, out_tokens, ffn_tokens)
        check_shrinking(self.cfg, cfg)
        state = shrink_state(self._state(), cfg, ramp_steps=0)
        tau = {name: float(value) for name, value in state.tau_now().items()}
        return dataclasses.replace(self, cfg=cfg, params=state.params, tau=tau)

    def _resized(self, qkv_tokens: int | None, out_tokens: int | None, ffn_tokens: int | None) -> ModelConfig:
        return dataclasses.replace(
            self.cfg,
            qkv_tokens=self.cfg.qkv_tokens if qkv_tokens is None else qkv_tokens,
            out_tokens=self.cfg.out_tokens if out_tokens is None else out_tokens,
            ffn_tokens=self.cfg.ffn_tokens if ffn_tokens is None else ffn_tokens,
        )

    def _state(self) -> TrainState:
        tau = {name: TauRamp.constant(value) for name, value in self.tau.items()}
        return TrainState(jnp.int32(0), self.params, (), tau)

    def generate(
        self, prompt_BL: jax.Array, max_tokens: int, sampling: Sampling | None = None, seed: int = 0
    ) -> jax.Array:
        """Continuations, int32 [B, max_tokens], drawn with a KV cache. `Sampling(temperature=0.0)` is greedy.

        Raises UserError where prompt and continuation exceed the context.

        >>> model.tokenizer.decode(model.generate(jnp.asarray([[0]]), 40)[0].tolist())
        """
        how = sampling or Sampling()
        how.check()
        num_ids = self.tokenizer.vocab_size if self.tokenizer else None
        prompt_BL = jnp.asarray(prompt_BL)
        stream = generate(self.cfg, self.params, self.tau, prompt_BL, max_tokens, how=how, seed=seed, num_ids=num_ids)
        return jnp.stack(list(stream), axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelConfig, params: Params, tau: dict[str, float], tokens_BL: jax.Array) -> jax.Array:
    return nnx.merge(abstract_model(cfg)[0], params)(tokens_BL, tau)[0]


@functools.partial(jax.jit, static_argnums=0)
def _loss(cfg, params, tau, tokens_BL, targets_BL) -> jax.Array:
    logits_BLV = _logits(cfg, params, tau, tokens_BL)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL).mean()


_gradients = jax.jit(jax.grad(_loss, argnums=1), static_argnums=0)
