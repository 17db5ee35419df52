"""What the Python faces of all kinds of models share: parameters that grow and shrink by tokens."""

import dataclasses
import functools
import numbers
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenformer_jax.config import Config, ModelConfig, validate, validate_model
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.contributions import Measured, check_has_tokens, measured, value_lengths
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.growth.recipes import RECIPES, check_growth
from tokenformer_jax.growth.shrink import Use, check_shrinking, shrink_state
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.nn.watch import Seen, seen, watch
from tokenformer_jax.training import nested
from tokenformer_jax.training.state import TauRamp, TrainState


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Resizable:
    """A model: what it is, its parameters, and its τ. Methods compute; none changes it."""

    cfg: ModelConfig
    params: Params
    tau: dict[str, float]

    @staticmethod
    def network() -> Any:
        """The module of the network, which has `abstract_model` and `init_params`."""
        raise NotImplementedError

    def checked(self, inputs: Any) -> jax.Array:
        """What the network reads, as an array. Raises a UserError where it is nothing for this model."""
        raise NotImplementedError

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
        cfg = self._resized(qkv_tokens, out_tokens, ffn_tokens)
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
