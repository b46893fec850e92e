"""Balanced classes and weighted rows."""

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from mmfusion import config as configs
from mmfusion.data import dataset, pipeline, targets
from mmfusion.data.split import rows_by_class
from mmfusion.training.evaluation import collect
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted
from tests.data.test_pipeline import assert_same_batch
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")

LABELS = np.random.default_rng(0).choice([0, 1, 3], size=200, p=[0.9, 0.07, 0.03])  # class 2 has no row
CLASSES = rows_by_class(LABELS)


def load(monkeypatch, rows, *, modalities="text", saved=None, **changes):
    planted.plant(monkeypatch, train=rows, test=rows[:4])
    config = planted.config(modalities, **changes)
    return dataset.load(configs.read(config).data, seed=0, saved=saved)


# --- Class weights ---


def test_balanced_weights_equal_scikit_learn():
    expected = compute_class_weight("balanced", classes=np.unique(LABELS), y=LABELS)
    weights = targets.balanced_weights(LABELS, 4)
    assert np.array(weights)[[0, 1, 3]].tolist() == pytest.approx(expected.tolist())
    assert weights[2] == 0
    assert np.mean(np.array(weights)[LABELS]) == pytest.approx(1)


def test_balanced_weights_are_of_the_training_rows_and_saved(monkeypatch):
    rows = [planted.row(i, label=int(i % 5 == 0)) for i in range(40)]
    changes = {"data__targets__label__class_weights": "balanced"}
    loaded = load(monkeypatch, rows, **changes)
    labels = loaded.splits["train"].arrays.targets["label"]
    assert 0 < len(labels) < 40
    assert loaded.class_weights == {"label": targets.balanced_weights(labels, 2)}
    other = [planted.row(i, label=1 - i % 2) for i in range(40)]
    assert load(monkeypatch, other, saved=loaded.saved(), **changes).class_weights == loaded.class_weights
    assert load(monkeypatch, rows).class_weights == {}


# --- Sampler ---


@pytest.mark.parametrize("batch_size", [2, 32, 64])
def test_balanced_batches_have_every_class_equally_often(batch_size):
    total = np.zeros(4, int)
    for step in range(60):
        positions = pipeline.balanced_positions(7, step, classes=CLASSES, batch_size=batch_size)
        counts = np.bincount(LABELS[positions], minlength=4)
        assert counts[2] == 0 and np.ptp(counts[[0, 1, 3]]) <= 1
        total += counts
    assert total[[0, 1, 3]] == pytest.approx(60 * batch_size / 3, rel=0.25)


def test_balanced_batches_are_in_range_and_reach_every_row():
    positions = np.concatenate(
        [pipeline.balanced_positions(0, step, classes=CLASSES, batch_size=64) for step in range(100)]
    )
    assert set(positions.tolist()) == set(range(200))
    assert np.mean(LABELS[positions[0::2]] == LABELS[positions[1::2]]) == pytest.approx(1 / 3, abs=0.05)  # shuffled


def test_balanced_positions_depend_on_seed_and_step_only():
    first, again, step, seed = (
        pipeline.balanced_positions(*key, classes=CLASSES, batch_size=32) for key in ((0, 3), (0, 3), (0, 4), (1, 3))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, step) and not np.array_equal(first, seed)


def test_balanced_batches_are_the_same_in_memory_and_streamed_and_resumed(monkeypatch):
    changes = {3: {"text": ""}, 15: {"image": b"no image"}}  # the latter cannot be read
    rows = [planted.row(i, label=int(i % 5 == 0), **changes.get(i, {})) for i in range(60)]
    options = {"modalities": "image+text", "data__sampler": "balanced", "data__max_bad_fraction": 0.2}
    splits = [load(monkeypatch, rows, data__memory_gb=gb, **options).splits["train"] for gb in (1.0, 0.0)]
    assert splits[0].arrays is not None and splits[1].arrays is None
    memory, streamed = (list(pipeline.train_batches(split, seed=0, batch_size=8, first=0, last=6)) for split in splits)
    resumed = list(pipeline.train_batches(splits[1], seed=0, batch_size=8, first=4, last=6))
    for batch, expected in zip([*streamed, *resumed], [*memory, *memory[4:]], strict=True):
        assert_same_batch(batch, expected)
    labels = {i: row["label"] for i, row in enumerate(rows)}
    assert all(sum(labels[i] for i in batch.id.tolist()) == 4 for batch in memory)


