"""One nested model beside a model of each size, and beside a large one that was shrunk, at equal FLOPs in all.

nice python -m benchmarks.nested_study --out=docs/nested_study.json [--seeds=3] [--steps=3000]

The nested model trains a quarter, a half and all of its tokens in turn. Three models of these sizes share its FLOPs,
a third each; and the largest size alone takes all of them, and is shrunk to the others without more training. Each has
the best of RATES by seed 0. Text, losses and optimizer are those of `adapters_study`.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.adapters_study import Lab, Method, config, merged, whole
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.files import replace_file
from tokenformer_jax.growth.shrink import shrink_state
from tokenformer_jax.nn.language import init_params
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.training.nested import cut
from tokenformer_jax.training.state import TauRamp, TrainState

RATES = (1e-3, 2e-3, 4e-3, 7e-3, 1.2e-2)
COUNTS = (16, 32, 64)  # parameter tokens of an attention's projection


def of_size(count: int) -> Method:
    """The largest model's first tokens."""
    cfg, tau = config(COUNTS[-1]), initial_tau(config(count).model)
    size = config(count).model
    return whole(config(count))._replace(
        cfg=cfg, build=lambda frozen, learns: merged(cfg, cut(learns, size)), tau=(tau, tau)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/nested_study.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="of the nested model")
    args = parser.parse_args()
    lab = Lab(args.steps, args.steps)
    lab.methods |= {f"at {n}": of_size(n) for n in COUNTS} | {f"own {n}": whole(config(n)) for n in COUNTS}
    flops = {n: lab.methods[f"own {n}"].flops for n in COUNTS}
    third = args.steps / 3 * sum(flops.values()) / 3
    command = f"python -m benchmarks.nested_study --steps={args.steps}"
    result: dict[str, Any] = {"command": command, "environment": environment(), "flops_per_token": flops, "runs": {}}

    def save(name: str, figures: Any) -> None:
        result["runs"][name] = figures
        print(name, json.dumps(figures), flush=True)
        replace_file(pathlib.Path(args.out), json.dumps(result, indent=2) + "\n")

    def run(name: str, seed: int, rate: float) -> tuple[float, Any, dict[str, float]]:
        """The loss that counts, the parameters, and the losses of all sizes."""
        kind, _, count = name.partition(" ")
        key = jax.random.key(seed)
        if kind == "nested":
            methods, steps = [f"at {n}" for n in COUNTS], args.steps
            start: Any = ({}, init_params(config(COUNTS[-1]).model, key))
        else:
            n = int(count or COUNTS[-1])
            methods, steps = [f"own {n}"], round((third if count else 3 * third) / flops[n])
            start = ({}, init_params(config(n).model, key))
        _, params, _ = lab.train_in_turn(methods, "python", start, rate, seed, steps)
        losses = {method: lab.losses(method, {}, params)["python"] for method in methods}
        return sum(losses.values()) / len(losses), params, losses

    rates: dict[str, float] = {}
    for seed in range(args.seeds):
        for name in ("nested", *(f"own {n}" for n in COUNTS), "shrunk"):
            tried = [(*run(name, seed, rate), rate) for rate in ([rates[name]] if name in rates else RATES)]
            _, params, losses, rates[name] = min(tried, key=lambda each: each[0])
            if name == "shrunk":
                for n in COUNTS[:-1]:
                    ramps = {k: TauRamp.constant(v) for k, v in initial_tau(config(COUNTS[-1]).model).items()}
                    state = shrink_state(TrainState(jnp.int32(0), params, (), ramps), config(n).model, 0)
                    tau = state.tau_values()
                    losses[f"shrunk {n}"] = lab.losses_with(f"own {n}", tau, state.params)["python"]
            save(f"{name} seed {seed}", {"losses": losses, "rate": rates[name]})


if __name__ == "__main__":
    main()
