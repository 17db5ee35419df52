"""All that is to be known of one accelerator, in minutes: its ceilings, the laws on it, and how fast we are there.

python -m benchmarks.accelerator [--minutes=8] [--parts=a,c:124m,…] [--size=full|tiny] [--out=docs/accelerator.json]

    a  the device, and what it can do at most: bfloat16 products, copies, reads
    b  laws on the device (`accelerator_laws.py`); they are checked while the first of (c) compiles
    c  the training step of a rung of the ladder, bfloat16, context 1024: ours, PyTorch's under torch.compile, and our
       plain Transformer's of as many parameters; c:124m, c:1b4_mesh, c:354m_mesh, and c:124m_variants of ours
    d  prompts and next tokens, at batch 1 and 64; d:124m, d:1b4_mesh
    e  from a command to the first step, without and with compiled programs at hand; a save; growth
    f  what `plan` predicts, beside what (c) measured

A letter alone stands for all its parts; (a) is always done. The most valuable come first. Each has an estimate, and is
passed over, which the JSON says, where less time is left than that. What fails is recorded with its last line, and the
next part goes on. The JSON is written anew after every figure; what failing processes said last is beside it, in a
.log. Nothing here needs a GPU but to be worth its while: --size=tiny runs on a CPU. Everything on the device is done by
processes of their own (`accelerator_work.py`), which end with their part.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.accelerator_run import Clock, FailedError, Part, Run, alone, collect, run_parts
from benchmarks.accelerator_step import STEPS, measure_step, step_line
from benchmarks.accelerator_work import Figures

# (a)


def measure_device(run: Run) -> None:
    alone(run, "a", "device", 90, tiny=run.tiny)
    found = run.part("a")
    run.say(
        f"{found['kind']}: {found['matrix_flops_per_second'] / 1e12:.3g} TFLOP/s, "
        f"{found['copy_bytes_per_second'] / 1e12:.3g} TB/s copied, {found['read_bytes_per_second'] / 1e12:.3g} read"
    )


# (b)

# With the pass that orders scatters jax 0.11.2 failed to compile the step.
IN_ORDER = "--xla_gpu_deterministic_ops=true --xla_gpu_enable_scatter_determinism_expander=false"
EXACTLY = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {IN_ORDER}"}
SOME_LAWS = ["golden_pattention_l2_norm_gelu", "golden_lm_2layer", "growth"]  # which tiny has time for
LAWS_SECONDS = 60.0  # after which the steps' measurement no longer waits for them


def begin_laws(run: Run, known: tuple[str, ...] = ()) -> None:
    """Those not yet known, in two processes: XLA's flags are for a whole one."""
    if "b" not in run.beside:
        names = SOME_LAWS if run.tiny else None
        laws = run.launch("laws", names=names, known=known, tiny=run.tiny)
        run.beside["b"] = laws, run.clock.now()
        if "resume_exactly" not in known:
            exactly = run.launch("laws", EXACTLY, names=["resume_exactly"], known=(), tiny=run.tiny)
            run.beside["b:exactly"] = exactly, run.clock.now()


def finish_laws(run: Run) -> None:
    """Waits for what the workers find; nothing where that was done already."""
    problems = []
    for key in [key for key in run.beside if key.startswith("b")]:
        worker, began = run.beside.pop(key)
        try:
            collect(run, worker, "b", max(1.0, began + LAWS_SECONDS - run.clock.now()), "laws")
        except FailedError as error:
            problems.append(str(error))
        finally:
            run.stop(worker)
    if problems:
        run.add("b", {"problems": run.part("b").get("problems", []) + problems})


def check_laws(run: Run) -> None:
    found = run.part("b")
    if "laws" not in found or "problems" in found:  # once more, what is missing
        begin_laws(run, tuple(found.get("laws", {})))
        finish_laws(run)
    laws = found.get("laws", {})
    broken = [name for name, law in laws.items() if not law["holds"]]
    run.add("b", {"held": len(laws) - len(broken), "broken": broken})
    run.say(f"{found['held']} laws hold; broken: {', '.join(broken) or 'none'}")
    if not laws:
        raise FailedError("; ".join(found["problems"]))


# (c)


def measure_first_step(run: Run, name: str) -> None:
    """With laws and plans beside it while it compiles, which leaves cores to spare."""
    if "b" in run.wanted:
        begin_laws(run)
    if "f" in run.wanted:
        begin_plan(run)
    measure_step(run, f"c:{name}", STEPS[name], before=finish_laws)


# (d)


