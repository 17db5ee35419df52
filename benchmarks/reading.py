"""How fast training batches are read: tokens in a folder, or in a bucket for the first time and again.

python -m benchmarks.reading --config=quickstart:small [--config.data.cache_dir=gs://bucket/cache] [--batches=200]

The data are prepared if they are not. Prints JSON: tokens a second, and bytes that were copied from a bucket. A GCS
emulator on the same machine, `--emulator`, stands in for the service: it takes as much CPU time as what is measured.
"""

import contextlib
import importlib
import json
import time

import numpy as np
from absl import flags

from tokenformer_jax.cli import config_flag, run_command
from tokenformer_jax.config import Config
from tokenformer_jax.data.batches import train_batches
from tokenformer_jax.data.mixture import prepare
from tokenformer_jax.data.shards import RemoteShard
from tokenformer_jax.data.tokens import TokenSplit


def measure(split: TokenSplit, cfg: Config, count: int) -> float:
    """Tokens a second of the first batches, read by one process."""
    batches = train_batches(split, cfg)
    began = time.perf_counter()
    tokens = sum(next(batches).tokens_BL.size for _ in range(count))
    return tokens / (time.perf_counter() - began)


def main() -> None:
    config = config_flag()
    count = flags.DEFINE_integer("batches", 200, "how many to read")
    emulator = flags.DEFINE_boolean("emulator", False, "start one, with the bucket of data.cache_dir (tests/)")

    def run() -> None:
        cfg = config()
        with contextlib.ExitStack() as stack:
            if emulator.value:
                emulated = importlib.import_module("tests.gcs_emulator").emulated
                stack.enter_context(emulated(cfg.data.cache_dir.split("/")[2]))
            prepare(cfg)
            split = prepare(cfg).train  # opened, with nothing copied
            figures = {"tokens_per_second": [round(measure(split, cfg, count.value)) for _ in range(3)]}
            remote = [shard for shard in split.shards if isinstance(shard, RemoteShard)]
            copied = sum(int(np.sum(shard.copied)) * 4096 for shard in remote)
            print(json.dumps(figures | {"bytes_copied": copied, "tokens": split.num_tokens}))

    run_command(run)


if __name__ == "__main__":
    main()
