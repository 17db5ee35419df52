"""Shrinking: parameter tokens are dropped, the least useful of each layer and projection first.

A token's usefulness is, by the criterion `norm`, ‖kᵢ‖·‖vᵢ‖, the product of its key's and its value's length: its score
grows with the one, what that adds to the output with the other. It needs no data, and is exactly zero for what
`zero_keys`, `isometric`, `random_keys` and `zero_padding` have just appended; of equally useful tokens the latest go
first. So a rung dropped right after a lossless growth gives back the former parameters and moments, bit for bit. Not
after `split`, which divides the former values, nor after `released`, which is not lossless.

By the criterion `activation` it is what `evaluation/contributions.py` measures on a text, the mean of |Θᵢ|·‖vᵢ‖.
docs/inspect.md compares the two. (Half the tokens of quickstart's grown model, trained, cost 0.12 nats a token by norm;
chosen by first-order estimates of the loss on data 0.25, at random 1.7 to 2.0.)

A Pattention normalizes its scores: with fewer of them the weights that stay would grow. They keep their size if τ falls
as the norm does, which is by √(the kept tokens' part of its square), over all layers. By `activation` that is measured,
too; by `norm` it is √(Σ‖k‖² of the tokens kept / Σ‖k‖² of all), which is right for inputs that point everywhere alike.
That gives back the former τ, too: the factor is 1 after `zero_keys`, and former τ / τ after `isometric`. From there τ
is ramped to that of a newborn model of so many tokens, as after growth.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokenformer_jax.config import SIZES, Config, ModelConfig
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.contributions import contributions, open_text, value_lengths
from tokenformer_jax.evaluation.perplexity import evaluate_split
from tokenformer_jax.growth.recipes import check_same_but_sizes
from tokenformer_jax.growth.resize import Resize, Source, resize_run
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.training import nested
from tokenformer_jax.training.state import TauRamp, TrainState
from tokenformer_jax.training.tasks import Prepared

SAME_TAU = 1e-5  # relative; a τ so close to its target is that, but for rounding


class Use(NamedTuple):
    """What the tokens are worth, and their parts in the squared norm of the scores: [Y, N] by projection."""

    worth: Mapping[str, Any]
    parts: Mapping[str, Any]  # need not sum to 1


def shrink(
    source: pathlib.Path,
    cfg: Config,
    workdir: pathlib.Path,
    step_number: int | None = None,
    criterion: str = "norm",
    text: str = "",
) -> dict[str, Any]:
    """Shrinks a checkpoint of `source` to the config's token counts, into a new workdir, as `resize_run` says.

    The counts may be a former rung's or any others. With the criterion "activation" what the tokens are worth is
    measured on a text (a file, folder, glob or URL), or without one on the training split.
    """
    return resize_run(Shrinking(criterion, text), source, cfg, workdir, step_number)


class Shrinking:
    """The `resize.Change` that drops parameter tokens."""

    file = "shrink.json"
    verb, appends = "drop", False
    recipe = "shrink"
    ramps = True

    def __init__(self, criterion: str = "norm", text: str = "") -> None:
        self.criterion, self.text = criterion, text

    def check(self, old: ModelConfig, new: ModelConfig) -> None:
        check_shrinking(old, new)

    def model(self, resize: Resize, old: TrainState, data: Prepared) -> tuple[TrainState, dict[str, jax.Array]]:
        abstract, cfg = resize.step.abstract_state._replace(opt_state=()), resize.cfg.model
        use = self.measure(resize, old, data) if self.criterion == "activation" else jax.jit(use_by_norms)(old.params)
        drop = jax.jit(
            lambda state, use: shrink_state(state, cfg, resize.ramp_steps, use),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )
        return drop(old, use), jax.jit(kept_tokens, static_argnums=1)(use, cfg)

    def measure(self, resize: Resize, old: TrainState, data: Prepared) -> Use:
        """On as many batches as `train` evaluates on, of the text or of the training split: not those of `compare`."""
        cfg = resize.old_cfg
        split = open_text(cfg, data.assets, self.text) if self.text else data.train
        found = contributions(resize.old_step, old, split, cfg, max_batches=cfg.eval_batches)
        return Use(found.contributions, found.parts)

    def compare(self, resize: Resize, old: TrainState, new: TrainState, validation: Any) -> dict[str, Any]:
        """Both models on the same batches of the validation split, those that `train` evaluates on."""
        cfg = resize.cfg
        models = (resize.old_step, old), (resize.step, new)
        before, after = (evaluate_split(*model, validation, cfg, max_batches=cfg.eval_batches) for model in models)
        how = {"criterion": self.criterion} | ({"text": self.text} if self.text else {})
        return {**how, "loss_before": before["loss"], "loss_after": after["loss"]}

    def moments(self, resize: Resize, source: Source, known: dict[str, jax.Array]) -> Any:
        shardings = jax.tree.map(lambda a: a.sharding, resize.step.abstract_state.opt_state)
        return jax.jit(pick, out_shardings=shardings)(source.moments(resize.old_step), known)


def check_shrinking(old: ModelConfig, new: ModelConfig) -> None:
    """Raises a UserError unless `new` is `old` with fewer parameter tokens."""
    check_same_but_sizes(old, new, "shrinking")
    nested.check_shrinking(new)
    if new.projection == "linear":
        raise UserError("model.projection = 'linear': a plain Transformer has no parameter tokens to drop")
    if new.normalizer == "softmax":
        raise UserError("model.normalizer = 'softmax': has no norm that τ could follow; use l2_norm_gelu")
    for size in SIZES:
        before, after = (getattr(model.padding_counted(), size) for model in (old, new))
        if not 0 < after <= before:
            raise UserError(f"model.{size} = {after}: the source has {before}; --shrink takes from 1 to that many")
    if old.tokens == new.tokens:
        raise UserError(f"model.ffn_tokens = {new.ffn_tokens}: --shrink drops none, as the source has no token more")


def use_by_norms(params: Params) -> Use:
    """‖kᵢ‖·‖vᵢ‖, and ‖kᵢ‖², to which the parts are proportional for inputs that point everywhere alike."""
    powers = {name: jnp.sum(jnp.square(tokens["keys"]), axis=-1) for name, tokens in params["blocks"].items()}
    lengths = value_lengths(params)
    return Use({name: jnp.sqrt(power_YN) * lengths[name] for name, power_YN in powers.items()}, powers)


def most_useful(worth_YN: jax.Array, count: int) -> jax.Array:
    """The `count` most useful tokens of each layer, in their order; of equals the first. Integers [Y, count]."""
    return jnp.sort(jax.lax.top_k(worth_YN, count)[1], axis=1)


def shrink_state(state: TrainState, cfg: ModelConfig, ramp_steps: int, use: Use | None = None) -> TrainState:
    """Drops parameter tokens and their moments; a pure function, to be jitted with the smaller state's shardings.

    Where tokens are sharded, each device gathers those of all to pick its own.

    Args:
      state: of the larger model; its optimizer state may be an empty tuple.
      cfg: the smaller model's config.
      ramp_steps: steps over which τ goes to `initial_tau(cfg)`; 0 keeps it for good.
      use: of the tokens; by their norms where it is None.
    """
    use = use_by_norms(state.params) if use is None else use
    kept = kept_tokens(use, cfg)
    tau = dict(state.tau)
    for name, count in cfg.tokens.items():
        parts_YN = jnp.asarray(use.parts[name])
        if cfg.tau_tokens or parts_YN.shape[1] == count:  # τ is fixed, or nothing is dropped
            continue
        layers_Y1 = jnp.arange(len(parts_YN))[:, None]
        # What is dropped is summed, not what is kept: where that has no part τ stays, to the bit.
        dropped = jnp.sum(parts_YN.at[layers_Y1, kept[name]].set(0.0)) / jnp.maximum(jnp.sum(parts_YN), 1e-30)
        target = jnp.float32(initial_tau(cfg)[name])
        start = state.tau[name].at(state.step) * jnp.sqrt(1 - dropped)
        start = jnp.where(jnp.abs(start - target) <= SAME_TAU * target, target, start)
        tau[name] = TauRamp(start, target if ramp_steps else start, state.step, state.step + ramp_steps)
    params, opt_state, average = (pick(tree, kept) for tree in (state.params, state.opt_state, state.average))
    return TrainState(state.step, params, opt_state, tau, average)


def kept_tokens(use: Use, cfg: ModelConfig) -> dict[str, jax.Array]:
    """The tokens of each projection that stay, [Y, count]."""
    return {name: most_useful(use.worth[name], count) for name, count in cfg.tokens.items()}


def pick(tree: Any, kept: dict[str, jax.Array]) -> Any:
    """Parameters, or an optimizer state that holds such, with the kept tokens only."""

    def is_params(part: Any) -> bool:
        return isinstance(part, dict) and "blocks" in part

    def of_params(part: Any) -> Any:
        if not is_params(part):
            return part
        blocks = {
            name: jax.tree.map(lambda x_YND, n=name: jnp.take_along_axis(x_YND, kept[n][:, :, None], axis=1), tokens)
            for name, tokens in part["blocks"].items()
        }
        return part | {"blocks": blocks}

    return jax.tree.map(of_params, tree, is_leaf=is_params)
