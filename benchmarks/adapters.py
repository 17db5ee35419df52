"""A training step of new tokens alone: time and memory beside training all, and beside LoRA on a plain Transformer.

python -m benchmarks.adapters [--presets=pile:150m,pile:450m,ladder:1b4] [--batch=8] [--minutes=10] [--out=FILE]

No data are needed: tokens are random. Contenders, each a process of its own that has the device alone, take turns:

    full    all parameters of a TokenFormer of the preset's size with --part more parameter tokens
    new     the same model, whose new tokens learn alone, as after `grow --train=new`
    plain   all parameters of a plain Transformer of as many parameters as the preset's model
    lora    the same Transformer frozen, with LoRA on all its weight matrices, of as many parameters as the new tokens

Where memory does not suffice, a row says so. Memory is the most that jax held of the device, or a process of a CPU; and
what the compiler plans, arguments and temporaries. After every row FILE is whole; what --minutes leaves no time for is
left out. On a CPU: --presets=quickstart:small --batch=4.

With --topology=h100:1 (and requirements-gpu.txt) nothing runs: each step is compiled for a device that need not be
there, and a row says what it would hold, and the least times that it takes.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

CONTENDERS = ("full", "new", "plain", "lora")
SECONDS = 3.0  # of steps that are timed, about
ASKED = ("batch", "part", "dtype", "remat", "topology")


def config(preset: str, linear: bool, args: argparse.Namespace) -> tuple[Any, Any]:
    """The config of a preset on one device, and its model with more parameter tokens."""
    from tokenformer_jax.config import read_config

    name, _, variant = preset.partition(":")
    module = importlib.import_module(f"tokenformer_jax.configs.{name}")
    tree = module.get_config(variant) if variant else module.get_config()
    tree.update(batch_size=args.batch, accumulation=1, steps=1000, rungs=())
    tree.optimizer.warmup_steps = 10
    tree.mesh.update(slice=1, data=1, fsdp=1, tensor=1)
    tree.model.dtype = args.dtype or tree.model.dtype
    tree.model.remat = args.remat or tree.model.remat
    model = tree.model
    grown = {
        size: model[size] + new_tokens(model[size], args.part) for size in ("qkv_tokens", "out_tokens", "ffn_tokens")
    }
    if linear:  # exactly as many parameters
        hidden = 3 * model.qkv_tokens + model.out_tokens + model.ffn_tokens - 2 * model.embed_dim or 4 * model.embed_dim
        model.update(projection="linear", qkv_tokens=0, out_tokens=0, ffn_tokens=hidden)
        return read_config(tree.to_dict()), None
    small = read_config(tree.to_dict())
    model.update(grown)
    return read_config(tree.to_dict()), small.model


def new_tokens(count: int, part: float) -> int:
    """A multiple of 16, which suits a GPU's matrix units."""
    return max(16, round(part * count / 16) * 16)


def new_parameters(args: argparse.Namespace) -> int:
    cfg, small = config(args.preset, False, args)
    more = sum(cfg.model.tokens.values()) - sum(small.tokens.values())
    return 2 * more * small.num_layers * small.embed_dim


def tokenformer_step(args: argparse.Namespace) -> Any:
    """(step of a state and a batch, state, batch, parameters, of these learn)."""
    import jax

    from benchmarks.step_time import random_batch
    from tokenformer_jax.devices.sharding import make_mesh
    from tokenformer_jax.nn.layers import count_params
    from tokenformer_jax.training.schedule import new_tokens
    from tokenformer_jax.training.step import make_step, put_batch

    cfg, small = config(args.preset, args.work == "plain", args)
    new = None
    if args.work == "new":
        new = new_tokens(cfg, {"step": 0, "from": small.tokens, "to": cfg.model.tokens, "train": "new"})
    step = make_step(cfg, make_mesh(cfg.mesh), new_tokens=new)
    state, batch = step.init(jax.random.key(0)), put_batch(step, random_batch(cfg))
    program = step.train.lower(step.abstract_state, batch).compile()
    return program, state, batch, count_params(step.abstract_state.params), count_params(step.learned)


