"""Which way to grow pays most? Other recipes, other sizes and repeated text, in the setting of growth_rates.py.

python -m benchmarks.growth_recipes [--workdir=runs/growth_rates] [--seeds=0,1,2,3] [--epochs=0]

Every arm spends as many FLOPs as those of growth_rates.py, at the rate that is best there. Recipes that stand here
alone were tried, and are no part of the package. With --epochs=4 all arms read a quarter of the text again and
again. Leaves growth_recipes.json (growth_recipes_4_epochs.json) in the workdir, and prints a table against the
default, early growth with zero keys, and one against the large model from scratch. `--report_only --workdir=docs`
prints those of docs.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.growth_rates import DRAWS, LADDER, LARGE, RATE, SMALL, Arm, study, table
from tokenformer_jax.config import ModelConfig
from tokenformer_jax.growth.recipes import RECIPES, Grown, Growth, Recipe, random_keys, zero_keys
from tokenformer_jax.nn.language import init_params
from tokenformer_jax.nn.layers import Params
from tokenformer_jax.training.state import TrainState


def shrink_and_perturb(g: Growth) -> Grown:
    """Zero keys, and the trained tokens a mixture of themselves and of the initializer's."""
    grown = zero_keys(g)
    keys_YND = jnp.where(g.is_new_N1, 0.0, 0.8 * g.keys_YND + 0.2 * g.drawn_keys_YND)
    return grown._replace(keys_YND=keys_YND, values_YNE=grown.values_YNE * 0.8 + 0.2 * g.drawn_values_YNE)


def gradient_keys(state: TrainState) -> Callable[[ModelConfig, jax.Array], Params]:
    """An initializer whose keys are random mixtures of the gradients of the trained ones, as Adam remembers them.

    A key's gradient is a sum of the layer's inputs, weighted by what the loss wants of their scores.
    """
    moments = state.opt_state[0].mu["blocks"]  # type: ignore[index]

    def draw(cfg: ModelConfig, key: jax.Array) -> Params:
        params = init_params(cfg, key)
        blocks = dict(params["blocks"])
        for number, (name, part) in enumerate(moments.items()):
            if isinstance(part, dict) and "keys" in part:
                gradients_YMD = part["keys"] / jnp.linalg.norm(part["keys"], axis=2, keepdims=True).clip(1e-30)
                shape = len(gradients_YMD), cfg.tokens[name], gradients_YMD.shape[1]
                mixture_YNM = jax.random.normal(jax.random.fold_in(key, number), shape)
                blocks[name] = blocks[name] | {"keys": jnp.einsum("ynm,ymd->ynd", mixture_YNM, gradients_YMD)}
        return params | {"blocks": blocks}

    return draw


def add_recipes(recipes: dict[str, Recipe], draws: dict[str, Any]) -> None:
    recipes["shrink_and_perturb"] = Recipe(shrink_and_perturb, lossless=False, ramps=True)
    recipes["gradient_keys"] = Recipe(random_keys, lossless=False)
    draws["gradient_keys"] = gradient_keys


DEFAULT = Arm(LADDER, RATE, (1000,), "zero_keys")
FFN_ALONE, ATTENTION_ALONE = (SMALL, 448), (112, 4 * SMALL)  # as many parameters as LARGE
ARMS = (
    DEFAULT._replace(ramp=0),
    DEFAULT._replace(sizes=(SMALL, 32, LARGE), grown_at=(500, 1000)),
    DEFAULT._replace(recipe="gradient_keys"),
    DEFAULT._replace(sizes=(SMALL, FFN_ALONE)),
    DEFAULT._replace(sizes=(SMALL, ATTENTION_ALONE)),
    DEFAULT._replace(recipe="split"),
    DEFAULT._replace(recipe="shrink_and_perturb"),
    DEFAULT._replace(recipe="random_keys"),
)
REPEATED = Arm((LARGE,), warmup=2000), DEFAULT, Arm(LADDER, RATE, (3000,), "zero_keys")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/growth_rates"))
    parser.add_argument("--seeds", default="0,1,2,3")
    parser.add_argument("--epochs", type=int, default=0, help="how often the large model from scratch reads its text")
    parser.add_argument("--report_only", action="store_true", help="print the tables, and run nothing")
    args = parser.parse_args()
    name = f"growth_recipes_{args.epochs}_epochs" if args.epochs else "growth_recipes"
    if not args.report_only:
        add_recipes(RECIPES, DRAWS)
        seeds = [int(seed) for seed in args.seeds.split(",")]
        study(args.workdir, seeds, REPEATED if args.epochs else ARMS, name, args.epochs)
    runs: dict[str, Any] = json.loads((args.workdir / f"{name}.json").read_text())["runs"]
    others = args.workdir / "growth_rates.json"
    if not args.epochs and others.exists():
        known = json.loads(others.read_text())["runs"]
        runs |= {key: run for key, run in known.items() if run["lineage"] == DEFAULT.name or len(run["sizes"]) == 1}
    print(table(runs, DEFAULT.name), table(runs), sep="\n\n")


if __name__ == "__main__":
    main()
