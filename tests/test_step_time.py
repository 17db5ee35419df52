"""The PyTorch model to measure against computes what the authors' does, and the benchmark runs."""

import numpy as np
import pytest

from tests.helpers import golden_model

torch = pytest.importorskip("torch")

from benchmarks import step_time, torch_tokenformer  # noqa: E402


@pytest.mark.parametrize("name", ["lm_2layer.npz", "lm_rot8.npz"])
def test_the_peer_agrees_with_the_authors_data(name):
    cfg, params, _, raw = golden_model(name)
    model = torch_tokenformer.TokenFormer(cfg.model)
    model.load(params)
    tokens = torch.from_numpy(raw["tokens"].astype(np.int64))
    np.testing.assert_allclose(model(tokens).detach().numpy(), raw["logits"], atol=2e-5)


def test_the_benchmark_runs_and_tells(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["step_time", "--shapes=tiny", "--rounds=2", f"--out={tmp_path}/out.json"])
    step_time.main()
    assert "x torch's speed" in capsys.readouterr().out and (tmp_path / "out.json").exists()


def test_the_plain_transformer_has_as_many_parameters():
    for shape in ("i", "ii"):
        counts = [step_time.parameters(step_time.config(shape, kind)) for kind in ("pattention", "linear")]
        assert counts[1] == pytest.approx(counts[0], rel=0.002)