def test_uniform_sampler_is_the_default(monkeypatch):
    split = load(monkeypatch, [planted.row(i) for i in range(40)]).splits["train"]
    assert split.classes is None
    expected = pipeline.train_positions(0, 2, size=len(split), batch_size=8)
    np.testing.assert_array_equal(pipeline.batch_positions(split, 0, 2, 8), expected)


# --- Weights of rows ---


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_row_weights_are_read_and_do_not_mark_a_row_as_unreadable(monkeypatch, gigabytes):
    rows = [planted.row(i, importance=i / 4) for i in range(40)]
    split = load(monkeypatch, rows, data__weight_feature="importance", data__memory_gb=gigabytes).splits["train"]
    batch = split.take(np.array([0, 1, 5, -1]))
    np.testing.assert_array_equal(batch.row_weight, [*(split.ids[[0, 1, 5]] / 4), 0])
    np.testing.assert_array_equal(batch.weight, [1, 1, 1, 0])
    np.testing.assert_array_equal(batch.loss_weight("label"), batch.row_weight)
    assert load(monkeypatch, rows).splits["train"].take(np.array([0])).row_weight is None


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), "much", None])
def test_row_weight_that_is_no_weight_is_an_error_of_the_row(monkeypatch, value):
    rows = [planted.row(i, importance=value if i == 7 else 1.0) for i in range(40)]
    loaded = load(monkeypatch, rows, data__weight_feature="importance", data__max_bad_fraction=0.1)
    bad = {i: reason for split in loaded.splits.values() for i, reason in split.bad.items()}
    assert list(bad) == [7]
    assert bad[7].startswith("row 7, weight 'importance': must be a finite number and at least 0, got")


def test_row_weight_needs_a_feature_of_the_dataset(monkeypatch):
    with rejects("config.data.weight_feature", "importanc", "importance"):
        load(monkeypatch, [planted.row(i, importance=1.0) for i in range(40)], data__weight_feature="importanc")


def test_row_weight_of_zero_in_every_row_is_refused(monkeypatch):
    with rejects("config.data.weight_feature", "importance", says="0 in every row of split 'train'"):
        load(monkeypatch, [planted.row(i, importance=0) for i in range(40)], data__weight_feature="importance")


# --- A run ---


@pytest.mark.loop
def test_run_trains_on_balanced_and_weighted_rows(monkeypatch, tmp_path):
    rows = [planted.row(i, label=int(i % 5 == 0), importance=1 + i % 3) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows[:20])
    config = planted.config(
        "text", data__targets__label__class_weights="balanced", data__sampler="balanced",
        data__weight_feature="importance", data__allow_leakage=True,
    )  # fmt: skip
    result = train(config, tmp_path / "run")
    run = open_run(tmp_path / "run", ["test"])
    weights = np.array(run.setup.tasks["label"].class_weights)
    assert weights[1] > 1 > weights[0] > 0
    collected = collect(run.setup.compile_eval_step(), run.state, run.dataset.splits["test"], run.setup, batch_size=8)
    labels, importance = (np.array([row[name] for row in rows[:20]]) for name in ("label", "importance"))
    expected = weights[labels] * importance
    np.testing.assert_allclose(collected["loss_weight"]["label"], expected, rtol=1e-6)
    loss = np.average(collected["loss"]["label"], weights=expected)
    right = collected["logits"]["label"].argmax(1) == labels
    assert result["test"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["test"]["accuracy"] == pytest.approx(right.mean())  # every row counts once
