"""Folds, leave-one-group-out and splits by time: of values, of planted datasets and of tables."""

import datetime
from collections import Counter

import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.data import dataset, folds, leakage, opening
from mmfusion.data.sources import Source
from tests import planted
from tests.data.test_table_dataset import load as load_table
from tests.data.test_table_dataset import table, write  # noqa: F401 (fixture)
from tests.errors import rejects


def load(**changes):
    return dataset.load(configs.read(planted.config("text", **changes)).data, seed=0)


def test_equal_folds_are_stratified_and_of_equal_size():
    classes = ["a"] * 23 + ["b"] * 8 + ["c"] * 2
    fold = folds.equal_folds(range(33), 5, classes)
    by_class = {label: Counter(fold[np.array(classes) == label].tolist()) for label in "abc"}
    assert sorted(by_class["a"].values()) == [4, 4, 5, 5, 5]
    assert sorted(by_class["b"].values()) == [1, 1, 2, 2, 2]
    assert sorted(Counter(fold.tolist()).values()) == [6, 6, 7, 7, 7]


def test_equal_folds_keep_groups_together_and_balance_their_rows():
    groups = [name for name, size in zip("abcdefg", (9, 8, 7, 3, 2, 2, 1), strict=True) for _ in range(size)]
    fold = folds.equal_folds(groups, 3)
    assert all(len(set(fold[np.array(groups) == name])) == 1 for name in "abcdefg")
    assert sorted(Counter(fold.tolist()).values()) == [10, 11, 11]  # a, b and c apart, then the smaller ones
    order = np.random.default_rng(0).permutation(len(groups))
    np.testing.assert_array_equal(folds.equal_folds([groups[i] for i in order], 3), fold[order])
    *small, large = sorted("abcdefg", key=folds.hash_order)
    assert np.bincount(folds.equal_folds([*small, *[large] * 6], 2)).tolist() == [6, 6]  # the largest first
    # Each class is balanced by itself: a large group, and three of the six single rows in each of the other folds.
    fold = folds.equal_folds([*["x"] * 6, *range(6), *["y"] * 6, *range(6, 12)], 3, ["a"] * 12 + ["b"] * 12)
    assert [sorted(np.bincount(part)) for part in (fold[:12], fold[12:])] == [[3, 3, 6], [3, 3, 6]]
    with rejects("config.data.folds", 8, says="at most 7"):
        folds.equal_folds(groups, 8)


def test_equal_folds_are_platform_independent():
    assert folds.equal_folds(range(12), 3, ["a", "b"] * 6).tolist() == [0, 2, 1, 2, 2, 0, 0, 1, 1, 1, 2, 0]


def test_given_folds_are_numbers_or_places_in_order():
    fold, names = folds.given_folds([3, "1", 3.0, 7], range(4), "fold")
    assert (fold.tolist(), names) == ([3, 1, 3, 7], {1: "1", 3: "3", 7: "7"})
    fold, names = folds.given_folds(["eva", b"bob", "eva"], range(3), "speaker")
    assert (fold.tolist(), names) == ([1, 0, 1], {0: "bob", 1: "eva"})
    fold, names = folds.given_folds(["01", "1"], range(2), "fold")  # different values, one number
    assert names == {0: "01", 1: "1"}
    for values, fact in ((["a", None], "row 8"), ([2, -1], "negative"), ([1, 1.0], "two values")):
        with rejects("config.data.fold_by", "fold", says=fact):
            folds.given_folds(values, [5, 8], "fold")


def test_times_are_exact_and_of_one_form():
    large = 2**60
    assert folds.times([large + 1, str(large), 2.5], range(3), "t") == [large + 1, large, 2.5]
    same = ["2024-05-31T14:00+02:00", "2024-05-31 12:00", np.datetime64("2024-05-31T12:00")]
    assert len(set(folds.times([*same, datetime.datetime(2024, 5, 31, 12)], range(4), "t"))) == 1
    first, second = folds.times(["2024-05-31", "2024-06-01"], range(2), "t")
    assert second - first == 86_400 * 10**6
    for values, fact in (
        ([1, ""], "row 7 has no value"), ([1, np.nan], "row 7 has no value"),
        (["2024-05-31", np.datetime64("NaT", "s")], "row 7 has no value"), ([1, "x"], "row 7 has 'x'"),
        ([1, np.inf], "row 7 has 'inf'"), ([1, "2024-05-31"], "a number in row 3 and a date in row 7"),
    ):  # fmt: skip
        with rejects("config.data.time", "t", says=fact):
            folds.times(values, [3, 7], "t")


