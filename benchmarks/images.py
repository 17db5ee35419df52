"""Training steps on images on a device, plain ViTs and TokenFormers in turn, and what feeds them.

python -m benchmarks.images [--minutes=6] [--batch=128] [--sizes=inputs,b16,l16:64] [--out=images.json]

For each size of configs/imagenet.py: the step of the ViT, of the TokenFormer with as many parameters, and of the
paper's, in bfloat16, forward, backward, augmentations and AdamW, with batches that are on the device already. They are
compiled first and stay on the device; each round then has all of them, and ratios are medians over rounds. Then what
comes before a step: augmentations alone, on the device; decoding and cropping of photos on one core of the host. Where
memory does not suffice the batch is halved. The JSON is written after every row.
"""

import argparse
import io
import json
import os
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks.accelerator_work import is_no_memory, peak_bytes
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.configs import imagenet
from tokenformer_jax.data.image_batches import ImageBatch
from tokenformer_jax.data.pictures import center_box, decode, random_box
from tokenformer_jax.devices.hardware import give_back_memory, peak_flops
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.training.step import make_step, put_batch
from tokenformer_jax.training.tasks import task_of

Figures = dict[str, Any]
SIZES = {"b16": ("vit_b16", "b16_matched", "b16"), "l16": ("vit_l16", "l16_matched", "l16")}
ROUNDS, STEPS = 5, 10  # of each in a round
PHOTO = (500, 375)  # pixels of a common ImageNet photo


def config(variant: str, batch: int, tiny: bool, remat: str, augments: bool) -> Config:
    tree = imagenet.get_config(variant)
    tree.update(batch_size=batch)
    tree.model.remat = remat
    if tiny:
        tokens = {"qkv_tokens": 32, "out_tokens": 32} if tree.model.projection == "pattention" else {}
        tree.model.update(num_layers=2, embed_dim=64, num_heads=2, image_size=32, ffn_tokens=128, **tokens)
    if not augments:
        tree.augment.update(rand_augment_layers=0, erasing=0.0, mixup=0.0, cutmix=0.0, flip=False)
    return read_config(tree.to_dict())


def random_batch(cfg: Config) -> ImageBatch:
    rng, size = np.random.default_rng(0), cfg.model.image_size
    pixels = rng.integers(0, 256, (cfg.batch_size, size, size, 3), np.uint8)
    labels = rng.integers(0, cfg.model.num_classes, (cfg.batch_size, 1)).astype(np.int32)
    return ImageBatch(pixels, labels, np.ones((cfg.batch_size, 1), np.float32))


class Entrant:
    """A model on the device, with its step compiled."""

    def __init__(self, cfg: Config):
        task, mesh = task_of(cfg), make_mesh(cfg.mesh)
        self.step, self.batch_size = make_step(cfg, mesh), cfg.batch_size
        began = time.monotonic()
        self.state = self.step.init(jax.random.key(0))
        self.batch = put_batch(self.step, random_batch(cfg))
        compiled = self.step.train.lower(self.state, self.batch).compile()
        self.figures: Figures = {
            "batch": cfg.batch_size,
            "parameters": count_params(self.state.params),
            "flops_per_image": task.train_flops_per_token(cfg.model) * cfg.model.positions,
            "compile_seconds": time.monotonic() - began,
            "temporary_bytes": int(getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)),
            "state_bytes": sum(x.nbytes for x in jax.tree.leaves(self.state)),
        }
        self.seconds: list[float] = []
        self.run(2)
        self.seconds.clear()

    def run(self, steps: int) -> None:
        began = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step.train(self.state, self.batch)
        loss = float(jax.block_until_ready(metrics["loss"]))
        self.seconds.append((time.perf_counter() - began) / steps)
        self.figures["loss"] = loss

    def summary(self) -> Figures:
        seconds = statistics.median(self.seconds)
        rate, peak = self.batch_size / seconds, peak_flops(1)
        flops = rate * self.figures["flops_per_image"]
        return self.figures | {
            "rounds": self.seconds,
            "seconds_a_step": seconds,
            "images_per_second": rate,
            "model_flops_per_second": flops,
            "mfu": flops / peak if peak else None,
            "peak_bytes_so_far": peak_bytes(),
        }


def measure_size(size: str, arguments: Any, deadline: float, write: Any) -> Figures:
    """All of a size in turn; halves the batch where memory does not suffice."""
    size, _, own = size.partition(":")
    batch = int(own or arguments.batch)
    while True:
        try:
            return measure_at(size, batch, arguments, deadline, write)
        except Exception as error:
            if not is_no_memory(error) or batch == 1:
                raise
            print(f"{size}: not enough memory for {batch} images, now {batch // 2}", flush=True)
            batch //= 2
        give_back_memory()


