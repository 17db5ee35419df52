"""What an image classifier says of images: classes and probabilities, as lines and as a sheet of pictures."""

import glob
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from flax import nnx

from tokenformer_jax.data.images import class_names
from tokenformer_jax.data.pictures import ENDINGS, KINDS, Pictures, center_box, decode
from tokenformer_jax.errors import UserError, shown
from tokenformer_jax.evaluation.perplexity import own_split
from tokenformer_jax.files import write_with
from tokenformer_jax.storage.trained import Trained
from tokenformer_jax.training.tasks import task_of

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROWS = 64  # images at once


class Prediction(NamedTuple):
    name: str
    pixels_HWC: np.ndarray  # uint8, as the model sees them
    classes: list[str]  # the likeliest first
    probabilities: list[float]
    label: str = ""  # the true class, where it is known


def find_images(pattern: str) -> list[str]:
    """The images that a file, a folder (with those in it, but hidden ones) or a glob names.

    Raises a UserError where there are none.
    """
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        below = (p.relative_to(path) for p in pathlib.Path(path).rglob("*"))
        names = [os.path.join(path, p) for p in below if not any(part.startswith(".") for part in p.parts)]
    else:
        names = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    found = sorted(name for name in names if name.lower().endswith(ENDINGS) and os.path.isfile(name))
    if not found:
        raise UserError(f"--images={shown(pattern)}: names no images; use a file, folder or glob of {KINDS}")
    return found


def predict_files(run: Trained, names: list[str], top: int) -> list[Prediction]:
    """Of each image that can be read; a damaged one is named and skipped. Raises a UserError where all are."""
    require_images(run)
    seen: list[tuple[str, np.ndarray]] = []
    for name in names:
        try:
            seen.append((name, pixels_of(run, name)))
        except Exception as error:  # of a damaged file PIL raises OSError, SyntaxError, ValueError, IndexError, …
            print(f"warning: {shown(name)}: cannot be read ({shown(error)}), and is skipped", file=sys.stderr)
    if not seen:
        raise UserError(f"--images: {shown(names[0])} cannot be read, nor any other; use images")
    return predictions(run, seen, top)


def predict_split(run: Trained, count: int, top: int) -> list[Prediction]:
    """Of so many images spread over the validation split of the run's own data, less damaged ones."""
    require_images(run)
    split: Pictures = own_split(run, "validation")
    chosen = np.arange(min(count, len(split))) * len(split) // min(count, len(split))
    images_BHWC, labels_B = split.read(chosen.tolist())
    kept = np.flatnonzero(labels_B >= 0)
    seen = [(split.name(int(chosen[i])), images_BHWC[i]) for i in kept]
    labels = [split.class_names[labels_B[i]] for i in kept]
    return [p._replace(label=label) for p, label in zip(predictions(run, seen, top), labels, strict=True)]


def require_images(run: Trained) -> None:
    if not run.cfg.model.image_size:
        raise UserError("--workdir: holds a language model, which sees no images; use `generate` or `evaluate`")


def pixels_of(run: Trained, item: Any) -> np.ndarray:
    model, center = run.cfg.model, run.cfg.augment.center
    return decode(item, model.image_size, model.image_channels, lambda shape: center_box(shape, center))


def predictions(run: Trained, seen: list[tuple[str, np.ndarray]], top: int) -> list[Prediction]:
    """Of each image, the `top` likeliest classes."""
    names = class_names(run.assets)
    graphdef, _, _ = task_of(run.cfg).abstract_model(run.cfg.model)

    @jax.jit
    def probabilities(state: Any, images_BHWC: Any) -> jax.Array:
        return jax.nn.softmax(nnx.merge(graphdef, state.params)(images_BHWC, state.tau_now()))

    result = []
    with jax.set_mesh(run.step.mesh):
        for start in range(0, len(seen), ROWS):
            some = seen[start : start + ROWS]
            images_BHWC = np.zeros((ROWS, *some[0][1].shape), np.uint8)  # one shape, so one program
            images_BHWC[: len(some)] = [pixels for _, pixels in some]
            found_BV = np.asarray(probabilities(run.state, images_BHWC))[: len(some)]
            if not np.isfinite(found_BV).all():
                raise UserError(f"the model of step {run.step_number} is broken: its probabilities are not finite")
            for (name, pixels), found_V in zip(some, found_BV, strict=True):
                best = np.argsort(-found_V, kind="stable")[:top]
                result.append(Prediction(name, pixels, [names[i] for i in best], [float(found_V[i]) for i in best]))
    return result


def describe(found: list[Prediction]) -> str:
    """A line an image and, where labels are known, how many are right."""
    lines = []
    for p in found:
        each = ", ".join(f"{shown(name)} {part:.1%}" for name, part in zip(p.classes, p.probabilities, strict=True))
        lines.append(f"{shown(p.name)}: {each}{f' (is {shown(p.label)})' if p.label else ''}")
    if any(p.label for p in found):
        right = sum(p.classes[0] == p.label for p in found)
        lines.append(f"{right} of {len(found)} are right")
    return "\n".join(lines)


def draw(found: list[Prediction], path: pathlib.Path) -> None:
    """A sheet of the images with the likeliest class of each; red where it is not the label."""
    columns = min(8, len(found))
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.5 * columns, 1.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, p in zip(axes.flat, found, strict=False):
        gray = p.pixels_HWC.shape[2] == 1
        axis.imshow(p.pixels_HWC[:, :, 0] if gray else p.pixels_HWC, cmap="gray" if gray else None, vmin=0, vmax=255)
        wrong = p.label and p.label != p.classes[0]
        title = f"{shown(p.classes[0])} {p.probabilities[0]:.0%}" + (f" (is {shown(p.label)})" if wrong else "")
        axis.set_title(title, fontsize=8, color="red" if wrong else "black", parse_math=False)
    try:
        write_with(path, lambda file: figure.savefig(file, dpi=120))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    except ValueError:
        raise UserError(f"--out={path}: matplotlib writes no {path.suffix or 'such file'}; use .png") from None
    finally:
        plt.close(figure)