def test_latest_keeps_equal_times_on_one_side():
    ordered = [1, 2, 2, 2, 3, 3, 4, 4, 4, 4]
    assert folds.latest(ordered, 0.4, 1).tolist() == [time >= 4 for time in ordered]
    assert folds.latest(ordered, 0.55, 1).tolist() == [time >= 3 for time in ordered]  # 6 rows are nearer than 4
    assert folds.latest(ordered, 0.01, 1).sum() == 4  # never none
    assert folds.latest(ordered, 0.99, 2).sum() == 6  # two times remain
    with rejects("config.data.time", None, says="has 2"):
        folds.latest([1, 2, 2], 0.5, 2)


def test_folds_of_a_dataset_test_every_row_once(monkeypatch):
    rows = [planted.row(i) for i in range(61)]
    planted.plant(monkeypatch, train=rows)  # has no test split, and is not asked for one
    tested = []
    for fold in range(5):
        data = load(data__folds=5, data__fold=fold, data__group="group")
        ids = {name: split.ids for name, split in data.splits.items()}
        assert sorted(np.concatenate(list(ids.values()))) == list(range(61))
        groups = {name: {i // 2 for i in part} for name, part in ids.items()}
        assert not groups["train"] & groups["test"] and not groups["valid"] & (groups["train"] | groups["test"])
        assert abs(np.mean(ids["test"] % 2) - 0.5) < 0.1
        assert f"test is {len(ids['test'])} rows of train, fold {fold} of 5, stratified by class, " in data.notes[0]
        tested += ids["test"].tolist()
    assert sorted(tested) == list(range(61))
    assert opening.fold_numbers(configs.read(planted.config(data__folds=3)).data) == [0, 1, 2]


def test_folds_of_a_dataset_keep_its_validation_split_and_fit_on_train_only(monkeypatch):
    rows = [planted.row(i, text=f"row own{i}") for i in range(20)]
    planted.plant(monkeypatch, train=rows, validation=[planted.row(100 + i) for i in range(6)])
    data = load(data__folds=4, data__fold=1, data__valid="validation")
    assert [len(data.splits[name]) for name in ("train", "valid", "test")] == [15, 6, 5]
    words = data.reader.fitted["text"].get_vocab()
    assert {word for word in words if word.startswith("own")} == {f"own{i}" for i in data.splits["train"].ids}
    restored = dataset.load(
        configs.read(planted.config("text", data__folds=4, data__fold=1, data__valid="validation")).data,
        seed=0, splits=("test",), saved=data.saved(),
    )  # fmt: skip
    np.testing.assert_array_equal(restored.splits["test"].ids, data.splits["test"].ids)


def test_folds_may_share_the_stored_rows_of_train():
    source = Source([planted.row(0)], {}, "d", slices=(("d:train", 0, 10),))
    opened = dict.fromkeys(("train", "valid", "test"), source)
    leakage.check(configs.read(planted.config("text", data__folds=3)).data, opened)
    with rejects("config.data.test", "test", says="10 rows in common"):
        leakage.check(configs.read(planted.config("text")).data, opened)


def test_leave_one_group_out_of_a_dataset(monkeypatch):
    rows = [planted.row(i, group=("ann", "bob", "eva")[i % 3]) for i in range(30)]
    planted.plant(monkeypatch, train=rows)
    data = load(data__fold_by="group", data__fold=1)
    assert data.splits["test"].ids.tolist() == list(range(1, 30, 3))
    assert data.notes[0].startswith("test is 10 rows of train, with 'group' 'bob', fold 1 of 3; a test split ")
    assert opening.fold_numbers(configs.read(planted.config(data__fold_by="group")).data) == [0, 1, 2]
    with rejects("config.data.fold", 3, "2"):
        load(data__fold_by="group", data__fold=3)
    with rejects("config.data.fold_by", "grop", "group"):
        load(data__fold_by="grop")
    rows[4]["text"] = rows[5]["text"] = "row of one speaker"  # as a group, it has rows in two folds
    with rejects("config.data.group", "text", says="has rows in folds 1 and 2"):
        load(data__fold_by="group", data__group="text")


def test_time_divides_a_dataset(monkeypatch):
    times = [f"2024-01-{1 + (i * 7) % 20:02d}" for i in range(40)]  # each day twice
    planted.plant(monkeypatch, train=[planted.row(i, amount=times[i]) for i in range(40)])
    data = load(data__time="amount", data__test_fraction=0.3, data__valid_fraction=0.25)
    found = {name: sorted({times[i] for i in split.ids}) for name, split in data.splits.items()}
    days = [f"2024-01-{day:02d}" for day in range(1, 21)]
    # 12 of 40 rows, then 7 of 28 (6 or 8 keep the days whole; the larger comes first).
    assert found == {"train": days[:10], "valid": days[10:14], "test": days[14:]}
    assert [len(split) for split in data.splits.values()] == [20, 8, 12]
    assert "valid is 8 rows from 2024-01-11 on, test 12 rows from 2024-01-15 on" in data.notes[0]


def test_table_takes_folds_from_a_column(table, tmp_path):  # noqa: F811
    for i, row in enumerate(table):
        row["fold"] = i % 4 + 1
    path = write(tmp_path / "t.csv", table)
    data, config = load_table(path)
    assert (config.data.fold_by, config.data.fold) == ("fold", 1)
    assert "fold" not in config.data.modalities.table.feature
    assert data.splits["test"].ids.tolist() == list(range(0, 60, 4))
    data, _ = load_table(path, fold=3)
    assert data.splits["test"].ids.tolist() == list(range(2, 60, 4))
    assert opening.fold_numbers(configs.read(config).data) == [1, 2, 3, 4]
    with rejects("config.data.fold", 0, says="no such fold"):
        load_table(path, fold=0)
    _, config = load_table(path, columns=("fold",))  # as an input
    assert (config.data.fold_by, config.data.modalities.table.feature) == ("", "fold")
    table[9]["fold"] = ""
    with rejects("config.data.fold_by", "fold", says="row 9"):
        load_table(write(path, table))


def test_table_folds_leave_its_test_rows_unused(table, tmp_path):  # noqa: F811
    for i, row in enumerate(table):
        row["split"] = ("train", "train", "val", "test")[i % 4]
    data, _ = load_table(write(tmp_path / "t.csv", table), folds=3)
    parts = {name: split.ids % 4 for name, split in data.splits.items()}
    assert set(parts["valid"]) == {2} and set(parts["train"]) | set(parts["test"]) == {0, 1}
    assert (len(parts["train"]), len(parts["test"])) == (20, 10)
    assert any("a test split of the dataset's own is not used" in note for note in data.notes)


def test_table_folds_have_the_classes_of_all_folds(table, tmp_path):  # noqa: F811
    table[5]["label"] = "unique"
    for fold in range(3):
        data, _ = load_table(write(tmp_path / "t.csv", table), folds=3, fold=fold)
        assert data.class_names == {"label": ("even", "odd", "unique")}
        missing = "1 of the 3 classes of 'label' have no row in"
        assert (f"{missing} train" in data.notes) == (5 in data.splits["test"].ids)


def test_table_is_divided_by_time(table, tmp_path):  # noqa: F811
    path = write(tmp_path / "t.csv", [{**row, "when": (i * 37) % 60 // 3} for i, row in enumerate(table)])
    data, _ = load_table(path, time="when", columns=("caption",))
    when = {name: {(int(i) * 37) % 60 // 3 for i in split.ids} for name, split in data.splits.items()}
    assert when == {"train": set(range(14)), "valid": {14, 15}, "test": {16, 17, 18, 19}}
    assert sum(map(len, data.splits.values())) == 60
    table[8]["when"] = ""
    with rejects("config.data.time", "when", says="row 8 has no value"):
        load_table(write(path, [{"when": i, **row} for i, row in enumerate(table)]), time="when", columns=("caption",))
    for i, row in enumerate(table):
        row |= {"when": i, "split": ("train", "valid")[i % 2]}
    with rejects("config.data.time", "when", says="the column split of the table has such rows"):
        load_table(write(path, table), time="when", columns=("caption",), valid="")


def test_table_says_how_its_test_split_was_made(table, tmp_path):  # noqa: F811
    data, _ = load_table(write(tmp_path / "t.csv", table))
    assert data.notes[0] == "test is 12 rows held out of the table, stratified by class"
    for i, row in enumerate(table):
        row["split"] = ("train", "test")[i % 4 == 0]
    data, _ = load_table(write(tmp_path / "t.csv", table))
    assert data.notes[0] == "test is 15 rows of the column 'split'"


def test_table_rows_read_no_file_for_a_column(table, tmp_path, monkeypatch):  # noqa: F811
    from mmfusion.data import table_dataset
    from mmfusion.data.rows import feature_values

    source = table_dataset.open_table_source(configs.read(load_table(write(tmp_path / "t.csv", table))[1]).data)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: pytest.fail(f"reads {path}"))
    assert feature_values(source.rows, np.array([2, 5]), "label") == [0, 1]
