"""The notebook of the docs does what it shows."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import pytest
from matplotlib import pyplot as plt

from tokenformer_jax.growth.verify import LOGIT_BOUND

TOUR = pathlib.Path(__file__).parents[1] / "docs" / "tour.ipynb"


def cells(kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_the_tour_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the data is prepared
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with plt.rc_context():
        names: dict[str, Any] = {}
        for number, cell in enumerate(cells("code"), start=1):
            exec(compile("".join(cell["source"]), f"{TOUR.name}, code cell {number}", "exec"), names)

    assert names["folder"].is_relative_to(tmp_path)
    assert names["losses"]["grown"] < names["losses"]["small"] - 0.3
    assert names["difference"] <= LOGIT_BOUND * max(names["largest"], 1.0)
    assert names["grown"].cfg.tokens["ffn"] == 8 * names["small"].cfg.tokens["ffn"]
    new_keys = names["grown"].params["blocks"]["ffn"]["keys"][:, names["small"].cfg.ffn_tokens :]
    assert not jnp.any(new_keys)
    assert not jnp.any(names["taken_over"]["right after growth"]) and jnp.all(names["taken_over"]["trained on"] > 0.5)
    assert jnp.all(jnp.linalg.norm(names["trained"].params["blocks"]["ffn"]["keys"], axis=-1) > 0)


def test_the_stored_tour_is_executed_and_small():
    assert TOUR.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in cells("code")] == list(range(1, len(cells("code")) + 1))
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