def lora_parts(args: argparse.Namespace, devices: Any = None) -> Any:
    """(config, plain step, init of a state, training step) of a plain Transformer with LoRA; clipped AdamW, as ours."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from benchmarks.lora import adapt, init_lora, rank
    from tokenformer_jax.devices.sharding import make_mesh
    from tokenformer_jax.nn.language import abstract_model, init_params
    from tokenformer_jax.training.schedule import learning_rate, make_optimizer
    from tokenformer_jax.training.step import clipped_update, make_step, mean_gradients

    cfg, _ = config(args.preset, True, args)
    plain = make_step(cfg, make_mesh(cfg.mesh, devices))
    graphdef = abstract_model(cfg.model)[0]
    optimizer = make_optimizer(cfg.optimizer, learning_rate(cfg.optimizer, cfg.steps))
    of_lora = rank(cfg.model, new_parameters(args))

    def init(key: jax.Array) -> Any:
        lora = init_lora(cfg.model, of_lora, key)
        return init_params(cfg.model, key), lora, optimizer.init(lora)

    def train(state: Any, batch: Any) -> Any:
        params, lora, opt_state = state

        def loss(lora: Any, tau: Any, batch: Any, key: Any) -> Any:
            return adapt(nnx.merge(graphdef, params), lora).loss_sums(batch, tau, cfg, key)

        mean, grads = mean_gradients([loss], 0, lora, {}, batch, None, 1)
        norm, clip = optax.global_norm(grads), cfg.optimizer.clip_norm
        learnt = clipped_update(optimizer, clip, None, norm, jnp.int32(0), lora, opt_state, grads)
        return (params, *learnt), {"loss": mean}

    return cfg, plain, init, jax.jit(train, donate_argnums=0)


def lora_step(args: argparse.Namespace) -> Any:
    import jax

    from benchmarks.step_time import random_batch
    from tokenformer_jax.nn.layers import count_params
    from tokenformer_jax.training.step import put_batch

    cfg, plain, init, train = lora_parts(args)
    with jax.set_mesh(plain.mesh):
        state, batch = jax.jit(init)(jax.random.key(0)), put_batch(plain, random_batch(cfg))
        program = train.lower(state, batch).compile()
    return program, state, batch, count_params(state[:2]), count_params(state[1])


def planned(args: argparse.Namespace) -> dict[str, Any]:
    """A contender's row for a device that need not be there."""
    import jax

    from tokenformer_jax.devices.sharding import MESH_AXES, replicated, with_shardings
    from tokenformer_jax.nn.layers import count_params
    from tokenformer_jax.planning.hlo import read_program
    from tokenformer_jax.planning.plan import compile_step, costs, devices_of, lower_step
    from tokenformer_jax.training.tasks import task_of

    jax.config.update("jax_platforms", "cpu")
    devices, chip = devices_of(args.topology)
    if args.work == "lora":
        cfg, plain, init, train = lora_parts(args, devices)
        state = jax.eval_shape(init, jax.random.key(0))
        state = with_shardings(state, jax.tree.map(lambda _: replicated(plain.mesh), state))
        with jax.set_mesh(plain.mesh):
            lowered = train.lower(state, task_of(cfg).abstract_batch(cfg, plain.batch))
        params, learn = count_params(state[:2]), count_params(state[1])
        flops = task_of(cfg).train_flops_per_token(cfg.model) - 2 * (params - learn) + 4 * learn
    else:
        cfg, small = config(args.preset, args.work == "plain", args)
        before = dataclasses.replace(cfg, model=small) if args.work == "new" else None
        cfg = dataclasses.replace(cfg, grow=dataclasses.replace(cfg.grow, train="new" if before else "all"))
        lowered, step = lower_step(cfg, devices, before)
        params, learn = count_params(step.abstract_state.params), count_params(step.learned)
        flops = step.flops_per_token
    sizes, text = compile_step(lowered)
    model_flops = task_of(cfg).tokens_per_step(cfg) / len(devices) * flops
    found = costs(read_program(text, {axis: getattr(cfg.mesh, axis) for axis in MESH_AXES}), cfg, chip, model_flops)
    return {
        "params": params,
        "learned_params": learn,
        "planned_bytes": int(sizes.argument_size_in_bytes + sizes.temp_size_in_bytes),
        "model_flops": model_flops,
        "least_seconds": found["seconds"],
        "device": args.topology,
    }


