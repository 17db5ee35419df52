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

from tokenformer_jax.buckets import bucket_errors
from tokenformer_jax.config import Config, ModelConfig, validate_model
from tokenformer_jax.data.mixture import prepare
from tokenformer_jax.data.tokenizer import Tokenizer, load_tokenizer
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.perplexity import choose_split, evaluate_split
from tokenformer_jax.evaluation.sampling import Sampling, checked, generate
from tokenformer_jax.files import local_path, run_path
from tokenformer_jax.nn import language
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.layers import Params, count_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.resizable import Resizable, check_config, check_model, check_seed
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.adapters import adapted_config, adapted_tau, append, check_base, read_adapter
from tokenformer_jax.storage.fingerprint import model_fingerprint
from tokenformer_jax.storage.hub import read_published
from tokenformer_jax.storage.official import (
    check_tau,
    check_tokenizer,
    from_official,
    make_workdir,
    model_config,
    to_official,
)
from tokenformer_jax.storage.state_dicts import read_state_dict
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training.step import make_step


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenFormer(Resizable):
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

    def __repr__(self) -> str:
        cfg, tokens = self.cfg, ", ".join(f"{name} {count}" for name, count in self.cfg.unpadded_tokens.items())
        ids = f"tokenizer of {self.tokenizer.vocab_size} ids" if self.tokenizer else "no tokenizer"
        return (
            f"TokenFormer({count_params(self.params):,} parameters: {cfg.num_layers} layers of width {cfg.embed_dim}, "
            f"parameter tokens {tokens or 'none'}, context {cfg.context_length}, {cfg.dtype}, {ids})"
        )

    @classmethod
    def init(cls, cfg: ModelConfig, seed: int = 0) -> "TokenFormer":
        """A new model with the authors' initialization.

        >>> model = TokenFormer.init(read_config(pile.get_config("150m").to_dict()).model)
        """
        check_model(cfg)
        check_seed(seed)
        params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(seed))
        return cls(cfg, params, initial_tau(cfg))

    @classmethod
    def load(cls, workdir: str | os.PathLike[str], step: int | None = None) -> "TokenFormer":
        """The newest (or given) checkpoint of a workdir of train, grow or convert, with its tokenizer.

        Raises UserError where there is none, or it cannot be read.

        >>> model = TokenFormer.load("runs/quickstart/grown")
        """
        folder = run_path(workdir, "workdir")
        with bucket_errors(folder):
            run = load_trained(folder, step)
        tau = run.state.tau_values()
        return cls(run.cfg.model, run.state.params, tau, run.tokenizer)

    @classmethod
    def train(cls, cfg: Config, workdir: str | pathlib.Path) -> "TokenFormer":
        """Trains as the command `train` does, or goes on with what the workdir holds; the model of its last step.

        A signal (a notebook's "interrupt") or `cfg.max_minutes` saves and ends it early; the same call then goes on.

        >>> model = TokenFormer.train(read_config(quickstart.get_config("small").to_dict()), "runs/mine")
        """
        check_config(cfg)
        folder = run_path(workdir, "workdir")
        with bucket_errors(folder):
            train(cfg, folder)
        return cls.load(folder)

    def save(self, workdir: str | pathlib.Path, cfg: Config) -> None:
        """Makes a workdir at step 0 that `load`, `train` and the commands take; optimizer and data start anew.

        Args:
          workdir: a new or an empty folder.
          cfg: how training goes on, and on which data, which are prepared with the model's tokenizer; its `model` is
            replaced by this one's.

        Raises UserError where the data cannot be used, or the workdir is taken.

        >>> larger.save("runs/larger", cfg)
        """
        folder = run_path(workdir, "workdir")
        with bucket_errors(folder):
            make_workdir(self.params, self.tau, self.fitted(cfg), folder, self.tokenizer)

    def evaluate(self, cfg: Config, split: str = "validation") -> dict[str, float]:
        """Loss in nats a token, perplexity and bits per byte on a split of a config's data, every token once.

        Raises UserError where the data cannot be used.

        >>> model.evaluate(cfg)["bits_per_byte"]
        """
        cfg = self.fitted(cfg)
        step = make_step(cfg, make_mesh(cfg.mesh))
        abstract = step.abstract_state._replace(opt_state=())
        state = jax.device_put(self.state(), jax.tree.map(lambda a: a.sharding, abstract))
        return evaluate_split(step, state, choose_split(prepare(cfg, self.tokenizer), split), cfg)

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
