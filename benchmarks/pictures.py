"""What comes before a training step on pictures: decoding on the host, and augmentations on the device.

python -m benchmarks.pictures [--rows=32]

Rates are images per second of CPU time, the best of three, so that other work on the machine counts for little; on a
device that is not the CPU, augmentations are timed by the clock.
"""

import argparse
import dataclasses
import io
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import matplotlib
import numpy as np
from PIL import Image

from tokenformer_jax.data.augment import augment
from tokenformer_jax.data.pictures import Box, center_box, decode, random_box
from tokenformer_jax.image_config import UNCHANGED, AugmentConfig

PHOTO = (500, 375)  # pixels of a common ImageNet photo
RECIPE = AugmentConfig(flip=True, rand_augment_layers=2, erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
PARTS = {
    "all": RECIPE,
    "RandAugment": dataclasses.replace(UNCHANGED, rand_augment_layers=2),
    "erasing": dataclasses.replace(UNCHANGED, erasing=0.25),
    "Mixup and CutMix": dataclasses.replace(UNCHANGED, mixup=0.8, cutmix=1.0),
}


def rate(count: int, work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Of `count` images that `work` makes, those a second."""
    seconds = []
    for _ in range(3):
        began = clock()
        work()
        seconds.append(clock() - began)
    return count / min(seconds)


def jpeg() -> bytes:
    """A photo that matplotlib brings along."""
    path = pathlib.Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    file = io.BytesIO()
    Image.open(path).convert("RGB").resize(PHOTO, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
    return file.getvalue()


def decoded(file: bytes, size: int, smallest_crop: float) -> float:
    rng = np.random.default_rng(0)

    def choose(shape: tuple[int, int]) -> Box:
        return random_box(shape, smallest_crop, rng) if smallest_crop else center_box(shape, 0.875)

    return rate(200, lambda: [decode(file, size, 3, choose) for _ in range(200)], time.process_time)


def augmented(cfg: AugmentConfig, size: int, rows: int) -> float:
    pixels = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3)).astype(np.uint8)
    images, labels = jax.device_put((pixels, np.zeros(rows, np.int32)))
    made = jax.jit(lambda rng, images, labels: augment(rng, images, labels, cfg, 10))
    jax.block_until_ready(made(jax.random.key(0), images, labels))
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    return rate(rows, lambda: jax.block_until_ready(made(jax.random.key(1), images, labels)), clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="images of 224 x 224 a batch; of 32 x 32, 8 times as many")
    rows, file = parser.parse_args().rows, jpeg()
    print(f"a JPEG of {PHOTO[0]} x {PHOTO[1]} pixels, {len(file) / 1e3:.0f} kB, on one core:")
    for size in (224, 112, 32):
        center, crops = (decoded(file, size, smallest) for smallest in (0.0, 0.08))
        print(f"  to {size:3}: {center:6,.0f} images/s of their center, {crops:6,.0f} of random crops", flush=True)
    for size, batch in ((32, 8 * rows), (224, rows)):
        print(f"augmentations at {size} x {size} on {jax.devices()[0].device_kind}:")
        for name, cfg in PARTS.items():
            print(f"  {name:18}{augmented(cfg, size, batch):10,.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
