"""Grows a trained model: more parameter tokens, the same function, verified before anything is written.

python -m tokenformer_jax.grow --source=W --config=quickstart:grown --workdir=W2 [--step=N] [--recipe=split]
python -m tokenformer_jax.grow --source=W --config=C --workdir=W2 --train=new   # the new tokens alone will learn
python -m tokenformer_jax.grow --source=W2 --config=C --workdir=W3 --shrink [--criterion=activation [--text=books]]
python -m tokenformer_jax.grow --source=W --config=C --workdir=W4 --interpolate   # positions, to its image size
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
    size = flags.DEFINE_boolean("interpolate", False, "only fit positions to another config.model.image_size instead")
    criterion = flags.DEFINE_enum("criterion", None, ["norm", "activation"], "by which --shrink chooses; norm if none")
    text = flags.DEFINE_string("text", None, "file, folder, glob or URL on which activation is measured; or training's")

    def resize() -> None:
        cfg, measured = config(), criterion.value == "activation"
        for flag, takes, use in ((criterion, shrinking.value, "--shrink"), (text, measured, "--criterion=activation")):
            if flag.value and not takes:
                raise UserError(f"--{flag.name}={flag.value}: says how to choose what to drop; use {use} with it")
        if size.value:
            said = describe_shrinking(interpolate(source(), cfg, workdir(), step.value))
        elif shrinking.value:
            if recipe.value:
                raise UserError(f"--recipe={recipe.value}: says what new tokens hold, and --shrink makes none")
            by = (step.value, criterion.value or "norm", text.value or "")
            said = describe_shrinking(shrink(source(), cfg, workdir(), *by))
        else:
            given: Any = {flag.name: flag.value for flag in (recipe, train) if flag.value}
            cfg = dataclasses.replace(cfg, grow=dataclasses.replace(cfg.grow, **given))
            validate(cfg)
            figures = grow(source(), cfg, workdir(), step.value)
            said = "\n".join([describe_growth(figures), *warnings(figures)])
        print_once(said)

    run_command(resize, config, source, workdir)


if __name__ == "__main__":
    main()
