"""The study of growth on one GPU, at its tiny size: its results, its laws, and that it goes on where it was left."""

import json
import sys

import numpy as np
import pytest

from benchmarks import gpu_growth, gpu_growth_data

LINEAGES = 5


def study(folder, monkeypatch, *flags):
    command = ["gpu_growth", "--size=tiny", f"--workdir={folder / 'work'}", f"--out={folder / 'out.json'}", *flags]
    monkeypatch.setattr(sys, "argv", command)
    gpu_growth.main()
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_growth")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder, study(folder, monkeypatch, f"--lineages={LINEAGES}", "--minutes=10")


def test_every_run_is_there_with_all_its_flops(done):
    folder, tree = done
    runs = tree["runs"].values()
    assert len(runs) == sum(len(lineage.budgets) for lineage in gpu_growth.LINEAGES[:LINEAGES])
    assert not tree["dropped"]
    setting = gpu_growth.SETTINGS["tiny"]
    for run in runs:
        ends = [*run["grown_at_steps"], run["steps"]]
        starts = [0, *run["grown_at_steps"]]
        spent = sum((end - start) * setting.flops(n) for n, start, end in zip(run["sizes"], starts, ends, strict=True))
        assert run["cumulative_flops"] == pytest.approx(spent)
        assert run["cumulative_flops"] == pytest.approx(run["budget"] * tree["plan"]["flops"], rel=0.1)
        costs = [row[0] for row in run["curve"]]
        assert costs == sorted(costs) and costs[-1] == pytest.approx(spent)
        assert run["curve"][-1][-1] == run["loss"] < np.log(setting.vocabulary)
        assert run["epochs"] <= 1
    assert {row["lineage"] for row in tree["summary"] if row.get("cost_over_best_size")} == {
        "ladder, 25 % small",
        "middle to large, 25 % small",
    }
    assert set(tree["sizes"]) == {"4", "8", "16"}
    assert (folder / "out.png").stat().st_size > 10_000


def test_growth_does_not_change_the_loss(done):
    growths = done[1]["growths"].values()
    assert len(growths) == 3
    for growth in growths:
        assert growth["lossless"]
        assert growth["loss_after"] == pytest.approx(growth["loss_before"], abs=1e-5)


def test_it_goes_on_where_it_was_left(done, monkeypatch):
    """Finished runs are not run again; one that is missing is the same when it is run alone, from a saved trunk."""
    folder, tree = done
    state = folder / "work" / "gpu_growth.json"
    kept = json.loads(state.read_text())
    lost = kept["runs"].pop("ladder, 25 % small, seed 0, 0.75")
    state.write_text(json.dumps(kept))
    ran = []
    run = gpu_growth.Trainer.run
    monkeypatch.setattr(gpu_growth.Trainer, "run", lambda self, *args: (ran.append(args[0].name), run(self, *args)))
    again = study(folder, monkeypatch, f"--lineages={LINEAGES}", "--minutes=10")
    assert ran == ["ladder, 25 % small, seed 0, 0.75"]
    assert again["runs"]["ladder, 25 % small, seed 0, 0.75"] == lost
    assert {name: run for name, run in again["runs"].items() if name in kept["runs"]} == kept["runs"]
    rows = ({(row["lineage"], row["budget"]): row for row in each["summary"]} for each in (again, tree))
    assert next(rows) == next(rows)


def test_what_has_no_time_is_said_to_be_left_out(done, monkeypatch, capsys):
    folder, _ = done
    tree = study(folder, monkeypatch, f"--lineages={LINEAGES + 1}", "--minutes=0")
    late = [name for name in tree["dropped"] if name.startswith("ladder, 12.5 %")]
    assert len(late) == len(tree["dropped"]) == 4
    said = capsys.readouterr()
    assert "not run, since there was no time" in said.err
    study(folder, monkeypatch, "--report_only")
    assert capsys.readouterr().out == said.out


class Windows(gpu_growth.Trainer):
    """Reads windows without training."""

    def __init__(self, setting, num_windows):
        self.setting, self.num_windows = setting, num_windows


def test_no_window_is_read_twice_in_an_epoch():
    setting = gpu_growth.SETTINGS["tiny"]
    trainer = Windows(setting, num_windows=203)  # an epoch ends within a step
    read = np.concatenate([trainer.windows(0, step).reshape(-1) for step in range(0, 60, setting.chunk)])
    for start in (0, 203):
        assert sorted(read[start : start + 203]) == list(range(203))
    assert list(read[:203]) != list(read[203:406])
    assert list(read[:203]) != list(Windows(setting, 203).windows(1, 0).reshape(-1)[:203])


def test_the_plan_fills_the_time_or_ends_with_the_data():
    setting = gpu_growth.SETTINGS["full"]
    rates, lineages = dict.fromkeys(setting.tokens, 1e-3), gpu_growth.LINEAGES
    step_seconds = dict(zip(setting.tokens, (0.004, 0.005, 0.009), strict=True))

    def made(left, limit):
        whole, decided = gpu_growth.plan(setting, lineages, 4, rates, step_seconds, left, limit)
        return decided, [run for lineage in lineages[:4] for run in gpu_growth.runs_of(lineage, setting, whole, rates)]

    decided, runs = made(200, 1e9)
    assert decided == "time"
    assert gpu_growth.seconds(runs, step_seconds) == pytest.approx(200, rel=0.02)
    decided, runs = made(200, 4000)
    assert decided == "data"
    assert max(run.steps for run in runs) == pytest.approx(4000, abs=2 * setting.chunk)
    by_name = {run.name: run for run in runs}
    shared = by_name["middle, seed 0, 1"].trunk
    assert by_name["middle to large, 25 % small, seed 0, 1"].trunk.up_to(1) == shared  # begins as the middle one


def test_the_text_is_unique_and_written_by_people(tmp_path):
    code = "".join(
        f"def function_number_{i}(argument):\n    return argument + {i}  # {'so ' * (i % 9)}\n" for i in range(99)
    )
    other = code.replace("argument", "parameter")
    texts = {
        "a.py": code,
        "copy.py": code,
        "version.py": code.replace("number_7(", "called_seven("),
        "b.py": other,
        "table.txt": "0.1234, 5.6789, 1.2345\n" * 100,
        "minified.c": "int f(int a){return a+1;}" * 500,
        "short.py": "pass\n",
        "picture.png": code,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = gpu_growth_data.list_files([str(tmp_path)])
    unique = gpu_growth_data.Unique()
    kept = {file.path.rpartition("/")[2] for file in gpu_growth_data.examine(paths) if unique.is_new(file)}
    assert len(kept & {"a.py", "copy.py", "version.py"}) == 1
    assert kept - {"a.py", "copy.py", "version.py"} == {"b.py"}
    assert (unique.copies, unique.versions) == (1, 1)
