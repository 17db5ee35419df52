"""Grows a trained model: more parameter tokens, the same function, verified before anything is written.

python -m tokenformer_jax.grow --source=W --config=quickstart:grown --workdir=W2 [--step=N] [--recipe=split]
python -m tokenformer_jax.grow --source=W --config=C --workdir=W2 --train=new   # the new tokens alone will learn
python -m tokenformer_jax.grow --source=W2 --config=quickstart:small --workdir=W3 --shrink [--step=N]
python -m tokenformer_jax.grow --source=W --config=C --workdir=W4 --config.model.image_size=384 --interpolate
"""

import dataclasses
from typing import Any

from absl import flags

from tokenformer_jax.cli import config_flag, print_once, run_command, workdir_flag
from tokenformer_jax.config import validate
from tokenformer_jax.errors import UserError
from tokenformer_jax.growth.figures import describe_growth, describe_shrinking, warnings
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.positions import interpolate
from tokenformer_jax.growth.recipes import RECIPES
from tokenformer_jax.growth.shrink import shrink


def main() -> None:
    config = config_flag()
    source = workdir_flag("source", "the directory of the run to grow")
    workdir = workdir_flag(help_text="the new directory, which train then resumes")
    step = flags.DEFINE_integer("step", None, "which checkpoint of the source; by default the newest")
    recipe = flags.DEFINE_string("recipe", None, f"{', '.join(RECIPES)}; overrides config.grow.recipe")
    train = flags.DEFINE_enum("train", None, ["all", "new"], "what learns afterwards; overrides config.grow.train")
    shrinking = flags.DEFINE_boolean("shrink", False, "drop parameter tokens instead, the least useful first")

    other_size = flags.DEFINE_boolean("interpolate", False, "only fit the positions to another config.model.image_size")

    def resize() -> None:
        cfg = config()
        if shrinking.value or other_size.value:
            if recipe.value:
                raise UserError(f"--recipe={recipe.value}: says what new tokens hold, and nothing is appended here")
            change = shrink if shrinking.value else interpolate
            text = describe_shrinking(change(source(), cfg, workdir(), step.value))
        else:
            given: Any = {flag.name: flag.value for flag in (recipe, train) if flag.value}
            cfg = dataclasses.replace(cfg, grow=dataclasses.replace(cfg.grow, **given))
            validate(cfg)
            figures = grow(source(), cfg, workdir(), step.value)
            text = "\n".join([describe_growth(figures), *warnings(figures)])
        print_once(text)

    run_command(resize, config, source, workdir)


if __name__ == "__main__":
    main()
