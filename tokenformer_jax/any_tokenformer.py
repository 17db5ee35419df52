"""What the Python faces of all kinds of models share: training, evaluating, and parameters that grow and shrink."""

import dataclasses
import functools
import numbers
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.buckets import bucket_errors
from tokenformer_jax.config import Config, ModelConfig, validate, validate_model
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.contributions import Measured, check_has_tokens, measured, value_lengths
from tokenformer_jax.evaluation.perplexity import choose_split, evaluate_split
from tokenformer_jax.files import run_path
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.recipes import RECIPES, check_growth
from tokenformer_jax.growth.shrink import Use, check_shrinking, shrink_state
from tokenformer_jax.nn.layers import Params, count_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.nn.watch import Seen, seen, watch
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.official import make_workdir
from tokenformer_jax.storage.trained import load_trained
from tokenformer_jax.training import nested
from tokenformer_jax.training.state import TauRamp, TrainState
from tokenformer_jax.training.step import make_step
from tokenformer_jax.training.tasks import task_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AnyTokenFormer:
    """A model: what it is, its parameters, and its τ. Methods compute; none changes it."""

    cfg: ModelConfig
    params: Params
    tau: dict[str, float]
    sees_images: ClassVar[bool] = False

    # A kind of model says the following of itself.

    @staticmethod
    def network() -> Any:
        """The module of the network, which has `abstract_model` and `init_params`."""
        raise NotImplementedError

    @staticmethod
    def fields_of(assets: Mapping[str, str]) -> tuple[Any, ...]:
        """The fields beside these, of the assets in a checkpoint."""
        raise NotImplementedError

    def assets(self) -> dict[str, str] | None:
        """The assets with which data are prepared; None for those that the data themselves make."""
        return None

    def checked(self, inputs: Any) -> jax.Array:
        """What the network reads, as an array. Raises a UserError where it is nothing for this model."""
        raise NotImplementedError

    def reads(self) -> str:
        """What it reads, for `repr`."""
        raise NotImplementedError

    # The rest is the same for all.

    def __repr__(self) -> str:
        cfg, tokens = self.cfg, ", ".join(f"{name} {count}" for name, count in self.cfg.unpadded_tokens.items())
        return (
            f"{type(self).__name__}({count_params(self.params):,} parameters: {cfg.num_layers} layers of width "
            f"{cfg.embed_dim}, parameter tokens {tokens or 'none'}, {self.reads()}, {cfg.dtype})"
        )

    @classmethod
    def init(cls, cfg: ModelConfig, seed: int = 0) -> Self:
        """A new model with the authors' initialization.

        >>> model = TokenFormer.init(read_config(pile.get_config("150m").to_dict()).model)
        """
        check_model(cfg)
        cls._check_kind(cfg, "cfg: is of a model")
        check_seed(seed)
        params = jax.jit(cls.network().init_params, static_argnums=0)(cfg, jax.random.key(seed))
        return cls(cfg, params, initial_tau(cfg))

    @classmethod
    def load(cls, workdir: str | os.PathLike[str], step: int | None = None) -> Self:
        """The newest (or given) checkpoint of a workdir of train, grow or convert; of a mean of the weights, that.

        Raises UserError where there is none, or it cannot be read.

        >>> model = TokenFormer.load("runs/quickstart/grown")
        >>> model = TokenFormerClassifier.load("runs/digits/grown")
        """
        folder = run_path(workdir, "workdir")
        with bucket_errors(folder):
            run = load_trained(folder, step)
        cls._check_kind(run.cfg.model, f"workdir: {workdir} holds a model")
        return cls(run.cfg.model, run.state.params, run.state.tau_values(), *cls.fields_of(run.assets))

    @classmethod
    def train(cls, cfg: Config, workdir: str | os.PathLike[str]) -> Self:
        """Trains as the command `train` does, or goes on with what the workdir holds; the model of its last step.

        A signal (a notebook's "interrupt") or `cfg.max_minutes` saves and ends it early; the same call then goes on.

        >>> model = TokenFormer.train(read_config(quickstart.get_config("small").to_dict()), "runs/mine")
        """
        check_config(cfg)
        cls._check_kind(cfg.model, "cfg: is of a model")
        folder = run_path(workdir, "workdir")
        with bucket_errors(folder):
            train(cfg, folder)
        return cls.load(folder)

    def save(self, workdir: str | os.PathLike[str], cfg: Config) -> None:
        """Makes a workdir at step 0 that `load`, `train` and the commands take; optimizer and data start anew.

        Args:
          workdir: a new or an empty folder.
          cfg: how training goes on, and on which data, which are prepared with a text model's own tokenizer; its
            `model` is replaced by this one's.

        Raises UserError where the data cannot be used, or the workdir is taken.

        >>> larger.save("runs/larger", cfg)
        """
        folder = run_path(workdir, "workdir")
        with bucket_errors(folder):
            make_workdir(self.params, self.tau, self.fitted(cfg), folder, self.assets())

    def evaluate(self, cfg: Config, split: str = "validation") -> dict[str, float]:
        """The figures of a split of a config's data, all of it once: `loss` in nats a token or an image, and others.

        Those are `perplexity` and `bits_per_byte` of texts, `top1` and `top5` of images. Raises UserError where the
        data cannot be used.

        >>> model.evaluate(cfg)["loss"]
        """
        cfg = self.fitted(cfg)
        step, data = make_step(cfg, make_mesh(cfg.mesh)), task_of(cfg).prepare(cfg, self.assets())
        abstract = step.abstract_state._replace(opt_state=(), average=())
        state = jax.device_put(self.state(), jax.tree.map(lambda a: a.sharding, abstract))
        return evaluate_split(step, state, choose_split(data, split), cfg)

    @classmethod
    def _check_kind(cls, cfg: ModelConfig, what: str) -> None:
        if bool(cfg.image_size) != cls.sees_images:
            use = "sees images; use TokenFormerClassifier" if cfg.image_size else "reads text; use TokenFormer"
            raise UserError(f"{what} that {use}")

    def fitted(self, cfg: Config) -> Config:
        """The config with this model in place of its own."""
        check_config(cfg)
        cfg = dataclasses.replace(cfg, model=self.cfg)
        validate(cfg)
        return cfg

    def grow(
        self,
        qkv_tokens: int | None = None,
        out_tokens: int | None = None,
        ffn_tokens: int | None = None,
        seed: int = 0,
        recipe: str = "zero_keys",
    ) -> Self:
        """A model with more parameter tokens that computes the same, up to rounding: zero keys, drawn values, τ kept.

        `recipe` names another way, as the command's flag does; some are not lossless. Raises UserError where a count
        would shrink, or the recipe cannot. (The command `grow` carries the optimizer too, and checks.)

        >>> larger = model.grow(ffn_tokens=4 * model.cfg.ffn_tokens)
        >>> larger = model.grow(ffn_tokens=2 * model.cfg.ffn_tokens, recipe="split")
        """
        if recipe not in RECIPES:
            raise UserError(f"recipe = {recipe!r}: must be one of {', '.join(RECIPES)}")
        check_seed(seed)
        cfg = self._resized(qkv_tokens, out_tokens, ffn_tokens)
        cfg = dataclasses.replace(cfg, nested=nested.grown_parts(self.cfg, cfg))
        check_growth(self.cfg, cfg, recipe)
        state = self.state()
        network = self.network()
        abstract = state._replace(params=network.abstract_model(cfg)[1])
        key = jax.random.key(seed)
        grown = grow_state(state, abstract, cfg, key, recipe, 0, network.init_params)
        tau = grown.tau_values()
        return dataclasses.replace(self, cfg=cfg, params=grown.params, tau=tau)

    def shrink(
        self,
        qkv_tokens: int | None = None,
        out_tokens: int | None = None,
        ffn_tokens: int | None = None,
        inputs: Any = None,
    ) -> Self:
        """A model without the least useful parameter tokens; right after `grow` it is the former model.

        With inputs (token ids [B, L], or images) it is what contributes least to these that goes. Raises UserError
        where a count would grow, or none would shrink. `shrink.py` says what useful means.

        >>> smaller = model.shrink(ffn_tokens=model.cfg.ffn_tokens // 2)
        >>> smaller = model.shrink(ffn_tokens=model.cfg.ffn_tokens // 2, inputs=ids)
        """
        cfg = dataclasses.replace(self._resized(qkv_tokens, out_tokens, ffn_tokens), nested=())
        check_shrinking(self.cfg, cfg)
        use = None
        if inputs is not None:
            found = self._measured(inputs)
            use = Use(found.contributions, found.parts)
        state = shrink_state(self.state(), cfg, 0, use)
        tau = state.tau_values()
        return dataclasses.replace(self, cfg=cfg, params=state.params, tau=tau)

    def contributions(self, inputs: Any) -> dict[str, np.ndarray]:
        """How much each parameter token adds to its projection's output, on average: |Θ|·‖value‖, float32 [layers, N].

        The mean is taken over all positions of the inputs, token ids [B, L] or images. Raises UserError where the model
        has no parameter tokens. `python -m tokenformer_jax.inspect` measures whole data sets.

        >>> model.contributions(ids)["ffn"].argsort(axis=-1)  # in each layer, the least first
        """
        return self._measured(inputs).contributions

    def _measured(self, inputs: Any) -> Measured:
        check_has_tokens(self.cfg)
        array = self.checked(inputs)
        found = _seen(self.network(), self.cfg, self.params, self.tau, array)
        return measured({"nll": 0.0, "weights": len(array), "seen": found}, value_lengths(self.params))

    def at(self, part: float) -> Self:
        """A size of a nested model: the first part of its parameter tokens, with a τ of their own.

        Raises UserError where the model has no such size.

        >>> model.at(0.5)
        """
        size = nested.at(self.cfg, part)
        tau = self.tau if part == 1 else initial_tau(size)
        return dataclasses.replace(self, cfg=size, params=nested.cut(self.params, size), tau=tau)

    def _resized(self, qkv_tokens: int | None, out_tokens: int | None, ffn_tokens: int | None) -> ModelConfig:
        sizes = {"qkv_tokens": qkv_tokens, "out_tokens": out_tokens, "ffn_tokens": ffn_tokens}
        given: Any = {name: count for name, count in sizes.items() if count is not None}
        for name, count in given.items():
            if not isinstance(count, numbers.Integral):
                raise UserError(f"{name} = {count!r}: must be a whole number")
        return dataclasses.replace(self.cfg, **given)

    def state(self) -> TrainState:
        tau = {name: TauRamp.constant(value) for name, value in self.tau.items()}
        return TrainState(jnp.int32(0), self.params, (), tau)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _seen(network: Any, cfg: ModelConfig, params: Params, tau: dict[str, float], inputs: jax.Array) -> dict[str, Seen]:
    model = nnx.merge(network.abstract_model(cfg)[0], params)
    watch(model.blocks, jnp.ones((len(inputs), 1)))
    model(inputs, tau)
    return seen(model.blocks)


def check_seed(seed: Any) -> None:
    if not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**63:
        raise UserError(f"seed = {seed!r}: must be a whole number from 0 to 2**63 - 1")


def check_model(cfg: Any) -> None:
    if not isinstance(cfg, ModelConfig):
        raise UserError(f"cfg: must be a ModelConfig, not {type(cfg).__name__}; a Config has one as its .model")
    validate_model(cfg)


def check_config(cfg: Any) -> None:
    if not isinstance(cfg, Config):
        raise UserError(f"cfg: must be a Config, not {type(cfg).__name__}; use read_config(...)")
