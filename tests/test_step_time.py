"""The PyTorch model to measure against computes what the authors' does, and the benchmark runs."""

import json

import numpy as np
import pytest

from tests.helpers import golden_model

torch = pytest.importorskip("torch")

from benchmarks import step_time, torch_tokenformer, waits  # noqa: E402


@pytest.mark.parametrize("name", ["lm_2layer.npz", "lm_rot8.npz"])
def test_the_peer_agrees_with_the_authors_data(name):
    cfg, params, _, raw = golden_model(name)
    model = torch_tokenformer.TokenFormer(cfg.model)
    model.load_params(params)
    tokens = torch.from_numpy(raw["tokens"].astype(np.int64))
    np.testing.assert_allclose(model(tokens).detach().numpy(), raw["logits"], atol=2e-5)


@pytest.mark.slow
def test_the_step_is_not_far_slower_than_its_peers(tmp_path, monkeypatch, capsys):
    """A guard with wide bounds, since the machine is shared: measured idle, 1.0 and 0.8."""
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["step_time", "--shapes=tiny", "--rounds=2", f"--out={out}"])
    step_time.main()
    assert "x torch's speed" in capsys.readouterr().out
    figures = json.loads(out.read_text())["shapes"]["tiny"]
    assert figures["speed_over_torch"] > 0.3
    assert figures["time_over_plain"] < 2


@pytest.mark.slow
def test_the_waits_are_measured(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr(waits, "ROUNDS", 1)
    monkeypatch.setattr("sys.argv", ["waits", "--size=tiny", "--parts=input,save,decode", f"--out={out}"])
    waits.main()
    found = json.loads(out.read_text())
    assert found["input"]["times_the_training_rate"] > 5
    assert 0 < found["save"]["blocked_share"] <= 1 and found["decode"]["decode_tokens_per_second"] > 0


def test_the_plain_transformer_has_as_many_parameters():
    for shape in ("i", "ii"):
        counts = [step_time.parameters(step_time.config(shape, kind)) for kind in ("pattention", "linear")]
        assert counts[1] == pytest.approx(counts[0], rel=0.002)
