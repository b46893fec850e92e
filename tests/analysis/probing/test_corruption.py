"""Corruptions: the values they may change, their randomness, and the areas of known curves."""

import difflib

import numpy as np
import pytest

from mmfusion.analysis.probing.corruption import CORRUPTIONS, corrupt, effective_robustness, relative_robustness
from mmfusion.data.batch import Batch
from mmfusion.data.modalities import MODALITY_TYPES
from tests.analysis.probing.spoiled import ABSENT, PADDING, ROWS, corrupt_batch, corruptible_rows, make_batch, real
from tests.errors import rejects

EVERY = [(kind, name) for kind, names in CORRUPTIONS.items() for name in names]


def take(batch, positions):
    fields = {
        f: {k: v[positions] for k, v in getattr(batch, f).items()} for f in ("inputs", "mask", "present", "targets")
    }
    return Batch(**fields, weight=batch.weight[positions], id=batch.id[positions])


def test_corruptions_exist_for_every_modality_type():
    assert set(CORRUPTIONS) == set(MODALITY_TYPES)


@pytest.mark.parametrize(("kind", "name"), EVERY)
@pytest.mark.parametrize("severity", [0.0, 0.01, 0.5, 1.0])
def test_corrupt_changes_only_rows_with_the_modality(kind, name, severity):
    batch = make_batch()
    before = batch.inputs[kind].copy(), batch.mask[kind].copy()
    after = corrupt_batch(batch, kind, name, severity)
    for old, new in ((batch.inputs, after.inputs), (batch.mask, after.mask)):
        assert new[kind].shape == old[kind].shape
        assert new[kind].dtype == old[kind].dtype
        for row in range(ROWS) if severity == 0 else (ABSENT, *range(PADDING, ROWS)):
            assert new[kind][row].tobytes() == old[kind][row].tobytes()
        assert all(new[other] is old[other] for other in old if other != kind)
    assert (after.present, after.targets) == (batch.present, batch.targets)
    assert after.weight is batch.weight
    assert after.id is batch.id
    assert batch.inputs[kind].tobytes() == before[0].tobytes()
    assert batch.mask[kind].tobytes() == before[1].tobytes()
    if severity == 1:
        changed = [not np.array_equal(real(after, kind, row), real(batch, kind, row)) for row in corruptible_rows()]
        assert np.mean(changed) > 0.8  # a text of one token has nothing to drop or swap


def test_corrupt_leaves_fully_masked_rows_unchanged():
    batch = make_batch()
    mask = batch.mask["text"].copy()
    mask[0] = False
    for name in CORRUPTIONS["text"]:
        after = corrupt_batch(batch.replace(mask={**batch.mask, "text": mask}), "text", name, 1.0)
        np.testing.assert_array_equal(after.inputs["text"][0], batch.inputs["text"][0])


def distance(old, new, kind):
    if kind == "text":
        return 1 - difflib.SequenceMatcher(None, old.tolist(), new.tolist(), autojunk=False).ratio()
    return float(np.mean(np.square(old.astype(float) - new)))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_corrupt_distance_increases_with_severity(kind, name):
    batch = make_batch()
    means = []
    for severity in (0.0, 0.25, 0.5, 0.75, 1.0):
        after = corrupt_batch(batch, kind, name, severity)
        means.append(np.mean([distance(real(batch, kind, r), real(after, kind, r), kind) for r in corruptible_rows()]))
    assert means[0] == 0
    assert (np.diff(means) > 0).all(), means


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_corrupt_depends_on_example_id_and_seed_only(kind, name):
    batch = make_batch()
    after = corrupt_batch(batch, kind, name, 0.7)
    for positions in (np.arange(ROWS)[::-1], np.array([11]), np.array([5, 0, 30])):
        subset = corrupt_batch(take(batch, positions), kind, name, 0.7)
        np.testing.assert_array_equal(subset.inputs[kind], after.inputs[kind][positions])
        np.testing.assert_array_equal(subset.mask[kind], after.mask[kind][positions])
    repeated = take(batch, np.full(20, 5))
    same_ids, distinct_ids = (
        corrupt_batch(repeated, kind, name, 0.7),
        corrupt_batch(repeated.replace(id=np.arange(20)), kind, name, 0.7),
    )
    assert (same_ids.inputs[kind] == same_ids.inputs[kind][0]).all()
    is_random = name not in ("blur", "compression")
    assert (distinct_ids.inputs[kind] != distinct_ids.inputs[kind][0]).any() == is_random
    assert (corrupt_batch(batch, kind, name, 0.7, seed=1).inputs[kind] != after.inputs[kind]).any() == is_random


def test_corruptions_of_a_row_use_different_random_numbers(monkeypatch):
    monkeypatch.setitem(CORRUPTIONS["image"], "other", CORRUPTIONS["image"]["gaussian"])
    one, other = (corrupt_batch(make_batch(), "image", name, 0.5).inputs["image"][0] for name in ("gaussian", "other"))
    assert np.mean(one == other) < 0.3


def test_robustness_matches_the_areas_of_known_curves():
    x = np.linspace(0, 1, 11)
    assert relative_robustness(x, np.ones(11)) == pytest.approx(1)
    assert relative_robustness(x, 1 - x) == pytest.approx(0.5)
    assert relative_robustness([0, 0.1, 1], [1, 0, 0]) == pytest.approx(0.05)  # unequal steps
    reference = 0.9 - 0.5 * x**2
    assert effective_robustness(x, reference, reference) == 0
    assert effective_robustness(x, reference + 0.07, reference) == pytest.approx(0)
    assert effective_robustness(x, 0.3 - 0.1 * x, 0.9 - 0.5 * x) == pytest.approx(0.2)
    assert effective_robustness(x, 0.9 - 0.5 * x, 0.3 - 0.1 * x) == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "severities", [[0], [], [0, 0.5], [0.1, 1], [0, 0.5, 0.5, 1], [0, 0.7, 0.3, 1], [0, np.nan, 1]]
)
def test_robustness_rejects_invalid_severities(severities):
    with pytest.raises(ValueError, match="must increase from 0 to 1, at least two"):
        relative_robustness(severities, np.ones(len(severities)))
    with pytest.raises(ValueError, match="must increase from 0 to 1, at least two"):
        effective_robustness(severities, np.ones(len(severities)), np.ones(len(severities)))


def test_robustness_rejects_curves_of_another_length():
    with pytest.raises(ValueError, match=r"each of the 2 severities, got \[3\]"):
        relative_robustness([0, 1], [1, 1, 1])
    with pytest.raises(ValueError, match=r"each of the 2 severities, got \[2, 3\]"):
        effective_robustness([0, 1], [1, 1], [1, 1, 1])


def test_corrupt_rejects_unknown_names_and_severities():
    batch = make_batch()
    with rejects("kind", "imag", "image"):
        corrupt(batch, "image", "imag", "blur", 0.5, 0)
    with rejects("corruption", "blurr", "blur"):
        corrupt(batch, "image", "image", "blurr", 0.0, 0)
    for severity in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            corrupt(batch, "image", "image", "blur", severity, 0)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        corrupt(batch, "text", "text", "typo", 0.5, 0)