def measure_decoding(run: Run, part: str, size: str, batches: list[int], prompt: int, new: int) -> None:
    worker = run.launch("decode", size=size, batches=batches, prompt=prompt, new=new)
    device = run.part("a")

    def put(figures: Figures) -> None:
        """With the bounds: all parameters as `generate` keeps them, and the cache filled so far, read once a token."""
        for batch in map(str, batches):
            one = figures.get(batch)
            if not one or not device.get("copy_bytes_per_second"):
                continue
            if "prefill_tokens_per_second" in one:
                rate = one["prefill_tokens_per_second"] / (int(batch) * prompt) * one["prompt_flops"]
                one["prefill_share_of_matrix_rate"] = rate / device["matrix_flops_per_second"]
            for way in ("generate", "loop"):
                if f"{way}_tokens_per_second" in one:
                    read = (
                        one[f"{way}_tokens_per_second"] / int(batch) * (figures["parameter_bytes"] + one["cache_bytes"])
                    )
                    one[f"{way}_share_of_copy_rate"] = read / device["copy_bytes_per_second"]
                    one[f"{way}_share_of_read_rate"] = read / device["read_bytes_per_second"]
        run.add(part, figures | {"size": size})

    put(worker.ask(None, run.limit(150), put))


# (e)


def measure_waits(run: Run, size: str, grown: str, batch: int) -> None:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(run.folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    for name in ("cold", "warm"):
        began = time.monotonic()
        worker = run.launch("train_jax", cache, size=size, projection="pattention", batch=batch, overrides={})
        told = worker.ask(None, run.limit(150))
        told |= worker.ask({"do": "start"}, run.limit(60))
        figures = {"to_first_step_seconds": time.monotonic() - began}
        run.stop(worker)
        figures |= {key: told[key] for key in ("import_seconds", "compile_seconds", "start_seconds")}
        run.add("e", {name: figures})
    alone(run, "e", "save", 150, "save_and_growth", size=size, grown=grown, rounds=1 if run.tiny else 2)


# (f)


def begin_plan(run: Run) -> None:
    """In the background, since it needs cores and no device."""
    if "f" not in run.beside:
        sizes = ("tiny",) if run.tiny else ("124m", "1b4_mesh", "354m_mesh")
        steps = [
            {
                "name": f"{size} {name}",
                "size": STEPS[size].size,
                "projection": contender.projection,
                "batch": STEPS[size].batch,
                "overrides": contender.overrides,
            }
            for size in sizes
            for name, contender in STEPS[size].contenders.items()
            if not contender.torch
        ]
        worker = run.launch("plan", {"JAX_PLATFORMS": "cpu"}, steps=steps, topology="h100:1")
        run.beside["f"] = worker, run.clock.now()


def compare_plan(run: Run) -> None:
    begin_plan(run)
    worker, _ = run.beside.pop("f")
    try:
        collect(run, worker, "f", 150, "predicted")
    finally:
        run.stop(worker)
        compared = {}
        for name, predicted in run.part("f").get("predicted", {}).items():
            size, _, contender = name.partition(" ")
            part = run.results["parts"].get(f"c:{size}", {})
            measured = part.get("contenders", {}).get(contender, {})
            if "seconds_a_step" not in measured:
                continue
            share = measured["batch"] / predicted["batch"]
            compared[name] = {
                "by": predicted["by"],
                "predicted_seconds": predicted["seconds"] * share,
                "measured_seconds": measured["seconds_a_step"],
                "measured_over_predicted_seconds": measured["seconds_a_step"] / (predicted["seconds"] * share),
            }
            if share == 1 and measured.get("peak_bytes"):
                compared[name] |= {
                    "predicted_bytes": predicted["bytes"],
                    "measured_bytes": measured["peak_bytes"],
                    "measured_over_predicted_bytes": measured["peak_bytes"] / predicted["bytes"],
                }
        run.add("f", {"compared": compared})


def all_parts(tiny: bool) -> list[Part]:
    """In order, with what each takes on an H100."""

    def step(name: str, estimate: float) -> Part:
        return Part(f"c:{name}", estimate, lambda run: measure_step(run, f"c:{name}", STEPS[name]))

    def decoding(name: str, estimate: float, *how: Any) -> Part:
        return Part(f"d:{name}", estimate, lambda run: measure_decoding(run, f"d:{name}", name, *how))

    if tiny:
        return [
            Part("a", 1, measure_device),
            Part("c:tiny", 2, lambda run: measure_first_step(run, "tiny")),
            Part("b", 1, check_laws),
            decoding("tiny", 1, [2], 16, 8),
            Part("e", 1, lambda run: measure_waits(run, "tiny", "tiny_grown", 4)),
            Part("f", 1, compare_plan),
        ]
    return [
        Part("a", 20, measure_device),
        Part("c:124m", 70, lambda run: measure_first_step(run, "124m")),
        step("1b4_mesh", 80),
        decoding("124m", 40, [1, 64], 512, 128),
        Part("b", 30, check_laws),
        step("354m_mesh", 70),
        Part("e", 60, lambda run: measure_waits(run, "124m", "354m_mesh", 32)),
        Part("f", 5, compare_plan),
        decoding("1b4_mesh", 40, [1, 64], 512, 128),
        step("124m_variants", 50),
    ]


def chosen(parts: list[Part], names: str) -> list[Part]:
    """By name or letter, in the order in which they are worth most; the device, to which others refer, always."""
    wanted = [name for name in names.split(",") if name]
    known = {part.name for part in parts} | {part.name[0] for part in parts}
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"--parts={names}: {unknown[0]} is none of {', '.join(sorted(known))}")
    return [part for part in parts if not wanted or part.name in [*wanted, "a"] or part.name[0] in wanted]


