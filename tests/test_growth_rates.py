"""The study of growth's learning rates, at a tiny size: equal budgets, results that stay, and its table."""

import json
import sys

import pytest

from benchmarks import growth_rates
from benchmarks.gpu_growth import plan
from benchmarks.growth_rates import Arm

SETTING = plan.SETTINGS["tiny"]
FLOPS = 40 * SETTING.flops(SETTING.tokens[-1])


def study(monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["growth_rates", f"--workdir={folder}", "--seeds=0,1", *flags])
    growth_rates.main()
    return json.loads((folder / "growth_rates.json").read_text())["runs"]


def test_all_arms_spend_the_same_and_finished_ones_stay(tmp_path, monkeypatch, capsys):
    small, _, large = SETTING.tokens
    arms = Arm((large,)), Arm((large,), 1e-3), Arm((small, large), 1e-2, (10,), "zero_keys"), Arm((small,))
    for name, value in {"SETTING": SETTING, "SMALL": small, "LARGE": large, "FLOPS": FLOPS, "ARMS": arms}.items():
        monkeypatch.setattr(growth_rates, name, value)
    monkeypatch.setattr(growth_rates.sysconfig, "get_path", lambda name: str(tmp_path / "text"))
    (tmp_path / "text").mkdir()
    for i in range(40):
        lines = [f"def function_{i}_{j}(argument): return argument + {i * j}  # word {j % 7}" for j in range(60)]
        (tmp_path / "text" / f"{i}.py").write_text("\n".join(lines))
    runs = study(monkeypatch, tmp_path / "run")
    assert len(runs) == 2 * len(arms)
    for run in runs.values():
        assert run["cumulative_flops"] == pytest.approx(FLOPS, rel=0.1)
        assert run["rates"][-1] in (1e-2, 1e-3, growth_rates.RATE)
    grown = runs[f"{arms[2].name}, seed 1, 1"]
    assert grown["sizes"] == [small, large] and grown["grown_at_steps"] == [10]

    told = capsys.readouterr().out
    ahead = [run["loss"] for name, run in runs.items() if name.startswith(f"{small},")]
    assert f"{sum(ahead) / 2:.3f} ({min(ahead):.3f} .. {max(ahead):.3f}) | 2 |" in told
    monkeypatch.setattr(growth_rates.Trainer, "run", None)  # nothing is run again
    assert study(monkeypatch, tmp_path / "run") == runs
    study(monkeypatch, tmp_path / "run", "--report_only")
    assert capsys.readouterr().out == 2 * told
