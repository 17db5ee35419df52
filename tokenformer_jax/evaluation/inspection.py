"""Which parameter tokens matter: dead ones, what each growth took over, and which belong to a domain."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from tokenformer_jax.config import ModelConfig
from tokenformer_jax.errors import UserError
from tokenformer_jax.evaluation.contributions import Measured, check_has_tokens, contributions, open_text
from tokenformer_jax.evaluation.perplexity import own_split, summary
from tokenformer_jax.files import write_with
from tokenformer_jax.storage.trained import PutOn, Trained
from tokenformer_jax.training.tasks import task_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm

SPECIAL = 2.0  # a token belongs to a domain if its share there is so many times its share in every other one
Cohorts = dict[str, range]  # tokens of a projection that came together, by when they came


def inspect_run(
    run: Trained, split: str, texts: Mapping[str, str], *, dead_below: float = 0.01, max_batches: int = 0
) -> dict[str, Any]:
    """What `inspect.json` holds of a run: `describe` its measured domains, each source of its own split and each text.

    Raises:
      UserError: the model has no parameter tokens, or something cannot be read.
    """
    check_has_tokens(run.cfg.model)
    opened = {name: open_text(run.cfg, run.assets, path) for name, path in texts.items()}
    if split != "none":
        own = own_split(run, split)
        parts = task_of(run.cfg).parts(own) or {split: own}
        for name in opened:
            if name in parts:
                raise UserError(f"--text={name}={texts[name]}: its own data have that name, too; use another")
        opened = parts | opened
    if not opened:
        raise UserError("--split=none: leaves no text to measure on; use --text=FILE, or validation")
    domains = {
        name: contributions(run.step, run.state, text, run.cfg, max_batches=max_batches, progress=True)
        for name, text in opened.items()
    }
    saved = ModelConfig(**run.record.model).tokens  # what runs may have an adapter's tokens, or only its first ones
    cohorts = {
        name: within(cohorts_of(run.record.growth, name, saved[name], run.adapters), count)
        for name, count in run.cfg.model.tokens.items()
    }
    return summary(run) | describe(domains, cohorts, dead_below)


def named_texts(given: Sequence[str]) -> dict[str, str]:
    """The texts that `--text` names, NAME=PATH or PATH, by their names. Raises a UserError where two have one name."""
    texts: dict[str, str] = {}
    for item in given:
        match = re.fullmatch(r"([\w-]+)=(.+)", item)
        name, path = match.groups() if match else (_name_of(item), item)
        if name in texts:
            raise UserError(f"--text={item}: another text is named {name!r}, too; use --text=NAME={path}")
        texts[name] = path
    return texts


def _name_of(path: str) -> str:
    """A file's or folder's name; of a glob that of the folder that it looks in."""
    parts = [pathlib.PurePath(part).stem for part in pathlib.PurePath(path).parts if not set(part) & set("*?[")]
    return parts[-1] if parts else path


def cohorts_of(
    growth: Sequence[Mapping[str, Any]], projection: str, count: int, adapters: Sequence[PutOn] = ()
) -> Cohorts:
    """Which of a projection's tokens were there at first, and which each growth and each adapter appended.

    Which ones a shrinking kept is not recorded: what was left counts as one cohort.

    Args:
      growth: of the checkpoint's record.
      projection: its name.
      count: its tokens in the checkpoint.
      adapters: that were put on it.
    """
    first = growth[0]["from"][projection] if growth else count
    found = {"start": range(first)}
    for change in growth:
        before, after = (change[side][projection] for side in ("from", "to"))
        if after > before:
            found[f"step {change['step']}"] = range(before, after)
        elif after < before:
            found = {f"left at step {change['step']}": range(after)}
    for adapter in adapters:
        if more := adapter.counts.get(projection, 0):
            name = pathlib.PurePath(adapter.file).stem
            found[f"{name} {len(found)}" if name in found else name] = range(count, count + more)
            count += more
    return found


def within(cohorts: Cohorts, count: int) -> Cohorts:
    """What of cohorts is among so many first tokens."""
    return {name: tokens[: count - tokens.start] for name, tokens in cohorts.items() if tokens.start < count}


def describe(domains: Mapping[str, Measured], cohorts: Mapping[str, Cohorts], dead_below: float) -> dict[str, Any]:
    """What `inspect.json` says of measured domains.

    A share is that of a token in its layer's and projection's sum. Over several domains it is the mean. A token is dead
    where it is below `dead_below` of the mean share, or 0.
    """
    for name, of in domains.items():
        if not all(np.isfinite(found).all() for found in of.contributions.values()):
            raise UserError(f"the model is broken: contributions on {name} are not finite; use an earlier --step")
    result: dict[str, Any] = {
        "dead_below": dead_below,
        "domains": {name: {"loss": of.loss, "tokens": of.tokens} for name, of in domains.items()},
        "projections": {},
    }
    for projection, parts in cohorts.items():
        shares_XYN = np.stack([shares(of.contributions[projection]) for of in domains.values()])
        mean_YN = shares_XYN.mean(0)
        dead_YN = mean_YN <= dead_below * mean_YN.mean(-1, keepdims=True)
        special_XYN = specialized(shares_XYN) & ~dead_YN
        result["projections"][projection] = {
            "cohorts": {name: [tokens.start, tokens.stop] for name, tokens in parts.items()},
            "layers": [
                {
                    "dead": np.flatnonzero(dead_YN[layer]).tolist(),
                    "half": half(mean_YN[layer]),
                    "cohort_shares": {name: mean_YN[layer, tokens].sum().item() for name, tokens in parts.items()},
                    "apart": apart(shares_XYN[:, layer]),
                    "specialized": {
                        name: np.flatnonzero(special_XYN[number, layer]).tolist() for number, name in enumerate(domains)
                    },
                }
                for layer in range(len(mean_YN))
            ],
            "contributions": {name: rounded(of.contributions[projection]) for name, of in domains.items()},
        }
    return result


def shares(contributions_YN: np.ndarray) -> np.ndarray:
    """Each token's share of its layer's sum, float64 [Y, N]; 0 where all are 0."""
    sums_Y1 = contributions_YN.sum(-1, keepdims=True, dtype=np.float64)
    return contributions_YN / np.where(sums_Y1 > 0, sums_Y1, 1.0)


def half(shares_N: np.ndarray) -> int:
    """How few tokens make up half of the sum."""
    return int(np.searchsorted(np.cumsum(np.sort(shares_N)[::-1]), 0.5 * shares_N.sum())) + 1


def apart(shares_XN: np.ndarray) -> float:
    """How much of the sum other tokens make up in another domain: the total variation of the two furthest apart."""
    return 0.5 * max(np.abs(one_N - other_N).sum().item() for one_N in shares_XN for other_N in shares_XN)


def specialized(shares_XYN: np.ndarray) -> np.ndarray:
    """Whether a token's share in a domain is SPECIAL times that in every other one. Booleans [X, Y, N]."""
    if len(shares_XYN) == 1:
        return np.zeros(shares_XYN.shape, bool)
    others_XYN = np.stack([np.delete(shares_XYN, number, 0).max(0) for number in range(len(shares_XYN))])
    return (shares_XYN >= SPECIAL * others_XYN) & (shares_XYN > 0)


