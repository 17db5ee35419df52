"""When to grow, by curves whose crossing and head start are known in closed form."""

import json

import numpy as np
import pytest

from tests.commands import call, call_well, complaint
from tests.helpers import tiny_config
from tokenformer_jax.evaluation.advice import advise, describe

SMALL, LARGE = (100, 2.0, 30.0, 0.5), (400, 1.5, 300.0, 0.5)  # parameters; a, b, k of the loss a + b / FLOPs**k


def write(folder, size, flops, growths=(), every=1, **keys):
    """A run whose validation loss is a + b / FLOPs**k, at these FLOPs."""
    params, a, b, k = size
    folder.mkdir(parents=True)
    steps = range(every, every * (len(flops) + 1), every)
    cfg = tiny_config(steps=steps[-1] if keys.get("optimizer__schedule") != "wsd" else 2 * steps[-1], **keys)
    (folder / "config.json").write_text(cfg.to_json())
    rows = [
        {"step": step, "params": params, "train_flops": c, "eval_loss": a + b / c**k}
        for step, c in zip(steps, flops, strict=True)
    ]
    rows = [row | {"eval_perplexity": 2.0, "eval_bits_per_byte": 1.0} for row in rows] + list(growths)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    flops = np.geomspace(1e3, 1e7, 200)
    schedule = {"optimizer__schedule": "constant"}
    return {
        "small": write(tmp_path / "small", SMALL, flops, every=5, **schedule),
        "large": write(tmp_path / "large", LARGE, flops, **schedule),
    }


def cost(size, loss):
    _, a, b, k = size
    return (b / (loss - a)) ** (1 / k)


def test_crossing_and_head_start_are_those_of_the_curves(runs):
    (found,) = advise(dict(reversed(runs.items())))  # by size, in whatever order they come
    crossing = ((300 - 30) / 0.5) ** 2  # where both losses are the same
    assert found["crossing"]["flops"] == pytest.approx(crossing, rel=0.01)
    losses = np.linspace(2.02, 3, 10_000)
    ahead = cost(LARGE, losses) - cost(SMALL, losses)
    growth = found["growth"]
    assert growth["saves_at_most_flops"] == pytest.approx(ahead.max(), rel=0.02)
    assert growth["loss"] == pytest.approx(losses[ahead.argmax()], rel=0.02)
    assert growth["flops"] == pytest.approx(cost(SMALL, growth["loss"]), rel=0.01)
    assert growth["step"] == pytest.approx(
        5 * np.interp(growth["flops"], np.geomspace(1e3, 1e7, 200), range(1, 201)), abs=2
    )
    half, now = (30 * flops**-0.5 for flops in (growth["flops"] / 2, growth["flops"]))
    assert growth["slope"] == pytest.approx(half - now, rel=0.02)
    told = describe(found)
    assert f"cross at {found['crossing']['flops']:.3g} FLOPs" in told and f"grow at step {growth['step']:,}" in told
    assert f"{growth['slope']:.2f} nats for twice the FLOPs: grow.slope" in told
    assert "if the grown model learns as fast" in told and "cosine" not in told and "last loss" not in told


def test_what_cannot_be_known_is_said(tmp_path, runs):
    few, later = np.geomspace(1e3, 5e4, 20), np.geomspace(1e4, 1e5, 20)
    early = write(tmp_path / "early", LARGE, few)
    (found,) = advise({"small": runs["small"], "early": early})
    assert found["crossing"] is None and "do not cross yet: small is the better size" in describe(found)
    assert "the last loss that both reached" in describe(found)
    assert "a cosine's losses on the way are too high" in describe(found)
    (found,) = advise({"small": write(tmp_path / "late", SMALL, later), "early": early})
    assert found["growth"] is None and "cannot be said: there is no loss that both reached" in describe(found)
    better = write(tmp_path / "better", (400, 1.9, 20.0, 0.5), few)
    (found,) = advise({"small": runs["small"], "better": better})
    assert describe(found).endswith("do not grow: better reached every loss for fewer FLOPs than small")


def test_losses_of_a_decay_and_of_grown_runs_do_not_count(tmp_path, runs):
    flops = np.geomspace(1e3, 1e7, 200)
    decayed = write(tmp_path / "decayed", SMALL, flops, optimizer__schedule="wsd", optimizer__decay_fraction=0.75)
    (found,) = advise({"small": decayed, "large": runs["large"]})  # only the first half of its losses are left
    assert found["crossing"] is None
    row = {"step": 9, "params": 400, "train_flops": 1e4, "growth": {"from": {"ffn": 1}, "to": {"ffn": 2}}}
    grown = write(tmp_path / "grown", LARGE, flops, growths=[row])
    told = complaint(call("report", f"--runs=small={runs['small']},grown={grown}", "--advise", f"--out={tmp_path}"))
    assert "--advise: needs runs from scratch of two sizes" in told


def test_the_command_writes_what_it_says(tmp_path, runs):
    out = call_well("report", f"--runs=small={runs['small']},large={runs['large']}", "--advise", f"--out={tmp_path}")
    (found,) = json.loads((tmp_path / "advice.json").read_text())
    assert describe(found) in out
