"""What adapters are worth: a model of Python adapted to prose and to C, beside fine-tuning, LoRA and training anew.

nice python -m benchmarks.adapters_study --out=docs/adapters_study.json [--seeds=3] [--base_steps=1000] [--steps=300]

A small TokenFormer, and a plain Transformer of as many parameters, learn Python. Then, for each other domain and at
equal FLOPs: new tokens alone (τ ramped to the root of their number; τ kept; or with a norm of their own), LoRA of as
many parameters, all parameters of the trained model, and a new model. Each has the best of RATES, by seed 0 on prose.
Losses are in nats a token, on the same windows for all. FILE is whole after every run.
"""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import lora
from benchmarks.domains import DOMAINS, texts, token_ids
from tokenformer_jax.config import Config, read_config
from tokenformer_jax.configs import base
from tokenformer_jax.data.batches import Batch
from tokenformer_jax.data.tokenizer import train_tokenizer
from tokenformer_jax.devices.hardware import environment
from tokenformer_jax.files import replace_file
from tokenformer_jax.growth.grow import grow_state
from tokenformer_jax.nn.language import abstract_model, init_params
from tokenformer_jax.nn.layers import Params, count_params
from tokenformer_jax.nn.pattention import Pattention, pattention
from tokenformer_jax.nn.transformer import initial_tau
from tokenformer_jax.storage.adapters import append
from tokenformer_jax.training.language import train_flops_per_token
from tokenformer_jax.training.learned import learn_alone, learned, put_back
from tokenformer_jax.training.schedule import NewTokens, decayed
from tokenformer_jax.training.state import TauRamp, TrainState

BASE_RATE, WARMUP = 4e-3, 50
RATES = (1.2e-2, 3.6e-2)
BATCH, LENGTH, WINDOWS = 8, 128, 128
WIDTH, N, M = 64, 64, 16  # parameter tokens of an attention's projection, and how many an adapter adds; ffn 4 times
METHODS = ("ramped", "kept", "own", "lora", "full", "scratch")
NEW = NewTokens({"query": N, "key": N, "value": N, "out": N, "ffn": 4 * N}, step=0, alone=True)


def config(tokens: int = N, linear: bool = False) -> Config:
    tree = base.get_config()
    tree.batch_size = BATCH
    tree.model.update(vocab_size=512, context_length=LENGTH, num_layers=3, num_heads=4, embed_dim=WIDTH)
    tree.model.update(qkv_tokens=tokens, out_tokens=tokens, ffn_tokens=4 * tokens)
    if linear:  # exactly as many parameters
        tree.model.update(projection="linear", qkv_tokens=0, out_tokens=0, ffn_tokens=8 * tokens - 2 * WIDTH)
    return read_config(tree.to_dict())


class OwnNorm(nnx.Module):
    """A frozen Pattention, and another one of new tokens, which is added."""

    def __init__(self, old: Pattention, keys: jax.Array, values: jax.Array):
        self.old, self.keys, self.values = old, nnx.Param(keys), nnx.Param(values)

    def __call__(self, x: jax.Array, tau: Any, key: Any = None) -> jax.Array:
        keys, values = self.keys[...], self.values[...]
        return self.old(x, tau) + pattention(x, keys, values, math.sqrt(len(keys)))


def add_own(network: Any, tokens: Params) -> Any:
    for name, arrays in tokens.items():
        setattr(network.blocks, name, OwnNorm(getattr(network.blocks, name), **arrays))
    return network


class Method(NamedTuple):
    """A model that is in part frozen, and how it is put together."""

    cfg: Config
    build: Callable[[Params, Params], Any]  # (frozen, learns) -> the network
    tau: tuple[dict[str, float], dict[str, float]]  # at first, and after a quarter of the steps
    flops: float  # a token
    put: Callable[[Params, Params], Params] = lambda frozen, learns: frozen  # frozen, once something has learnt


def merged(cfg: Config, params: Params) -> Any:
    return nnx.merge(abstract_model(cfg.model)[0], params)