def work(args: argparse.Namespace) -> dict[str, Any]:
    """A contender's process: its row."""
    import jax

    from benchmarks.accelerator_work import peak_bytes

    began = time.perf_counter()
    step, state, batch, params, learned = (lora_step if args.work == "lora" else tokenformer_step)(args)
    compiled, peak_before = time.perf_counter() - began, peak_bytes()
    state, metrics = step(state, batch)
    losses = [float(metrics["loss"])]

    def seconds(count: int) -> float:
        nonlocal state, metrics
        began = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - began) / count

    count = max(2, min(50, round(SECONDS / seconds(2))))
    took = seconds(count)
    plan, cost = step.memory_analysis(), step.cost_analysis() or {}
    return {
        "params": params,
        "learned_params": learned,
        "step_seconds": took,
        "steps": count,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": peak_before,  # the first step: where it is as large, the peak is not of the steps
        "planned_bytes": plan and int(plan.argument_size_in_bytes + plan.temp_size_in_bytes),
        "compiler_flops": cost.get("flops"),
        "losses": [*losses, float(metrics["loss"])],
        "start_seconds": compiled,
        "device": jax.devices()[0].device_kind,
    }


def row_of(preset: str, contender: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """What a process makes of it, or why there is nothing."""
    said = [f"--{name}={getattr(args, name)}" for name in ASKED]
    command = [sys.executable, "-m", "benchmarks.adapters", f"--work={contender}", f"--preset={preset}", *said]
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than the {limit:.0f} s left"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    why = next((line for line in lines if "RESOURCE_EXHAUSTED" in line), lines[-1] if lines else "")
    return {"error": why[:300]}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each preset and contender, and these as parts of training all, or of the plain Transformer's."""
    found: dict[str, Any] = {}
    for row in rows:
        if "error" not in row:
            found.setdefault(row["preset"], {}).setdefault(row["contender"], []).append(row)
    for contenders in found.values():
        for name, each in contenders.items():
            measured = [key for key in ("step_seconds", "peak_bytes") if key in each[0]]
            medians = {key: statistics.median(row[key] for row in each) for key in measured}
            contenders[name] = {key: each[0][key] for key in ("params", "learned_params", "planned_bytes")} | medians
        for name, whole in (("new", "full"), ("lora", "plain"), ("full", "plain")):
            if name in contenders and whole in contenders:
                contenders[f"{name}_over_{whole}"] = {
                    key: contenders[name][key] / contenders[whole][key]
                    for key in ("step_seconds", "peak_bytes", "planned_bytes")
                    if key in contenders[name]
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="pile:150m")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--part", type=float, default=1 / 16, help="new tokens, as a part of each projection's")
    parser.add_argument("--dtype", default="", help="float32 or bfloat16; by default the preset's")
    parser.add_argument("--remat", default="", help="none, dots, projections or full; by default the preset's")
    parser.add_argument("--topology", default="", help="plan for one such device, such as h100:1, and run nothing")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", default="adapters.json")
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--preset", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        with contextlib.redirect_stdout(sys.stderr):
            row = planned(args) if args.topology else work(args)
        return print(json.dumps(row))

    from tokenformer_jax.files import replace_file

    end = time.monotonic() + 60 * args.minutes
    asked = {name: getattr(args, name) for name in (*ASKED, "presets", "rounds", "minutes")}
    result: dict[str, Any] = {"command": asked, "rows": [], "left_out": []}
    turns = [
        (round_number, preset, contender)
        for round_number in range(args.rounds)
        for preset in args.presets.split(",")
        for contender in args.contenders.split(",")
    ]
    for round_number, preset, contender in turns:
        if (left := end - time.monotonic()) < 20:
            result["left_out"].append([round_number, preset, contender])
        else:
            row = row_of(preset, contender, args, left)
            result["rows"].append({"preset": preset, "contender": contender, "round": round_number} | row)
            print(json.dumps(result["rows"][-1]), flush=True)
        result["summary"] = summary(result["rows"])
        replace_file(pathlib.Path(args.out), json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["summary"], indent=2))


if __name__ == "__main__":
    main()
