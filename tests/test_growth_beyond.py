"""The study of growth far beyond the crossing, at a tiny size; models side by side; recipes that were tried."""

import itertools
import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import growth_beyond, growth_rates, growth_recipes
from benchmarks.gpu_growth import plan
from benchmarks.gpu_growth.data import prepare
from benchmarks.gpu_growth.plan import Run, Rung, Trunk
from benchmarks.gpu_growth.programs import Programs
from benchmarks.gpu_growth.training import Trainer
from benchmarks.growth_beyond import Lineage
from tokenformer_jax.growth.recipes import RECIPES

SETTING = plan.SETTINGS["tiny"]
SMALL, MIDDLE, LARGE = SETTING.tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A workdir with text."""
    folder = tmp_path_factory.mktemp("beyond")
    (folder / "text").mkdir()
    for i in range(60):
        lines = [f"def function_{i}_{j}(argument): return argument + {i * j}  # word {j % 7}" for j in range(60)]
        (folder / "text" / f"{i}.py").write_text("\n".join(lines))
    (folder / "data").mkdir()
    prepare(folder / "data", [str(folder / "text")], SETTING.max_tokens, SETTING.vocabulary, SETTING.held_out, 60)
    return folder


def trainer(folder, name, copies):
    return Trainer(SETTING, Programs(SETTING, copies), folder, np.inf, f"{name}.json")


def test_models_side_by_side_are_those_trained_alone(folder):
    def losses(name, seeds):
        run = Run("both", Trunk(seeds, (Rung(0, SMALL, 1e-2),)), 1.0, trunk_steps=15, decay_steps=5, before=0.0)
        one = trainer(folder, name, len(seeds))
        one.marks = plan.marks([run])
        one.run(run)
        return [one.tree["runs"][name]["loss"] for name in run.names]

    first, second = losses("together", (0, 1))
    assert losses("alone", (1,)) == pytest.approx([second], abs=2e-4) and abs(first - second) > 1e-3


def test_rates_warm_up_stay_and_fall():
    steps = np.arange(40)
    first = Rung(0, SMALL, 1e-2, falls=(15, 20))
    assert Trunk((0,), (first,)).rates(steps, 10)[[0, 4, 9, 14, 15, 17, 20]] == pytest.approx(
        [1e-3, 5e-3, 1e-2, 1e-2, 1e-2, 6e-3, 0]
    )
    again = Trunk((0,), (first, Rung(20, LARGE, 2e-2, "zero_keys"))).rates(steps, 10)
    assert again[[20, 24, 29, 39]] == pytest.approx([2e-3, 1e-2, 2e-2, 2e-2])
    goes_on = Trunk((0,), (first._replace(falls=(0, 0), warmup=20), Rung(20, LARGE, 2e-2, "zero_keys")))
    assert goes_on.rates(steps, 10)[[9, 19, 20, 39]] == pytest.approx([1e-2, 2e-2, 2e-2, 2e-2])


def test_text_that_ends_is_read_again_in_another_order():
    reader = Trainer.__new__(Trainer)
    reader.setting, reader.num_windows, reader.orders = SETTING, 100, {}
    read = np.concatenate([reader.windows((0, 1), step) for step in range(0, 25, SETTING.chunk)])  # 200 windows
    for seed in (0, 1):
        first, second = np.split(read[:, seed].reshape(-1), 2)
        assert sorted(first) == sorted(second) == list(range(100)) and list(first) != list(second)


@pytest.mark.slow
def test_the_study_spends_its_budgets_and_reports_what_it_found(folder, monkeypatch, capsys):
    chosen = {"SETTING": SETTING, "SMALL": SMALL, "MIDDLE": MIDDLE, "LARGE": LARGE, "RATES": (1e-2,), "RAMP": 5}
    for name, value in (chosen | {"SCRATCH": (2, 4)}).items():
        monkeypatch.setattr(growth_beyond, name, value)

    def ladders(rates, cost):
        assert cost[LARGE] == 1 > cost[MIDDLE] > cost[SMALL]
        three = (SMALL, MIDDLE, LARGE), tuple(rates[n] for n in (SMALL, MIDDLE, LARGE))
        yield Lineage((LARGE,), (rates[LARGE],), (2, 4))
        yield Lineage(*three, (2, 4), (0.5, 1.0))
        yield growth_beyond.paper(rates, cost)

    monkeypatch.setattr(growth_beyond, "ladders", ladders)
    monkeypatch.setattr(growth_beyond.Study, "best_rate", lambda self, n, *budgets: 1e-2)
    monkeypatch.setattr(sys, "argv", ["growth_beyond", f"--workdir={folder}", "--seeds=0,1", "--minutes=5"])
    growth_beyond.main()
    tree = json.loads((folder / "growth_beyond.json").read_text())
    assert len(tree["runs"]) == 2 * 5 and not tree["dropped"] and len(tree["growths"]) == 4
    for run in tree["runs"].values():
        starts, ends = [0, *run["grown_at_steps"]], [*run["grown_at_steps"], run["steps"]]
        spent = sum((end - start) * SETTING.flops(n) for n, start, end in zip(run["sizes"], starts, ends, strict=True))
        assert run["cumulative_flops"] == pytest.approx(spent)
        assert spent == pytest.approx(run["budget"] * tree["unit_flops"], rel=0.15)
    told = capsys.readouterr().out
    assert "4 growths meant lossless" in told and (folder / "growth_beyond.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--report_only"])
    growth_beyond.main()
    assert capsys.readouterr().out == told


def test_gradient_keys_are_mixtures_of_gradients(folder, monkeypatch):
    """And shrink_and_perturb keeps 0.8 of what was trained."""
    one, recipes = trainer(folder, "recipes", 1), dict(RECIPES)
    for module in ("tokenformer_jax.growth.grow", "benchmarks.gpu_growth.training"):
        monkeypatch.setattr(f"{module}.RECIPES", recipes)
    growth_recipes.add_recipes(recipes, one.programs.draws)
    state, _ = one.advance(one.birth(SMALL, (0,)), Trunk((0,), (Rung(0, SMALL, 1e-2),)), 0, 5, [])
    arguments = jax.random.split(jax.random.key(0), 1), np.int32(5), np.zeros((4, 16), np.int32)
    keys = {
        name: np.asarray(one.programs("grow", SMALL, LARGE, name)(state, *arguments)[0].params["blocks"]["out"]["keys"])
        for name in ("gradient_keys", "shrink_and_perturb")
    }
    old_ND = np.asarray(state.params["blocks"]["out"]["keys"])[0, 0]
    gradients_MD = np.asarray(state.opt_state[0].mu["blocks"]["out"]["keys"])[0, 0]
    new_ND = keys["gradient_keys"][0, 0]
    np.testing.assert_array_equal(new_ND[:SMALL], old_ND)
    span_DM = np.linalg.svd(gradients_MD.T, full_matrices=False)[0]
    np.testing.assert_allclose(new_ND[SMALL:] @ span_DM @ span_DM.T, new_ND[SMALL:], atol=1e-5)
    assert np.linalg.matrix_rank(new_ND[SMALL:]) == SMALL < new_ND.shape[1]
    perturbed_ND = keys["shrink_and_perturb"][0, 0]
    assert not perturbed_ND[SMALL:].any()
    assert np.linalg.norm(perturbed_ND[:SMALL] - 0.8 * old_ND) < np.linalg.norm(perturbed_ND[:SMALL])


def test_every_arm_of_recipes_spends_the_same():
    arms = [*growth_recipes.ARMS, *growth_recipes.REPEATED]
    flops = []
    for arm in arms:
        rungs = [*arm.run(0).trunk.rungs]
        ends = [*(rung.step for rung in rungs[1:]), arm.run(0).steps]
        setting = growth_rates.SETTING
        flops.append(sum((end - r.step) * setting.flops(r.n) for r, end in zip(rungs, ends, strict=True)))
    assert flops == pytest.approx([growth_rates.FLOPS] * len(arms), rel=0.01)
    assert len({arm.name for arm in arms}) == len(set(arms))
    assert all(a.name != b.name for a, b in itertools.combinations(growth_recipes.ARMS, 2))
