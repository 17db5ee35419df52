"""Laws of the batches: every token once, the same whatever the processes, and exact to resume."""

import dataclasses
import json

import numpy as np
import pytest

from tests.helpers import tiny_config
from tokenformer_jax.data.batches import Batch, eval_batches, keep_position, train_batches
from tokenformer_jax.data.tokens import InMemory, TokenSplit
from tokenformer_jax.errors import UserError

CFG = tiny_config(model__context_length=8, batch_size=4)


def make_split(num_tokens: int, documents: int = 5) -> TokenSplit:
    """Tokens 1, 2, 3, … with an end of text (0) first and at some other places."""
    tokens = np.arange(num_tokens, dtype=np.uint16)
    tokens[:: max(1, num_tokens // documents)] = 0
    return TokenSplit([InMemory(tokens)], num_bytes=num_tokens, num_documents=documents, end_of_text=0, fingerprint="")


def test_targets_are_the_next_tokens_and_segments_count_documents():
    tokens = np.array([0, 5, 6, 0, 7, 8, 9, 0, 0, 4, 3], np.uint16)
    (batch,) = eval_batches(TokenSplit([InMemory(tokens)], 1, 4, end_of_text=0, fingerprint=""), 3, 4)
    assert batch.tokens_BL.tolist() == [[0, 5, 6, 0], [7, 8, 9, 0], [0, 4, 0, 0]]
    assert batch.targets_BL.tolist() == [[5, 6, 0, 7], [8, 9, 0, 0], [4, 3, 0, 0]]
    assert batch.weights_BL.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.segments_BL.tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [1, 1, 0, 0]]
    assert [array.dtype for array in batch] == [np.int32, np.int32, np.float32, np.int32]


def test_an_epoch_of_training_reads_every_whole_window_once():
    split, cfg = make_split(8 * 20 + 5), CFG
    batches = train_batches(split, cfg)
    epochs = [np.concatenate([next(batches).targets_BL for _ in range(5)]) for _ in range(3)]
    windows = split.tokens[1 : 8 * 20 + 1].reshape(20, 8)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(windows.tolist())
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], windows)


@pytest.mark.parametrize("num_tokens", [2, 9, 10, 33, 8 * 8 + 1, 100])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_predicts_every_token_but_the_first_once(num_tokens, process_count):
    split = make_split(num_tokens)
    parts = [eval_batches(split, 4, 8, process_index=i, process_count=process_count) for i in range(process_count)]
    assert len({len(part) for part in parts}) == 1
    read = []
    for batches in zip(*parts, strict=True):
        batch = Batch(*map(np.concatenate, zip(*batches, strict=True)))
        assert batch.tokens_BL.shape == (4, 8)
        read += batch.targets_BL[batch.weights_BL == 1].tolist()
        assert ((batch.segments_BL > 0) == (batch.weights_BL == 1)).all()
    assert read == split.tokens[1:].tolist()


def test_max_batches_spreads_an_evaluation_over_the_split():
    split = make_split(1000)
    assert len(eval_batches(split, 4, 8)) == 32
    some = eval_batches(split, 4, 8, max_batches=3)
    assert len(some) == len(list(some)) == 3
    firsts = np.concatenate([batch.targets_BL[:, 0] for batch in some])
    assert np.diff(firsts).min() > 8 and firsts[-1] > 900  # windows from all over, each once
    assert len(eval_batches(split, 4, 8, max_batches=99)) == 32


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_processes_rows_form_the_global_batches(process_count):
    split, cfg = make_split(8 * 21 + 1), CFG
    parts = [train_batches(split, cfg, process_index=i, process_count=process_count) for i in range(process_count)]
    whole = train_batches(split, cfg)
    for _ in range(12):  # beyond two epochs
        for expected, *shards in zip(next(whole), *(next(part) for part in parts), strict=True):
            np.testing.assert_array_equal(np.concatenate(shards), expected)


def test_a_restored_iterator_goes_on_as_if_never_stopped():
    split, cfg = make_split(8 * 21 + 1), CFG
    batches = train_batches(split, cfg)
    for _ in range(4):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    assert len(json.dumps(state)) < 100
    expected = [next(batches) for _ in range(9)]  # over the ends of two epochs
    fresh = train_batches(split, cfg)
    next(fresh)
    for restored in (fresh, batches):
        restored.set_state(state)
        for batch in expected:
            for ours, theirs in zip(next(restored), batch, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_the_seed_decides_the_order():
    split = make_split(8 * 40 + 1)
    first = [next(train_batches(split, dataclasses.replace(CFG, seed=seed))).tokens_BL for seed in (0, 0, 1, 2**40)]
    np.testing.assert_array_equal(first[0], first[1])
    assert not np.array_equal(first[0], first[2])


def test_batches_that_do_not_divide_say_what_would_do():
    for make in (
        lambda: train_batches(make_split(99), CFG, process_count=3),
        lambda: eval_batches(make_split(99), 4, 8, process_count=3),
    ):
        with pytest.raises(UserError, match=r"^batch_size = 4: must divide by the 3 processes; use 6"):
            make()


def test_another_batch_size_goes_on_at_the_next_whole_batch():
    split = make_split(8 * 60 + 1)
    batches = train_batches(split, CFG)
    for _ in range(5):  # 20 examples
        next(batches)
    for size, skipped in ((2, 10), (8, 3)):
        cfg = dataclasses.replace(CFG, batch_size=size)
        moved, expected = train_batches(split, cfg), train_batches(split, cfg)
        moved.set_state(batches.get_state())
        keep_position(moved, 4, size)
        for _ in range(skipped):
            next(expected)
        np.testing.assert_array_equal(next(moved).tokens_BL, next(expected).tokens_BL)