def whole(cfg: Config) -> Method:
    tau = initial_tau(cfg.model)
    return Method(cfg, lambda frozen, learns: merged(cfg, learns), (tau, tau), train_flops_per_token(cfg.model))


def of_new_tokens(ramped: bool) -> Method:
    cfg, tau = config(N + M), initial_tau(config().model)
    frozen = count_params(abstract_model(config().model)[1])

    def build(params: Params, learns: Params) -> Any:
        network = merged(cfg, params)
        learn_alone(network, learns, NEW, list(tau))
        return network

    flops = train_flops_per_token(cfg.model) - 2 * frozen
    after = initial_tau(cfg.model) if ramped else tau
    return Method(cfg, build, (tau, after), flops, lambda params, learns: put_back(params, learns, NEW))


def methods() -> dict[str, Method]:
    small, plain = config(), config(linear=True)
    frozen = count_params(abstract_model(plain.model)[1])
    more = count_params(jax.eval_shape(lambda: new_lora(jax.random.key(0))))
    return {
        "base": whole(small),
        "plain": whole(plain),
        "full": whole(small),
        "scratch": whole(small),
        "ramped": of_new_tokens(True),
        "kept": of_new_tokens(False),
        "own": of_new_tokens(False)._replace(
            cfg=small, build=lambda params, tokens: add_own(merged(small, params), tokens), put=lambda params, _: params
        ),
        "lora": Method(
            plain,
            lambda params, arrays: lora.adapt(merged(plain, params), arrays),
            ({}, {}),
            train_flops_per_token(plain.model) - 2 * frozen + 6 * more,
        ),
    }


def new_lora(key: jax.Array) -> Params:
    plain = config(linear=True).model
    new = 2 * WIDTH * plain.num_layers * sum(config(M).model.tokens.values())
    return lora.init_lora(plain, lora.rank(plain, new), key)


def begin(method: str, bases: dict[str, Params], key: jax.Array) -> tuple[Params, Params]:
    """What is frozen, and what learns."""
    small = config().model
    if method in ("base", "scratch"):
        return {}, init_params(small, key)
    if method == "plain":
        return {}, init_params(config(linear=True).model, key)
    if method == "full":
        return {}, bases["base"]
    if method == "lora":
        return bases["plain"], new_lora(key)
    if method == "own":
        drawn = init_params(config(M).model, key)["blocks"]
        return bases["base"], {
            name: {"keys": part["keys"], "values": 0 * part["values"]} for name, part in drawn.items()
        }
    ramps = {name: TauRamp.constant(value) for name, value in initial_tau(small).items()}
    state, larger = TrainState(jnp.int32(0), bases["base"], (), ramps), config(N + M).model
    abstract = state._replace(params=abstract_model(larger)[1])
    params = grow_state(state, abstract, larger, key, "zero_keys", ramp_steps=0).params
    return params, learned(params, NEW)


def batch_of(ids: np.ndarray, starts: np.ndarray) -> Batch:
    windows = np.stack([ids[start : start + LENGTH + 1] for start in starts])
    ones = np.ones((len(windows), LENGTH))
    return Batch(windows[:, :-1], windows[:, 1:], ones.astype(np.float32), ones.astype(np.int32))


