"""How fast requests are scored, in tokens a second and against `evaluate` on whole windows, and by how many programs.

    python -m benchmarks.scoring --config=quickstart:grown --out=docs/scoring.json

A model with random parameters scores requests of random ids, whose lengths are spread as those of a task of sentences:
a log-normal with a median of 64 tokens. Compiling is not counted; the two ways take turns.
"""

import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from tokenformer_jax.cli import config_flag, run_command
from tokenformer_jax.config import Config
from tokenformer_jax.data.tokens import InMemory, TokenSplit
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.devices.sharding import make_mesh
from tokenformer_jax.evaluation.perplexity import evaluate_split
from tokenformer_jax.evaluation.scoring import Scored, Scorer
from tokenformer_jax.files import json_text, local_path, replace_file
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.storage.record import Record
from tokenformer_jax.storage.trained import Trained
from tokenformer_jax.training.step import make_step

TURNS = 7


def random_model(cfg: Config) -> Trained:
    step = make_step(cfg, make_mesh(cfg.mesh))
    state = step.init(jax.random.key(0))._replace(opt_state=())
    record = Record(model=dataclasses.asdict(cfg.model), data="", batch_size=cfg.batch_size)
    return Trained(cfg, 0, record, {}, step, state, count_params(state.params))


def random_requests(cfg: Config, count: int) -> list[Scored]:
    rng = np.random.default_rng(0)
    length = cfg.model.context_length
    lengths = np.clip(rng.lognormal(np.log(64), 0.5, count), 8, length).astype(int)
    return [Scored(rng.integers(0, cfg.model.vocab_size, n + 1).tolist(), int(n // 4)) for n in lengths]


def measure(cfg: Config, count: int) -> dict[str, Any]:
    """Tokens a second of both ways, the median ratio, and the programs."""
    run, requests = random_model(cfg), random_requests(cfg, count)
    scorer = Scorer(run)
    tokens = sum(len(request.ids) - 1 for request in requests)
    stream = np.concatenate([np.array(request.ids, np.uint32) for request in requests])
    split = TokenSplit([InMemory(stream)], len(stream), 1, 0, "random")
    seconds: dict[str, list[float]] = {"score": [], "evaluate": []}
    for turn in range(TURNS + 1):  # the first compiles
        for name, function in (
            ("score", lambda: scorer.score(requests)),
            ("evaluate", lambda: evaluate_split(run.step, run.state, split, cfg)),
        ):
            began = time.perf_counter()
            function()
            seconds[name] += [time.perf_counter() - began] * bool(turn)
    counts = {"score": tokens, "evaluate": len(stream) - 1}
    speeds = {name: [counts[name] / one for one in taken] for name, taken in seconds.items()}
    ratios = [a / b for a, b in zip(speeds["score"], speeds["evaluate"], strict=True)]
    padded = sum(batch.rows * batch.length for batch in scorer.plan(requests))
    return {
        "tokens_per_second": {name: statistics.median(each) for name, each in speeds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "programs": len(scorer.shapes),
        "tokens": tokens,
        "part_that_is_no_padding": tokens / padded,
        "seconds": seconds,
    }


def main() -> None:
    config = config_flag()
    count = flags.DEFINE_integer("requests", 2000, "how many")
    out = flags.DEFINE_string("out", None, "a file for the figures")

    def benchmark() -> None:
        cfg = config()
        found = measure(cfg, count.value)
        speeds = found["tokens_per_second"]
        print(
            f"{speeds['score']:,.0f} tokens a second in {found['programs']} programs, {found['ratio']:.2f} x the "
            f"{speeds['evaluate']:,.0f} of evaluate; {found['part_that_is_no_padding']:.2f} is no padding"
        )
        if out.value:
            model = dataclasses.asdict(cfg.model)
            command = " ".join(["python -m benchmarks.scoring", *sys.argv[1:]])
            result = {"command": command, "model": model, "environment": environment()} | found
            replace_file(local_path(out.value, "--out"), json_text(result, indent=2) + "\n")

    run_command(benchmark, config)


if __name__ == "__main__":
    main()
