import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.data import dataset, leakage, sources
from tests import planted
from tests.errors import rejects


def load(**changes):
    return dataset.load(configs.read(planted.config("image+text", **changes)).data, seed=0)


def rows(*numbers, **changes):
    return [planted.row(i, **changes) for i in numbers]


def test_load_reports_copies_of_train_rows(monkeypatch):
    train = rows(*range(40))
    copies = [planted.row(0), planted.row(1), planted.row(2, text="another"), *rows(*range(300, 307))]
    planted.plant(monkeypatch, train=train, validation=rows(*range(100, 110)), test=copies)
    # Rows 0 and 1 are copies; of row 2 the image only. Images repeat with every 200th row, texts do not.
    expected = "2 of the 10 rows of test are exact copies of rows of train (image 3, text 2)"
    assert expected in load(data__valid="validation", data__valid_fraction=0.0).notes


def test_duplicates_do_not_count_absent_modalities():
    train = {"image": np.array([0, 5], np.uint64), "text": np.array([7, 0], np.uint64)}
    test = {"image": np.array([0, 5, 0], np.uint64), "text": np.array([7, 8, 0], np.uint64)}
    assert leakage.duplicates(train, test) == {"rows": 1, "image": 1, "text": 1}


def test_load_rejects_a_target_among_the_inputs(monkeypatch):
    planted.plant(monkeypatch, train=rows(*range(40)), test=rows(*range(9)))
    with rejects("config.data.modalities.text.feature", "label", says="allow_leakage"):
        load(data__modalities__text__feature="label")
    load(data__modalities__text__feature="label", data__allow_leakage=True)


def shapes(data_dir):
    return {"data__name": "shapes/match", "data__dir": data_dir, "data__modalities__text__feature": "sentence"}


@pytest.mark.parametrize(
    ("splits", "path"),
    [
        ({"train": "train[:60%]", "test": "train[50%:]"}, "config.data.test"),
        ({"train": "train", "test": "test", "valid": "train[:10%]"}, "config.data.valid"),
        ({"train": "train+test", "test": "test"}, "config.data.test"),
    ],
)
def test_load_rejects_overlapping_splits(splits, path, data_dir):
    with rejects(path, splits[path.rpartition(".")[2]], says="rows in common with train"):
        load(**shapes(data_dir), **{f"data__{name}": expression for name, expression in splits.items()})


def test_load_accepts_adjacent_slices(data_dir):
    data = load(**shapes(data_dir), data__train="train[:60]", data__valid="train[60:80]", data__test="train[80:100]")
    assert [len(split) for split in data.splits.values()] == [60, 20, 20]
    source = sources.open_source("shapes/match", "train[5:8]", data_dir=data_dir, manual_dir="", seed=0)
    assert source.slices[0][1:] == (5, 8)