def rounded(values_YN: np.ndarray) -> list[list[float]]:
    """With five digits, which keeps the file small."""
    return [[float(f"{value:.5g}") for value in row] for row in values_YN]


def table(result: Mapping[str, Any]) -> str:
    """A row for each layer of each projection."""
    domains = list(result["domains"]) if len(result["domains"]) > 1 else []
    names = list(dict.fromkeys(name for of in result["projections"].values() for name in of["cohorts"]))
    cohorts = names if len(names) > 1 else []
    rows = [["", "layer", "tokens", "dead", "half in", *cohorts, *["apart"] * bool(domains)]]
    rows[0] += [f"special to {name}" for name in domains]
    for projection, of in result["projections"].items():
        count = max(end for _, end in of["cohorts"].values())
        for number, layer in enumerate(of["layers"]):
            row = [projection if not number else "", f"{number}", f"{count:,}", f"{len(layer['dead']):,}"]
            row += [f"{layer['half']:,}", *(_percent(layer["cohort_shares"].get(name)) for name in cohorts)]
            row += [_percent(layer["apart"])] * bool(domains)
            rows.append(row + [f"{len(layer['specialized'][name]):,}" for name in domains])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def heading(result: Mapping[str, Any]) -> str:
    texts = [f"{name} {of['tokens']:,.0f} tokens, loss {of['loss']:.4f}" for name, of in result["domains"].items()]
    return f"step {result['step']}, {result['params']:,} parameters; measured on {'; '.join(texts)}"


def plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """A row of images a projection: a layer a row, a token a column, in their order, with red lines between cohorts.

    First the shares, 1 being the layer's mean; then, of several domains, how far the tokens lean to each.
    """
    domains, columns = list(result["domains"]), 1 + len(result["domains"]) * (len(result["domains"]) > 1)
    layers = len(next(iter(result["projections"].values()))["layers"])
    size = 5 * columns + 1, len(result["projections"]) * min(0.7 + 0.3 * layers, 3.0)
    figure, axes = plt.subplots(len(result["projections"]), columns, figsize=size, layout="constrained", squeeze=False)
    colors = matplotlib.colormaps["viridis"].with_extremes(under="black")
    shown: list[Any] = [{"cmap": colors, "norm": LogNorm(0.1, 10)}]
    shown += [{"cmap": "coolwarm", "norm": LogNorm(0.25, 4)}] * (columns - 1)
    for row, (projection, of) in zip(axes, result["projections"].items(), strict=True):
        shares_XYN = np.stack([shares(np.array(of["contributions"][name])) for name in domains])
        mean_YN = shares_XYN.mean(0)
        images = [mean_YN * mean_YN.shape[1], *(shares_XYN / np.where(mean_YN > 0, mean_YN, 1.0))][:columns]
        for axis, image_YN, how in zip(row, images, shown, strict=True):
            axis.imshow(np.maximum(image_YN, 1e-9), aspect="auto", interpolation="nearest", **how)
            for first, _ in list(of["cohorts"].values())[1:]:
                axis.axvline(first - 0.5, color="red", linewidth=1.5)
            axis.set_yticks(range(layers) if layers < 9 else (0, layers - 1))
        row[0].set_ylabel(f"{projection}\nlayer")
    titles = ["share, in means of the layer", *(f"share in {name} / mean share" for name in domains)]
    for column, title, ticks in zip(
        axes.T, titles, [(0.1, 1, 10), *[(0.25, 0.5, 1, 2, 4)] * len(domains)], strict=False
    ):
        column[0].set_title(title)
        column[-1].set_xlabel("parameter token")
        bar = figure.colorbar(column[0].images[0], ax=column, extend="both", aspect=40, ticks=ticks, format="{x:g}")
        bar.minorticks_off()
    try:
        write_with(path, lambda file: figure.savefig(file, dpi=100))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        plt.close(figure)
