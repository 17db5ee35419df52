"""The sizes of two models, and what was measured of them, for `grow.json`, `shrink.json` and for people."""

from typing import Any

from tokenformer_jax.growth.recipes import RECIPES
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.training.state import TrainState


def token_counts(state: TrainState) -> dict[str, int]:
    """Parameter tokens of each projection."""
    return {name: state.params["blocks"][name]["keys"].shape[1] for name in state.tau}


def size_figures(old: TrainState, new: TrainState) -> dict[str, Any]:
    """The sizes of two models, as `grow.json` and `shrink.json` hold them."""
    return {
        "params_before": count_params(old.params),
        "params_after": count_params(new.params),
        "groups_before": group_sizes(old),
        "groups_after": group_sizes(new),
    }


def group_sizes(state: TrainState) -> dict[str, dict[str, int]]:
    """Parameter tokens, parameters, and bytes with Adam's moments, of each part of a model and in all."""
    tokens = token_counts(state)
    groups = {name: tree for name, tree in state.params.items() if name != "blocks"} | state.params["blocks"]
    sizes = {
        name: {"tokens": tokens.get(name, 0), "params": count_params(tree), "bytes": 3 * 4 * count_params(tree)}
        for name, tree in groups.items()
    }
    return sizes | {"all": {key: sum(size[key] for size in sizes.values()) for key in ("tokens", "params", "bytes")}}


def size_table(figures: dict[str, Any]) -> str:
    """The sizes before and after as a table for people."""
    lines = [f"{'':<12}{'parameter tokens':^20}  {'parameters':^28}  {'with moments, MB':^20}"]
    for name, after in figures["groups_after"].items():
        before = figures["groups_before"][name]
        tokens, params = (f"{before[key]:,} -> {after[key]:,}" for key in ("tokens", "params"))
        memory = f"{before['bytes'] / 1e6:,.1f} -> {after['bytes'] / 1e6:,.1f}"
        lines.append(f"{name:<12}{tokens if after['tokens'] else '':^20}  {params:^28}  {memory:^20}")
    return "\n".join(line.rstrip() for line in lines)


def spent(figures: dict[str, Any]) -> str:
    """A line with the seconds of each phase and the peak of memory; nothing where they were not measured."""
    if "peak_host_bytes" not in figures:
        return ""
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in figures["seconds"].items())
    return f"\n{phases}; peak host memory {figures['peak_host_bytes'] / 1e9:.2f} GB"


def describe_growth(figures: dict[str, Any]) -> str:
    """The growth as a table for people."""
    return (
        f"{size_table(figures)}\n"
        f"at step {figures['step']}: loss {figures['loss_before']:.5f} -> {figures['loss_after']:.5f}, largest change "
        f"of a logit {figures['max_logit_difference']:.2g} (largest logit {figures['max_logit']:.3g}), gradient norm "
        f"at new keys {figures['new_key_gradient_norm']:.3g}, at new values {figures['new_value_gradient_norm']:.3g}"
        f"{spent(figures)}"
    )


def warnings(figures: dict[str, Any]) -> list[str]:
    """Lines on what one may not have meant."""
    recipe = RECIPES[figures["recipe"]]
    if figures["tokens_before"] == figures["tokens_after"]:
        return ["no token count changed: the new workdir continues the same model"]
    if not recipe.learns:
        return ["warning: with zero keys and zero values the new tokens have no gradient and can never learn"]
    if not recipe.lossless:
        return [f"warning: {figures['recipe']} is not lossless: the model has changed"]
    return []


def describe_shrinking(figures: dict[str, Any]) -> str:
    """The shrinking as a table for people."""
    before, after = figures["loss_before"], figures["loss_after"]
    return (
        f"{size_table(figures)}\n"
        f"at step {figures['step']}: validation loss {before:.5f} -> {after:.5f} nats ({after - before:+.5f})"
    )