def table(results: Figures) -> str:
    """All that was measured, for people."""
    lines = ["", "part | what | figures", "--- | --- | ---"]
    for name, part in results["parts"].items():
        if part.get("status") != "done":
            lines.append(f"{name} | {part.get('status')} | {part.get('why')}")
        lines += [f"{name} | {what} | {figures}" for what, figures in rows(name, part)]
    return "\n".join(lines)


def rows(name: str, part: Figures) -> Iterator[tuple[str, str]]:
    if name == "a" and "read_bytes_per_second" in part:
        driver = part["nvidia_smi"].get("driver_version", "none")
        yield part["kind"], f"driver {driver}, jax {part['environment'].get('packages', {}).get('jax')}"
        rates = part["matrix_flops_per_second"] / 1e12, part["copy_bytes_per_second"] / 1e12
        yield (
            "ceilings",
            f"{rates[0]:.3g} TFLOP/s, {rates[1]:.3g} TB/s, read {part['read_bytes_per_second'] / 1e12:.3g}",
        )
    for law, figures in part.get("laws", {}).items():
        told = figures.get("raised") or f"error {figures['error']}, bound {figures['bound']}"
        yield law, f"{'holds' if figures['holds'] else 'BROKEN'}, {told}"
    for contender, figures in part.get("contenders", {}).items():
        yield contender, step_line(figures) if "tokens_per_second" in figures else figures.get("failed", "not measured")
    for ratio, value in part.get("tokens_per_second_ratios", {}).items():
        yield ratio, f"{value:.3f} x the tokens/s"
    for batch, figures in part.items():
        if batch.isdecimal():
            for key, value in figures.items():
                if key.endswith("tokens_per_second"):
                    way = key.removesuffix("_tokens_per_second")
                    share = figures.get(f"{way}_share_of_copy_rate") or figures.get(f"{way}_share_of_matrix_rate")
                    told = f", {share:.1%} of the bound" if share else ""
                    yield f"{way}, batch {batch}", f"{value:,.0f} tokens/s{told}"
    for name_of_start in ("cold", "warm"):
        if name_of_start in part:
            told = part[name_of_start]
            yield (
                name_of_start,
                f"{told['to_first_step_seconds']:.1f} s to a step, {told['compile_seconds']:.1f} s compiling",
            )
    for key, value in part.get("save_and_growth", {}).items():
        if re.search("seconds$", key):
            yield key, json.dumps(value, default=str)
    for step, figures in part.get("compared", {}).items():
        told = ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if key.startswith("measured_over"))
        yield step, f"{told}; by {figures['by']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--parts", default="", help="letters or names; by default all")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny tries it in seconds, on a CPU")
    parser.add_argument("--out", default="docs/accelerator.json")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    parts = chosen(all_parts(args.size == "tiny"), args.parts)
    with tempfile.TemporaryDirectory(prefix="accelerator_", ignore_cleanup_errors=True) as folder:
        run = Run(pathlib.Path(args.out), Clock(args.minutes), args.size == "tiny", pathlib.Path(folder))
        run.out.with_suffix(".log").unlink(missing_ok=True)
        command = f"python -m benchmarks.accelerator --minutes={args.minutes:g} --parts={args.parts} --size={args.size}"
        run.results |= {"command": command, "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        try:
            run_parts(run, parts)
        finally:
            run.stop(*run.workers)
            run.write()
            print(table(run.results), flush=True)


if __name__ == "__main__":
    main()