def measure_at(size: str, batch: int, arguments: Any, deadline: float, write: Any) -> Figures:
    found: Figures = {"rows": {}, "ratios": {}}
    entrants: dict[str, Entrant] = {}
    for name in SIZES[size]:
        if time.monotonic() > deadline:
            break
        entrants[name] = Entrant(config(name, batch, arguments.tiny, arguments.remat, not arguments.plain))
        print(f"{name}: compiled in {entrants[name].figures['compile_seconds']:.1f} s", flush=True)
    for number in range(ROUNDS):
        if number and time.monotonic() > deadline:
            break
        for name, entrant in entrants.items():
            entrant.run(1 if arguments.tiny else STEPS)
            found["rows"][name] = entrant.summary()
        write(size, found)
    first = next(iter(entrants), "")
    for name, entrant in entrants.items():
        pairs = zip(entrants[first].seconds, entrant.seconds, strict=False)
        ratio = statistics.median(theirs / own for theirs, own in pairs)
        found["ratios"][f"{name}_over_{first}"] = ratio
        row = found["rows"][name]
        of_peak = f", {row['mfu']:.1%} of the peak" if row["mfu"] else ""
        print(
            f"{name}: {row['parameters'] / 1e6:.1f}M parameters, {row['batch']} images, "
            f"{row['seconds_a_step'] * 1e3:.1f} ms a step, {row['images_per_second']:,.0f} images/s{of_peak}, "
            f"{(row['temporary_bytes'] + row['state_bytes']) / 1e9:.1f} GB of state and step, "
            f"{ratio:.3f} of {first}'s images/s",
            flush=True,
        )
    write(size, found)
    return found


def measure_inputs(arguments: Any) -> Figures:
    """Augmentations alone on the device, and decoding on a core."""
    cfg = config("b16", arguments.batch, arguments.tiny, "none", True)
    task, step = task_of(cfg), make_step(cfg, make_mesh(cfg.mesh))
    batch = put_batch(step, random_batch(cfg))
    augment = jax.jit(lambda batch, number: task.augmented(batch, cfg, number))
    number = jax.numpy.int32(0)
    jax.block_until_ready(augment(batch, number))
    began = time.perf_counter()
    jax.block_until_ready([augment(batch, number) for _ in range(5)][-1])
    augmented = 5 * cfg.batch_size / (time.perf_counter() - began)
    photo = Image.fromarray(photo_like(*PHOTO))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=90)
    rng, count = np.random.default_rng(0), 20 if arguments.tiny else 200
    rates = {}
    boxes: dict[str, Any] = {
        "random crop": lambda shape: random_box(shape, 0.08, rng),
        "center": lambda shape: center_box(shape, 0.875),
    }
    for name, box in boxes.items():
        began = time.perf_counter()
        for _ in range(count):
            decode(file.getvalue(), 224, 3, box)
        rates[name] = count / (time.perf_counter() - began)
    print(
        f"augmentations on the device: {augmented:,.0f} images/s; decoding {PHOTO[0]} x {PHOTO[1]} JPEGs of "
        f"{len(file.getvalue()) / 1e3:.0f} kB on one core: {rates['random crop']:,.0f} images/s (random crops), "
        f"{rates['center']:,.0f} (center); {os.cpu_count()} cores",
        flush=True,
    )
    return {
        "augmented_images_per_second": augmented,
        "decoded_images_per_second_a_core": rates,
        "jpeg_bytes": len(file.getvalue()),
        "cores": os.cpu_count(),
    }


def photo_like(width: int, height: int) -> np.ndarray:
    """A picture whose JPEG is about as large as a photo's: blurred noise of several sizes."""
    rng, total = np.random.default_rng(0), np.zeros((height, width, 3))
    for grain in (2, 8, 32):
        small = rng.integers(0, 256, (height // grain + 1, width // grain + 1, 3), np.uint8)
        total += np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)) * grain**0.5
    return (total / total.max() * 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="nothing new begins after these")
    parser.add_argument("--batch", type=int, default=128, help="images a step")
    parser.add_argument("--sizes", default="inputs,b16,l16:64", help="of configs/imagenet.py, with images a step")
    parser.add_argument("--remat", default="none", help="config.model.remat of all")
    parser.add_argument("--plain", action="store_true", help="without augmentations on the device")
    parser.add_argument("--tiny", action="store_true", help="small models, to see whether it runs")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("images.json"))
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    found: Figures = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "batch": arguments.batch,
        "remat": arguments.remat,
        "augments": not arguments.plain,
    }

    def write(key: str, figures: Figures) -> None:
        found[key] = figures
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")

    print(f"{found['device']}, jax {found['jax']}", flush=True)
    for size in arguments.sizes.split(","):
        if size == "inputs":
            write(size, measure_inputs(arguments))
        elif time.monotonic() < deadline:
            try:
                measure_size(size, arguments, deadline, write)
            except Exception as error:  # the other size may do
                write(size, {"failed": f"{type(error).__name__}: {error}"[:600]})
                print(f"{size}: failed: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        give_back_memory()


if __name__ == "__main__":
    main()
