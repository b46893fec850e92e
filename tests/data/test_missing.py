"""Simulated missing modalities (`data.missing`): rate, determinism and invariants."""

import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.data import dataset
from mmfusion.data.missing import keep_masks
from tests import planted, tiny
from tests.errors import rejects

IDS = np.arange(20_000)


def test_keep_masks_drop_at_the_rate_but_never_the_last_modality():
    keep = keep_masks(IDS, ["text", "image"], 0.5)
    dropped = {m: 1 - keep[m].mean() for m in keep}
    # A quarter of the rows would lose both.
    assert dropped == pytest.approx({"image": 0.5 - 0.125, "text": 0.5 - 0.125}, abs=0.01)
    assert (keep["image"] | keep["text"]).all()
    assert abs((keep["image"] & keep["text"]).mean() - 0.25) < 0.01


def test_keep_masks_depend_on_id_and_modality_name_only():
    masks, subset = keep_masks(IDS, ["a", "b", "c"], 0.3), keep_masks(IDS[500:600], ["c", "a", "b"], 0.3)
    for m, keep in subset.items():
        np.testing.assert_array_equal(keep, masks[m][500:600])
    higher_rate = keep_masks(IDS, ["a", "b", "c"], 0.6)
    for m in "abc":
        restored = higher_rate[m] & ~masks[m]
        assert not restored.any()  # the last modality of a row was also kept at the lower rate


def test_keep_masks_keep_all_at_rate_0_and_one_at_rate_1():
    assert all(keep.all() for keep in keep_masks(IDS, "ab", 0.0).values())
    keep_one = keep_masks(IDS, "ab", 1.0)
    assert (keep_one["a"] ^ keep_one["b"]).all()
    assert all(keep.all() for keep in keep_masks(IDS, "a", 0.9).values())


def test_keep_masks_drop_only_the_named_modalities():
    keep = keep_masks(IDS, ["a", "b", "c"], 0.75, only=["b"])
    assert keep["a"].all() and keep["c"].all() and keep["b"].mean() == pytest.approx(0.25, abs=0.01)
    both = keep_masks(IDS, ["a", "b"], 1.0, only=["a", "b"])
    assert (both["a"] ^ both["b"]).all()  # one modality stays


def test_missing_in_names_modalities_of_the_data():
    config = tiny.config(changes={"data.missing": 0.5, "data.missing_in": "image+depth"})
    with rejects("config.data.missing_in", value="depth", suggests="text"):
        configs.check(config)
    defaults.keep_modalities(config, "image")
    assert config.data.missing_in == "image"
    configs.check(config)


@pytest.mark.parametrize("only", ["", "image"])
@pytest.mark.parametrize("gb", [4.0, 0.0])
def test_missing_applies_to_the_train_split_only(gb, only, monkeypatch):
    planted.plant(monkeypatch, train=[planted.row(i) for i in range(100)], test=[planted.row(i) for i in range(40)])
    splits = dataset.load(
        configs.read(planted.config(data__missing=0.5, data__missing_in=only, data__memory_gb=gb)).data, seed=0
    ).splits
    plain = dataset.load(configs.read(planted.config(data__memory_gb=gb)).data, seed=0).splits
    for name, split in splits.items():
        positions = np.arange(len(split))
        batch, before = split.take(positions), plain[name].take(positions)
        keep = keep_masks(batch.id, list(batch.present), 0.5, only.split()) if name == "train" else {}
        for m, present in batch.present.items():
            np.testing.assert_array_equal(present, before.present[m] & keep.get(m, True))
    assert any((~present).any() for present in splits["train"].take(np.arange(40)).present.values())