class Lab:
    """The data, and what was compiled."""

    def __init__(self, base_steps: int, steps: int):
        tokenizer = train_tokenizer(texts("python"), 512)
        self.data = {domain: token_ids(domain, tokenizer) for domain in DOMAINS}
        self.methods = methods()
        self.base_steps, self.steps = base_steps, steps
        self.compiled: dict[str, Any] = {}

    def steps_of(self, method: str) -> int:
        """At equal FLOPs."""
        if method in ("base", "plain"):
            return self.base_steps
        return round(self.steps * self.methods["ramped"].flops / self.methods[method].flops)

    def step(self, method: str) -> Any:
        """Compiled: clipped AdamW as everywhere, at a rate that is given."""
        how = self.methods[method]
        adam = optax.chain(optax.scale_by_adam(0.9, 0.95), optax.add_decayed_weights(0.1, decayed))

        def train(learns: Params, frozen: Params, moments: Any, tau: Any, batch: Batch, rate: jax.Array) -> Any:
            def loss(learns: Params) -> jax.Array:
                nll, weights = how.build(frozen, learns).loss_sums(batch, tau, how.cfg)
                return nll / weights

            value, grads = jax.value_and_grad(loss)(learns)
            scale = 1 / jnp.maximum(optax.global_norm(grads), 1.0)
            updates, moments = adam.update(jax.tree.map(lambda g: g * scale, grads), moments, learns)
            learns = jax.tree.map(lambda p, u: p - rate * u, learns, updates)
            return learns, how.put(frozen, learns), moments, value

        if method not in self.compiled:
            self.compiled[method] = jax.jit(train), adam
        return self.compiled[method]

    def train(self, method: str, domain: str, start: tuple[Params, Params], rate: float, seed: int) -> Any:
        """What has learnt, with what is frozen, and the seconds of a step."""
        return self.train_in_turn([method], domain, start, rate, seed, self.steps_of(method))

    def train_in_turn(
        self, methods: list[str], domain: str, start: tuple[Params, Params], rate: float, seed: int, steps: int
    ) -> Any:
        """The same with methods that take turns."""
        (frozen, learns), compiled = start, [self.step(method) for method in methods]
        ids, rng = self.data[domain][0], np.random.default_rng(seed)
        moments = compiled[0][1].init(learns)
        times = []
        for t in range(steps):
            done = max(0.0, (t - WARMUP) / (steps - WARMUP))
            now = rate * min(t / WARMUP, 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
            part = min(1.0, 4 * t / steps)
            (train, _), (first, last) = compiled[t % len(methods)], self.methods[methods[t % len(methods)]].tau
            tau = {name: np.float32(tau + part * (last[name] - tau)) for name, tau in first.items()}
            batch = batch_of(ids, rng.integers(0, len(ids) - LENGTH - 1, BATCH))
            began = time.perf_counter()
            learns, frozen, moments, value = train(learns, frozen, moments, tau, batch, np.float32(now))
            value.block_until_ready()
            times.append(time.perf_counter() - began)
        return frozen, learns, float(np.median(times))

    def losses(self, method: str, frozen: Params, learns: Params) -> dict[str, float]:
        how = self.methods[method]
        return self.losses_of(f"{method} loss", how.cfg, how.tau[1], how.build, frozen, learns)

    def losses_with(self, method: str, tau: dict[str, float], params: Params) -> dict[str, float]:
        """Of a whole model with another τ."""
        how = self.methods[method]
        build = lambda params, tau: merged(how.cfg, params)  # noqa: E731
        return self.losses_of(f"{method} with {tau}", how.cfg, tau, build, params, {})

    def losses_of(self, name: str, cfg: Config, tau: Any, build: Any, *arrays: Params) -> dict[str, float]:
        """Of each domain."""

        def loss(batch: Batch, *arrays: Params) -> jax.Array:
            nll, weights = build(*arrays).loss_sums(batch, tau, cfg)
            return nll / weights

        if name not in self.compiled:
            self.compiled[name] = jax.jit(loss)
        found = {}
        for domain, (_, ids) in self.data.items():
            starts = np.linspace(0, len(ids) - LENGTH - 2, WINDOWS).astype(int).reshape(-1, BATCH)
            found[domain] = float(np.mean([self.compiled[name](batch_of(ids, some), *arrays) for some in starts]))
        return found

    def of_both(self, method: str, params: Params, learnt: list[Params]) -> dict[str, float]:
        """Losses of the base with the tokens of both domains."""
        if method == "own":
            small, tau = config(), initial_tau(config().model)
            both = lambda params, a, b: add_own(add_own(merged(small, params), a), b)  # noqa: E731
            return self.losses_of("own both", small, tau, both, params, *learnt)
        larger = config(N + 2 * M)
        tau = initial_tau((larger if method == "ramped" else config()).model)
        joined = lambda params, a, b: merged(larger, append(params, [a, b], larger.model.tokens))  # noqa: E731
        return self.losses_of(f"{method} both", larger, tau, joined, params, *(part["blocks"] for part in learnt))


def study(lab: Lab, seeds: int, save: Callable[[str, Any], None]) -> None:
    rates: dict[str, float] = {}
    for seed in range(seeds):
        key, bases = jax.random.key(seed), {}
        for name in ("base", "plain"):
            _, bases[name], seconds = lab.train(name, "python", begin(name, {}, key), BASE_RATE, seed)
            save(f"{name} seed {seed}", {"losses": lab.losses(name, {}, bases[name]), "step_seconds": seconds})
        learnt: dict[str, list[Params]] = {}
        for domain in DOMAINS[1:]:
            for method in METHODS:
                tried = []
                for rate in [rates[method]] if method in rates else RATES:
                    start = begin(method, bases, key)
                    frozen, learns, seconds = lab.train(method, domain, start, rate, seed)
                    losses = lab.losses(method, frozen, learns)
                    tried.append((losses[domain], rate, losses, learns))
                    run = {"losses": losses, "step_seconds": seconds, "rate": rate, "learns": count_params(learns)}
                    save(f"{method} {domain} seed {seed} rate {rate:g}", run | {"steps": lab.steps_of(method)})
                best = min(tried, key=lambda each: each[0])
                rates[method] = best[1]
                save(f"{method} {domain} seed {seed}", {"losses": best[2], "rate": best[1]})
                learnt.setdefault(method, []).append(best[3])
        for method in ("ramped", "kept", "own"):
            save(f"{method} both seed {seed}", {"losses": lab.of_both(method, bases["base"], learnt[method])})
        bits = lab.losses("base", {}, bases["base"])
        save(f"base afterwards seed {seed}", {"losses": bits})


def report(runs: dict[str, Any]) -> str:
    """Tables of means over seeds, with the lowest and the highest."""

    def cell(name: str, domain: str) -> str:
        found = [
            run["losses"][domain] for key, run in runs.items() if key.startswith(f"{name} seed") and "rate 0" not in key
        ]
        return f"{np.mean(found):.3f} ({min(found):.3f} .. {max(found):.3f})" if found else "-"

    rows = ["| what learnt | on | " + " | ".join(DOMAINS) + " |", "|---|---|" + "---|" * len(DOMAINS)]
    for on in ("python", *DOMAINS[1:], "both"):
        names = ("base", "plain", "base afterwards") if on == "python" else METHODS
        for name in names:
            cells = [cell(name if on == "python" else f"{name} {on}", domain) for domain in DOMAINS]
            if set(cells) != {"-"}:
                rows.append(f"| {name} | {on} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/adapters_study.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base_steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300, help="of new tokens; others take as many FLOPs")
    parser.add_argument("--report_only", action="store_true", help="print the tables of --out, and train nothing")
    args = parser.parse_args()
    if args.report_only:
        return print(report(json.loads(pathlib.Path(args.out).read_text())["runs"]))
    lab = Lab(args.base_steps, args.steps)
    command = (
        f"python -m benchmarks.adapters_study --seeds={args.seeds} --base_steps={args.base_steps} --steps={args.steps}"
    )
    tokens = {domain: [len(ids) for ids in both] for domain, both in lab.data.items()}
    result: dict[str, Any] = {"command": command, "environment": environment(), "tokens": tokens, "runs": {}}
    result["flops_per_token"] = {name: how.flops for name, how in lab.methods.items()}

    def save(name: str, figures: Any) -> None:
        result["runs"][name] = figures
        print(name, json.dumps(figures), flush=True)
        replace_file(pathlib.Path(args.out), json.dumps(result, indent=2) + "\n")

    study(lab, args.seeds, save)
    print(report(result["runs"]))


if __name__ == "__main__":
    main()
