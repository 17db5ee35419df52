"""Does growing an image classifier pay? Digits, four ways to spend the same FLOPs, several seeds.

python -m benchmarks.digits_study [--seeds=3] [--runs=runs/digits_study] [--out=docs/vision]

For each seed, the variants of configs/digits.py: `small`, which becomes `grown`; `large` and `vit` from scratch. Where
it was stopped the same command goes on. Leaves digits.json and digits.png: accuracy on the 359 validation images, and
loss, against FLOPs.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import matplotlib
import numpy as np

from tokenformer_jax.config import Config, read_config
from tokenformer_jax.configs import digits
from tokenformer_jax.evaluation.report import read_run
from tokenformer_jax.growth.grow import grow
from tokenformer_jax.running.loop import train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHOWN = {"grown": "grown TokenFormer", "large": "the same from scratch", "vit": "plain ViT of as many parameters"}


def config(variant: str, seed: int) -> Config:
    cfg = read_config(digits.get_config(variant).to_dict())
    return dataclasses.replace(cfg, seed=seed, eval_every=250)


def run_seed(folder: pathlib.Path, seed: int) -> None:
    train(config("small", seed), folder / "small")
    if not (folder / "grown" / "grow.json").exists():
        grow(folder / "small", config("grown", seed), folder / "grown")
    for variant in SHOWN:
        train(config(variant, seed), folder / variant)


def curve(folder: pathlib.Path, variant: str) -> list[dict[str, Any]]:
    """FLOPs, loss, top-1 and parameters of a run's evaluations; a grown one's begin with the small model's."""
    rows = read_run(folder / variant)[0]
    if variant == "grown":
        rows = [*read_run(folder / "small")[0], *rows]
    keys = ("step", "params", "train_flops", "eval_loss", "eval_top1")
    return [{key: row[key] for key in keys} for row in rows]


def summary(curves: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """The last evaluations, over seeds."""
    found = {}
    for variant, of_seeds in curves.items():
        top1 = [rows[-1]["eval_top1"] for rows in of_seeds]
        losses = [rows[-1]["eval_loss"] for rows in of_seeds]
        found[variant] = {
            "params": of_seeds[0][-1]["params"],
            "train_flops": of_seeds[0][-1]["train_flops"],
            "top1": top1,
            "mean_top1": float(np.mean(top1)),
            "loss": losses,
            "mean_loss": float(np.mean(losses)),
        }
    return found


def draw(curves: dict[str, list[list[dict[str, Any]]]], path: pathlib.Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, (variant, of_seeds) in enumerate(curves.items()):
        for axis, key, scale in ((axes[0], "eval_top1", 100), (axes[1], "eval_loss", 1)):
            for i, rows in enumerate(of_seeds):
                flops, values = zip(*((row["train_flops"], scale * row[key]) for row in rows), strict=True)
                label = SHOWN[variant] if i == 0 else None
                axis.plot(flops, values, marker="o", markersize=2, linewidth=1, color=f"C{number}", label=label)
    axes[0].set(xlabel="training FLOPs", ylabel="validation top-1, %", ylim=(80, 100))
    axes[1].set(xlabel="training FLOPs", ylabel="validation loss, nats an image", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, help="train this seed alone, beside others")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/digits_study"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/vision"))
    arguments = parser.parse_args()
    if arguments.only is not None:
        return run_seed(arguments.runs / str(arguments.only), arguments.only)
    arguments.out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in SHOWN}
    for seed in range(arguments.seeds):
        folder = arguments.runs / str(seed)
        run_seed(folder, seed)
        for variant in SHOWN:
            curves[variant].append(curve(folder, variant))
        found = {"seeds": seed + 1, "summary": summary(curves), "curves": curves}
        (arguments.out / "digits.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(curves, arguments.out / "digits.png")
        for variant, row in found["summary"].items():  # type: ignore[attr-defined]
            each = ", ".join(f"{value:.2%}" for value in row["top1"])
            print(
                f"{variant}: {row['params']:,} parameters, {row['train_flops']:.3g} FLOPs, top-1 {each}, mean "
                f"{row['mean_top1']:.2%}, loss {row['mean_loss']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
