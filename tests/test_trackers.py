"""What follows a run is told its figures and its growths: TensorBoard, and Weights & Biases without a network."""

import importlib.util
import json
import struct

import pytest

from tests.helpers import corpus_overrides, tiny_config
from tokenformer_jax.errors import UserError
from tokenformer_jax.running.loop import train
from tokenformer_jax.storage import trackers
from tokenformer_jax.storage.metrics_file import MetricsWriter, read_metrics

RUNG = {"step": 4, "model": {"ffn_tokens": 128}}
GROWTH = {"from": {"ffn": 1}, "to": {"ffn": 2}, "loss_after": 1.5}


def events(folder):
    """The TensorBoard events of a folder, by tensorboardX' own classes."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        raw = file.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            found.append(Event.FromString(raw[12 : 12 + size]))
            raw = raw[12 + size + 4 :]
    return found


def test_tensorboard_shows_figures_and_growths(tmp_path):
    writer = MetricsWriter(tiny_config(), tmp_path, 3, 1)
    writer.write({"step": 4, "params": 1, "loss": 2.5})
    writer.write({"step": 4, "params": 2, "growth": GROWTH})
    writer.close()
    found = events(tmp_path / "tensorboard")
    assert [event.step for event in found if event.HasField("session_log")] == [4]  # later steps are dropped
    values = [(event.step, value) for event in found for value in event.summary.value]
    scalars = {(step, value.tag): value.simple_value for step, value in values if value.HasField("simple_value")}
    assert scalars[4, "loss"] == 2.5
    texts = [value.tensor.string_val[0] for _, value in values if value.tag.startswith("growth")]
    assert [json.loads(text) for text in texts] == [GROWTH]


def test_a_package_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config\.track = 'wandb': needs the package wandb; use pip install wandb"):
        trackers.trackers(tiny_config(track="wandb"), tmp_path, tmp_path, 0)


def test_an_unknown_tracker_is_named():
    with pytest.raises(UserError, match="track = 'mlflow': must be one of none, wandb"):
        tiny_config(track="mlflow")


def log_records(raw):
    """The records of a LevelDB log: blocks of 32 KiB, in which parts of records follow a checksum, size and kind."""
    whole, place = b"", 7  # after wandb's own header
    while place + 7 <= len(raw):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", raw[place + 4 : place + 7])
        whole += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # all of a record, or its end
            yield whole
            whole = b""


def test_wandb_is_told_all_that_metrics_are_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = tiny_config(**corpus_overrides(tmp_path), track="wandb", rungs=(RUNG,), log_every=1, checkpoint_every=3)
    train(cfg, tmp_path / "run")
    rows: dict = {}
    starts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in starts}) == 1  # the id of the run
    for file in starts:
        for raw in log_records(file.read_bytes()):
            record = Record.FromString(raw)
            items = {"/".join([item.key, *item.nested_key]).strip("/"): item.value_json for item in record.history.item}
            row = {name: json.loads(value) for name, value in items.items()}
            if "step" in row:
                rows.setdefault(row["step"], {}).update(row)
    for row in read_metrics(tmp_path / "run"):
        for name, value in row.items():
            if isinstance(value, float):
                assert rows[row["step"]][name] == pytest.approx(value)
    assert rows[4]["growth/to/ffn"] == 128 and rows[4]["growth/loss_after"] > 0
