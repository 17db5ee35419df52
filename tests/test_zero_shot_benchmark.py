"""The comparison with the paper's table: its own averages come out, and each figure is taken from the right task."""

import pytest

from benchmarks import zero_shot
from configs import zero_shot as preset

AVERAGES = {"150m": 44.7, "450m": 52.0, "900m": 56.4, "1b5": 59.3}  # as the paper prints them


@pytest.mark.parametrize("model", zero_shot.HUB)
def test_the_papers_averages_are_those_of_its_figures(model):
    assert zero_shot.paper_row(model)["average"] == pytest.approx(AVERAGES[model], abs=0.06)


def test_the_columns_are_the_presets_tasks():
    assert {task for task, _, _ in zero_shot.METRICS.values()} == set(preset.PAPER.split(","))


def test_ours_stand_beside_the_papers():
    tasks = {task: {"metrics": {}} for task in preset.PAPER.split(",")}
    for number, (task, metric, by) in enumerate(zero_shot.METRICS.values()):
        tasks[task]["metrics"][metric] = {"value": (number + 10) / by}
        tasks[task]["metrics"].setdefault("other", {"value": -1})
    row = zero_shot.our_row(tasks)
    assert list(row.values()) == pytest.approx([10, 11, 12, 13, 14, 15, 16, 13.5])
    lines = zero_shot.table({"150m": row}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert cells[2] == ["ours", "10.00", "11.00", "12.00", "13.00", "14.00", "15.00", "16.00", "13.50"]
    assert cells[3][:3] == ["paper", "16.38", "45.00"] and cells[4][:3] == ["difference", "-6.38", "-34.00"]
