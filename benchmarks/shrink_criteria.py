"""What does it cost to drop parameter tokens, chosen by norm, by activation, or at random?

python -m benchmarks.shrink_criteria [--workdir=runs/shrink_criteria]

Trains three models of quickstart's large size for 2,500 to 3,000 steps (one grown, two from scratch) or takes those
that the workdir holds, drops a quarter, a half and three quarters of all tokens, and compares the validation losses
right after, without further training. Leaves shrink_criteria.json, and prints the table of docs/inspect.md.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from tokenformer_jax.config import SIZES, Config, read_config
from tokenformer_jax.configs import quickstart
from tokenformer_jax.evaluation.contributions import contributions
from tokenformer_jax.evaluation.perplexity import evaluate_split, own_split
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.growth.shrink import Use, shrink_state, use_by_norms
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage.trained import Trained, load_trained
from tokenformer_jax.training.step import make_step

KEPT = (0.75, 0.5, 0.25)
MEASURED, EVALUATED = 100, 200  # batches of 512 tokens, of the training and of the validation split


def config(variant: str, steps: int, seed: int = 0) -> Config:
    tree = quickstart.get_config(variant)
    tree.update(train_flops=0.0, steps=steps, seed=seed)
    return read_config(tree.to_dict())


def models(folder: pathlib.Path) -> dict[str, Trained]:
    grown = config("grown", 3000)
    train(config("small", quickstart.GROW_STEP), folder / "small")
    if not (folder / "grown" / "grow.json").exists():
        grow(folder / "small", grown, folder / "grown")
    train(grown, folder / "grown")
    for seed in (0, 1):
        train(config("large", 2500, seed), folder / f"large_{seed}")
    names = {"grown": "grown", "from scratch": "large_0", "from scratch, seed 1": "large_1"}
    return {name: load_trained(folder / workdir) for name, workdir in names.items()}


def losses(run: Trained) -> list[dict[str, Any]]:
    """Of a model at each size, by each criterion."""
    found = contributions(run.step, run.state, own_split(run, "train"), run.cfg, max_batches=MEASURED)
    norms = use_by_norms(run.state.params)
    rng = np.random.default_rng(0)
    uses = {
        "norm": norms,
        "activation": Use(found.contributions, found.parts),
        "activation, τ as by norm": Use(found.contributions, norms.parts),
        "random": Use({name: rng.random(x.shape) for name, x in found.contributions.items()}, found.parts),
    }
    validation = own_split(run, "validation")
    rows = [
        {"kept": 1.0, "whole": evaluate_split(run.step, run.state, validation, run.cfg, max_batches=EVALUATED)["loss"]}
    ]
    for kept in KEPT:
        sizes: Any = {size: round(kept * getattr(run.cfg.model, size)) for size in SIZES}
        cfg = dataclasses.replace(run.cfg, model=dataclasses.replace(run.cfg.model, **sizes))
        step = make_step(cfg, run.step.mesh)
        row = {"kept": kept}
        for name, use in uses.items():
            smaller = shrink_state(run.state, cfg.model, 0, use)
            row[name] = evaluate_split(step, smaller, validation, cfg, max_batches=EVALUATED)["loss"]
        rows.append(row)
    return rows


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    names = list(next(iter(results.values()))[1])[1:]
    lines = [f"| model | kept | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for model, (whole, *rows) in results.items():
        lines.append(f"| {model} | all | " + " | ".join([f"{whole['whole']:.3f}"] * len(names)) + " |")
        for row in rows:
            best = min(row[name] for name in names)
            cells = [f"**{row[name]:.3f}**" if row[name] == best else f"{row[name]:.3f}" for name in names]
            lines.append(f"| | {row['kept']:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/shrink_criteria"))
    folder = parser.parse_args().workdir
    results = {name: losses(run) for name, run in models(folder).items()}
    report = {"device": jax.devices()[0].device_kind, "losses": results}
    (folder / "shrink_criteria.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
