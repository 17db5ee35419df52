"""The study of growth on one GPU, at its tiny size: its results, its laws, and that it goes on where it was left."""

import json
import sys

import numpy as np
import pytest

from benchmarks.gpu_growth import __main__ as command
from benchmarks.gpu_growth import data, plan
from benchmarks.gpu_growth.training import Trainer

LINEAGES = 4
TINY = plan.SETTINGS["tiny"]
WHOLE = 50 * TINY.flops(TINY.tokens[-1])


def study(folder, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu_growth", "--size=tiny", f"--workdir={folder}", f"--flops={WHOLE}", *flags])
    command.main()
    return json.loads((folder / "gpu_growth.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_growth")
    measure = Trainer.measure

    def measure_alone(self, n):
        assert all(future.done() for future in self.programs.futures.values())  # else steps would seem slow
        return measure(self, n)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "measure", measure_alone)
        return folder, study(folder, monkeypatch, f"--lineages={LINEAGES}", "--minutes=10")


def test_every_run_is_there_with_all_its_flops(done):
    folder, tree = done
    runs = tree["runs"].values()
    assert len(runs) == sum(len(lineage.budgets) for lineage in plan.LINEAGES[:LINEAGES])
    assert not tree["dropped"]
    for run in runs:
        starts = [0, *run["grown_at_steps"]]
        ends = [*run["grown_at_steps"], run["steps"]]
        spent = sum((end - start) * TINY.flops(n) for n, start, end in zip(run["sizes"], starts, ends, strict=True))
        assert run["cumulative_flops"] == pytest.approx(spent)
        assert run["cumulative_flops"] == pytest.approx(run["budget"] * WHOLE, rel=0.2)
        costs = [row[0] for row in run["curve"]]
        assert costs == sorted(costs) and costs[-1] == pytest.approx(spent)
        assert run["curve"][-1][-1] == run["loss"] < np.log(TINY.vocabulary)
        assert bool(run["cost_over_best_size"]) == (len(run["sizes"]) > 1)
    assert set(tree["sizes"]) == {"4", "8", "16"}
    assert (folder / "gpu_growth.png").stat().st_size > 10_000


def test_growth_does_not_change_the_loss(done):
    growths = done[1]["growths"].values()
    assert len(growths) == 3
    for growth in growths:
        assert growth["lossless"]
        assert growth["loss_after"] == pytest.approx(growth["loss_before"], abs=1e-5)


def test_it_goes_on_where_it_was_left(done, monkeypatch):
    """Finished runs are not run again; one that is missing is the same when it is run alone, from a saved trunk."""
    folder, tree = done
    name = "ladder, 25 % small, seed 0, 0.75"
    kept = {other: run for other, run in tree["runs"].items() if other != name}
    (folder / "gpu_growth.json").write_text(json.dumps(tree | {"runs": kept}))
    ran = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, run_: (ran.extend(run_.names), run(self, run_)))
    again = study(folder, monkeypatch, f"--lineages={LINEAGES}", "--minutes=10")
    assert ran == [name]
    assert again["runs"] == tree["runs"]


def test_what_has_no_time_is_said_to_be_left_out(done, monkeypatch, capsys):
    folder, tree = done
    late = study(folder, monkeypatch, f"--lineages={LINEAGES + 1}", "--minutes=0")
    assert late["dropped"] == ["large, twice the rate, seed 0, 0.5"]
    assert late["runs"] == tree["runs"]
    said = capsys.readouterr()
    assert "the time is over" in said.err
    study(folder, monkeypatch, "--report_only")
    assert capsys.readouterr().out == said.out


class Windows(Trainer):
    """Reads windows without training."""

    def __init__(self, num_windows):
        self.setting, self.num_windows, self.orders = TINY, num_windows, {}


def test_no_window_is_read_twice():
    read = [
        np.concatenate([Windows(400).windows((seed,), step).reshape(-1) for step in range(0, 50, TINY.chunk)])
        for seed in (0, 1)
    ]
    assert sorted(read[0]) == sorted(read[1]) == list(range(400))
    assert list(read[0]) != list(read[1])


def test_the_plan_fills_the_time_or_ends_with_the_data():
    setting, lineages = plan.SETTINGS["full"], plan.LINEAGES[:4]
    step_seconds = dict(zip(setting.tokens, (0.003, 0.004, 0.005), strict=True))

    def made(left, limit):
        whole, by = plan.whole_budget(setting, lineages, step_seconds, left, limit)
        return by, [run for lineage in lineages for run in plan.runs_of(lineage, setting, whole)]

    by, runs = made(200, 1e9)
    assert by == "time"
    assert plan.seconds(runs, step_seconds) == pytest.approx(200, rel=0.02)
    by, runs = made(200, 4000)
    assert by == "data"
    assert max(run.steps for run in runs) == pytest.approx(4000, abs=3 * setting.chunk)
    by_name = {name: run for run in runs for name in run.names}
    shared = by_name["middle, seed 0, 1"].trunk
    assert by_name["middle to large, 25 % small, seed 0, 1"].trunk.up_to(1) == shared  # begins as the middle one


def test_the_text_is_unique_and_written_by_people(tmp_path):
    code = "".join(
        f"def function_number_{i}(argument):\n    return argument + {i}  # {'so ' * (i % 9)}\n" for i in range(99)
    )
    texts = {
        "a.py": code,
        "copy.py": code,
        "version.py": code.replace("number_7(", "called_seven("),
        "b.py": code.replace("argument", "parameter"),
        "table.txt": "0.1234, 5.6789, 1.2345\n" * 100,
        "minified.c": "int f(int a){return a+1;}" * 500,
        "short.py": "pass\n",
        "picture.png": code,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    files = data.examine(data.list_files([str(tmp_path)]))
    assert len(files) == 4
    kept = {file.path.rpartition("/")[2] for file in data.unique(files)}
    assert len(kept & {"a.py", "copy.py", "version.py"}) == 1
    assert kept - {"a.py", "copy.py", "version.py"} == {"b.py"}
