"""Rows that lack a modality: how many, which, and what never changes."""

import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.data import dataset
from mmfusion.data.missing import keep_masks
from tests import planted

IDS = np.arange(20_000)


def test_keep_masks_drop_at_the_rate_but_never_the_last_modality():
    keep = keep_masks(IDS, ["text", "image"], 0.5)
    lost = {m: 1 - keep[m].mean() for m in keep}
    assert lost == pytest.approx({"image": 0.5 - 0.125, "text": 0.5 - 0.125}, abs=0.01)  # a quarter would lose both
    assert (keep["image"] | keep["text"]).all()
    assert abs((keep["image"] & keep["text"]).mean() - 0.25) < 0.01


def test_keep_masks_depend_on_the_id_and_the_name_alone():
    whole, part = keep_masks(IDS, ["a", "b", "c"], 0.3), keep_masks(IDS[500:600], ["c", "a", "b"], 0.3)
    for m, keep in part.items():
        np.testing.assert_array_equal(keep, whole[m][500:600])
    more = keep_masks(IDS, ["a", "b", "c"], 0.6)
    for m in "abc":
        came_back = more[m] & ~whole[m]
        assert not came_back.any()  # of three, one stays as the last of its row, and had stayed before


def test_keep_masks_of_rate_0_keep_all_and_of_rate_1_one():
    assert all(keep.all() for keep in keep_masks(IDS, "ab", 0.0).values())
    nearly = keep_masks(IDS, "ab", 1.0)
    assert (nearly["a"] ^ nearly["b"]).all()
    assert all(keep.all() for keep in keep_masks(IDS, "a", 0.9).values())


@pytest.mark.parametrize("gb", [4.0, 0.0])
def test_train_alone_drops_modalities_in_memory_and_streamed(gb, monkeypatch):
    planted.plant(monkeypatch, train=[planted.row(i) for i in range(100)], test=[planted.row(i) for i in range(40)])
    splits = dataset.load(configs.read(planted.config(data__missing=0.5, data__memory_gb=gb)).data, seed=0).splits
    plain = dataset.load(configs.read(planted.config(data__memory_gb=gb)).data, seed=0).splits
    for name, split in splits.items():
        places = np.arange(len(split))
        batch, before = split.take(places), plain[name].take(places)
        keep = keep_masks(batch.id, list(batch.present), 0.5) if name == "train" else {}
        for m, present in batch.present.items():
            np.testing.assert_array_equal(present, before.present[m] & keep.get(m, True))
    assert any((~present).any() for present in splits["train"].take(np.arange(40)).present.values())
