import zlib

import jax
import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.data import dataset, pipeline
from tests import planted

SIZE, B = 29, 8


def positions(step, seed=0, size=SIZE, batch_size=B):
    return pipeline.train_positions(seed, step, size=size, batch_size=batch_size)


def assert_same_batch(one, other):
    """Asserts that two batches are equal in every array and dtype."""
    for field in ("inputs", "mask", "present", "targets", "weight", "id"):
        first, second = getattr(one, field), getattr(other, field)
        pairs = [(first[k], second[k]) for k in first] if isinstance(first, dict) else [(first, second)]
        for a, b in pairs:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def concatenate(batches):
    """Returns the batch of all rows of the batches."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


@pytest.fixture
def splits(monkeypatch):
    """Returns the splits in memory and streamed; some rows lack a modality, and one is unreadable."""
    changes = {3: {"text": ""}, 5: {"audio": b""}, 11: {"image": b"no image"}, 12: {"image": None}}
    rows = [planted.row(i, **changes.get(i, {})) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows[:21])
    both = [
        dataset.load(configs.read(planted.config(data__memory_gb=gb, data__max_bad_fraction=0.1)).data, seed=0).splits
        for gb in (1.0, 0.0)
    ]
    assert both[0]["train"].arrays is not None
    assert both[1]["train"].arrays is None
    return both


# --- Order of examples ---


def test_train_positions_are_consecutive_permutations():
    sequence = np.concatenate([positions(step) for step in range(SIZE)])  # exactly B epochs
    epochs = sequence.reshape(B, SIZE)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(SIZE), (B, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == B


def test_train_positions_of_large_batches_repeat_rows_evenly():
    counts = np.bincount(positions(0, batch_size=3 * SIZE), minlength=SIZE)
    np.testing.assert_array_equal(counts, 3)


def test_train_positions_depend_on_seed_and_step_only():
    assert not np.array_equal(positions(0, seed=0), positions(0, seed=1))
    assert zlib.crc32(positions(7, size=1000, batch_size=64).astype("<i8").tobytes()) == 3621691968


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_train_batches_of_hosts_partition_the_global_batch(hosts, splits):
    whole = list(pipeline.train_batches(splits[0]["train"], seed=3, batch_size=B, first=0, last=4))
    shares = [
        list(pipeline.train_batches(splits[0]["train"], seed=3, batch_size=B, first=0, last=4, host=h, hosts=hosts))
        for h in range(hosts)
    ]
    for step in range(4):
        host_batches = [share[step] for share in shares]
        assert {len(batch.id) for batch in host_batches} == {B // hosts}
        assert_same_batch(concatenate(host_batches), whole[step])


def test_train_batches_are_the_same_after_resuming_at_any_step(splits):
    split = splits[0]["train"]
    whole = list(pipeline.train_batches(split, seed=0, batch_size=B, first=0, last=9))
    for first in (1, 4, 8):
        resumed = list(pipeline.train_batches(split, seed=0, batch_size=B, first=first, last=9))
        assert len(resumed) == 9 - first
        for batch, expected in zip(resumed, whole[first:], strict=True):
            assert_same_batch(batch, expected)


# --- Memory, streams and worker processes ---


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.process)])
def test_train_batches_are_the_same_in_memory_and_streamed(workers, splits):
    memory, streamed = (s["train"] for s in splits)
    expected = list(pipeline.train_batches(memory, seed=0, batch_size=B, first=2, last=7))
    read = list(pipeline.train_batches(streamed, seed=0, batch_size=B, first=2, last=7, workers=workers))
    for batch, expected_batch in zip(read, expected, strict=True):
        assert_same_batch(batch, expected_batch)
    ids = np.concatenate([batch.id for batch in read])
    assert {11} & set(ids) or {11} & set(splits[0]["valid"].ids)
    weights = {int(i): float(w) for batch in read for i, w in zip(batch.id, batch.weight, strict=True)}
    assert all(weight == (i != 11) for i, weight in weights.items())


# --- Evaluation ---


@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("hosts", [1, 2])
def test_eval_batches_contain_every_row_once_and_pad_the_last(hosts, mode, splits):
    split = splits[mode]["test"]
    shares = [list(pipeline.eval_batches(split, batch_size=B, host=h, hosts=hosts)) for h in range(hosts)]
    batches = [concatenate(host_batches) for host_batches in zip(*shares, strict=True)]
    ids = np.concatenate([batch.id for batch in batches])
    weight = np.concatenate([batch.weight for batch in batches])
    assert ids.tolist() == [*range(21), -1, -1, -1]
    assert weight.tolist() == [float(i != 11) for i in range(21)] + [0] * 3
    last = batches[-1]
    assert not last.inputs["image"][5:].any()
    assert not any(last.present[m][5:].any() or last.mask[m][5:].any() for m in last.present)


def test_to_device_prefetches_and_keeps_the_order():
    log = []

    def batches():
        for i in range(5):
            log.append(f"read {i}")
            yield i

    for host, device in pipeline.to_device(batches(), lambda i: log.append(f"put {i}") or i * 10):
        assert device == host * 10
        log.append(f"use {host}")
    assert [entry for entry in log if entry.startswith("use")] == [f"use {i}" for i in range(5)]
    assert log.index("put 2") < log.index("use 0") < log.index("put 3") < log.index("use 1")
