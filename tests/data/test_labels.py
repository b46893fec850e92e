"""Labels that are missing in part or in a whole split, labels of every type and format, and nested features."""

import csv
import json

import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.config.from_table import propose
from mmfusion.data import dataset, sources, targets
from mmfusion.data.features import Feature
from mmfusion.data.rows import PreparedRows
from tests import planted, tiny
from tests.errors import rejects

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".npz")


def flat(row, prefix=""):
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def write(path, rows):
    """Writes rows, of which nested ones become columns `OUTER/INNER` where the format has no objects."""
    flattened = [dict(flat(row)) for row in rows]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(flattened[0]), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(flattened)
    elif path.suffix in (".jsonl", ".json"):
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        np.savez(path, **{name: np.array([row[name] for row in flattened]) for name in flattened[0]})
    return path


def load(path, label, **changes):
    config, args = defaults.begin("", "concat")
    propose(config, str(path), label)
    for name, value in changes.items():
        config.data[name] = value
    defaults.finish(config, args)
    return dataset.load(configs.read(config).data, seed=0), config


def rows(count=60, **columns):
    """Returns rows with a number, and the values that functions of the row's number give the other columns."""
    return [{"x": (i * 7919 % 101) / 7, **{name: value(i) for name, value in columns.items()}} for i in range(count)]


def load_planted(monkeypatch, train, test, labels="label", feature="class", **changes):
    """Loads planted rows whose feature `label` is a class feature of TFDS, or a plain number."""
    features = {"label": Feature(feature, class_names=planted.CLASSES["label"])}

    def open_source(name, split, **_):
        names = {name: tuple(planted.CLASSES[name]) for name in ("label",)}
        return sources.Source({"train": train, "test": test}[split], names, f"planted:{split}", features)

    monkeypatch.setattr(sources, "open_source", open_source)
    return dataset.load(configs.read(planted.config("text", labels, **changes)).data, seed=0)


# --- Labels that some rows lack ---


def test_labels_keep_rows_that_have_one_of_several(tmp_path):
    table = rows(
        kind=lambda i: "" if i % 3 == 0 else ("a", "b")[i % 2],
        price=lambda i: "" if i % 2 or i < 6 else 10.5 + i,
    )
    data, config = load(write(tmp_path / "t.csv", table), "kind+price")
    assert {task: target.kind for task, target in config.data.targets.items()} == {
        "kind": "classification", "price": "regression",
    }  # fmt: skip
    assert data.class_names["kind"] == ("a", "b")
    kept = sorted(np.concatenate([split.ids for split in data.splits.values()]).tolist())
    assert kept == [i for i, row in enumerate(table) if row["kind"] or row["price"]]
    assert f"{60 - len(kept)} of 60 rows have no label and are left out" in data.notes
    for split in data.splits.values():
        batch = split.arrays
        assert batch.weight.all()
        np.testing.assert_array_equal(batch.labelled["kind"], split.ids % 3 != 0)
        np.testing.assert_array_equal(batch.metric_weight("price"), (split.ids % 2 == 0) & (split.ids >= 6))
        priced = batch.labelled["price"]
        prices = data.reader.scales["price"].invert(batch.targets["price"][priced])
        np.testing.assert_allclose(prices, 10.5 + split.ids[priced], rtol=1e-6)
        missing = int((~batch.labelled["kind"]).sum())
        assert f"{split.name}: {missing} of {len(split)} rows have no label of 'kind'" in data.notes
    train = data.splits["train"]
    numbers = [10.5 + i for i in train.ids if i % 2 == 0 and i >= 6]
    assert data.reader.scales["price"].mean == pytest.approx(np.mean(numbers))


def test_labels_balanced_weights_are_over_the_rows_that_have_one(tmp_path):
    table = rows(kind=lambda i: None if i % 3 == 0 else "ab"[i % 4 == 0], other=lambda i: "cd"[i % 2])
    path = write(tmp_path / "t.jsonl", table)
    config, args = defaults.begin("", "concat")
    propose(config, str(path), "kind+other")
    for task in ("kind", "other"):
        tiny.put(config, f"data.targets.{task}.class_weights", "balanced")
    defaults.finish(config, args)
    data = dataset.load(configs.read(config).data, seed=0)
    batch = data.splits["train"].arrays
    for task in ("kind", "other"):
        labels = batch.targets[task][batch.labelled[task]]
        assert data.class_weights[task] == targets.balanced_weights(labels, 2)
        assert len(labels) == int(batch.labelled[task].sum()) and (task == "other") == batch.labelled[task].all()


@pytest.mark.parametrize("gigabytes", [1.0, 0.0])
def test_labels_of_unknown_class_are_left_out_of_a_class_feature(monkeypatch, gigabytes):
    train = [planted.row(i, label=-1 if i % 4 == 0 else i % 2) for i in range(40)]
    data = load_planted(monkeypatch, train, train[1:4], data__memory_gb=gigabytes)
    split = data.splits["train"]
    ids = split.take(np.arange(len(split))).id
    assert set(ids[ids >= 0] % 4) == {1, 2, 3}
    if gigabytes:
        left_out = sum(note.endswith("rows have no label and are left out") for note in data.notes)
        assert len(split) == len(ids[ids >= 0]) and left_out >= 1
    else:
        assert (ids < 0).any() and not split.bad  # padding in their place


def test_labels_balanced_sampler_draws_no_row_without_any(monkeypatch):
    train = [planted.row(i, label=-1 if i % 4 == 0 else i % 2) for i in range(40)]
    split = load_planted(monkeypatch, train, train[1:4], data__sampler="balanced").splits["train"]
    assert sorted(split.classes.positions.tolist()) == list(range(len(split)))
    assert split.classes.counts.sum() == len(split.arrays.targets["label"]) and len(split.classes.counts) == 2


def test_labels_of_class_minus_one_among_others_are_an_error_in_a_plain_number(monkeypatch):
    train = [planted.row(i) for i in range(40)]
    with rejects(
        "config.data.targets", says="split 'test', row 2, target 'label': class -1 is outside 0 to 1; it stands"
    ):
        load_planted(monkeypatch, train, [*train[:2], planted.row(2, label=-1)], feature="number")


def test_labels_that_no_training_or_validation_row_has_are_an_error(monkeypatch, tmp_path):
    train = [planted.row(i, label=-1) for i in range(40)]
    with rejects("config.data.targets.label.feature", "label", says="no label in any row of split 'train'"):
        load_planted(monkeypatch, train, train)
    table = write(tmp_path / "t.csv", rows(label=lambda i: "", other=lambda i: i % 2))
    with rejects(table, "label", says="no label in any row"):
        load(table, "label")


# --- A split without labels ---


@pytest.mark.parametrize("feature", ["class", "number"])
def test_labels_of_a_test_split_may_all_be_minus_one(monkeypatch, feature):
    train = [planted.row(i) for i in range(40)]
    test = [planted.row(i, label=-1) for i in range(5)]
    data = load_planted(monkeypatch, train, test, feature=feature)
    assert data.splits["train"].has_labels and not data.splits["test"].has_labels
    batch = data.splits["test"].arrays
    assert batch.weight.all() and not batch.metric_weight("label").any()
    assert "test: no row has a label; it can be predicted, not evaluated" in data.notes


@pytest.mark.parametrize("value", ["", "-1"])
def test_labels_of_a_table_may_all_be_missing_in_its_test_split(tmp_path, value):
    table = rows(label=lambda i: value if i >= 50 else "ab"[i % 2], split=lambda i: "test" if i >= 50 else "train")
    data, _ = load(write(tmp_path / "t.csv", table), "label")
    assert data.splits["test"].ids.tolist() == list(range(50, 60)) and not data.splits["test"].has_labels
    assert not any("left out" in note for note in data.notes)
    assert data.class_names["label"] == ("a", "b")
    table[55]["label"] = "b"
    if value:  # -1 among labels is no label that train has
        with rejects("config.data.targets", says="row 50, target 'label': class -1"):
            load(write(tmp_path / "t.csv", table), "label")
    else:
        data, _ = load(write(tmp_path / "t.csv", table), "label")
        assert data.splits["test"].ids.tolist() == [55]


def test_labels_minus_one_is_a_class_where_training_rows_have_it(tmp_path):
    table = rows(label=lambda i: (-1, 1)[i % 2])
    data, _ = load(write(tmp_path / "t.csv", table), "label")
    assert data.class_names["label"] == ("-1", "1") and len(data.splits["test"]) == 12
    np.testing.assert_array_equal(data.splits["test"].arrays.targets["label"], data.splits["test"].ids % 2)


# --- Types of labels ---


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("value", "kind", "names"),
    [
        (lambda i: ("yes", "no")[i % 2], "classification", ("no", "yes")),
        (lambda i: bool(i % 2), "classification", ("false", "true")),
        (lambda i: (10, 9)[i % 2], "classification", ("9", "10")),
        (lambda i: (1.0, 2.0)[i % 2], "classification", ("1", "2")),
        (lambda i: i + 0.25, "regression", ()),
    ],
    ids=["text", "bool", "int", "float of whole numbers", "float"],
)
def test_labels_of_every_type_are_read_alike_from_every_format(tmp_path, suffix, value, kind, names):
    data, config = load(write(tmp_path / f"t{suffix}", rows(label=value)), "label")
    assert (config.data.targets.label.kind, data.class_names["label"]) == (kind, names)
    for split in data.splits.values():
        found, ids = split.arrays.targets["label"], split.ids
        if kind == "regression":
            np.testing.assert_allclose(data.reader.scales["label"].invert(found), ids + 0.25, rtol=1e-5)
        else:
            expected = [names.index(json.dumps(value(int(i))).strip('"').removesuffix(".0")) for i in ids]
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".npz"])
def test_labels_missing_in_numbers_are_missing_in_every_format(tmp_path, suffix):
    none = {".csv": "", ".npz": np.nan}.get(suffix)
    table = rows(label=lambda i: none if i % 5 == 0 else i + 0.5)
    data, config = load(write(tmp_path / f"t{suffix}", table), "label")
    assert config.data.targets.label.kind == "regression"
    kept = np.concatenate([split.ids for split in data.splits.values()])
    assert sorted(kept.tolist()) == [i for i in range(60) if i % 5]


def test_labels_of_an_empty_list_are_no_classes_and_null_is_missing(tmp_path):
    tags = (["a", "b"], [], None)
    data, _ = load(write(tmp_path / "t.jsonl", rows(tags=lambda i: tags[i % 3])), "tags")
    split = data.splits["train"]
    assert set(split.ids % 3) == {0, 1}
    np.testing.assert_array_equal(split.arrays.targets["tags"], np.where(split.ids[:, None] % 3, [0, 0], [1, 1]))


# --- Nested features ---


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_nested_features_are_inputs_labels_groups_and_identifiers(tmp_path, suffix):
    table = [
        {
            "q": {"text": f"this is question number {i}", "deep": {"size": i / 4}},
            "meta": {"id": f"row{i}", "patient": f"p{i // 4}"},
            "answer": {"label": "ab"[i % 2]},
        }
        for i in range(60)
    ]  # fmt: skip
    data, config = load(write(tmp_path / f"t{suffix}", table), "answer/label", group="meta/patient")
    sections = {m: (section.kind, section.feature) for m, section in config.data.modalities.items()}
    assert sections["qtext"] == ("text", "q/text") and "q/deep/size" in sections["table"][1]
    assert "meta/id" not in str(sections)
    assert config.data.targets.answerlabel.feature == "answer/label"
    with rejects("config.data.group", "meta/patien", suggests="meta/patient"):
        load(tmp_path / f"t{suffix}", "answer/label", group="meta/patien")
    groups = [set((split.ids // 4).tolist()) for split in data.splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 15
    for split in data.splits.values():
        np.testing.assert_array_equal(split.arrays.targets["answerlabel"], split.ids % 2)


def test_nested_features_of_a_prepared_dataset_are_a_target_with_its_classes(monkeypatch):
    """As TFDS gives them: nested rows, whose features have the names `OUTER/INNER`."""
    features = {
        "q/text": Feature("text"), "answer/label": Feature("class", class_names=("no", "yes")),
        "meta/patient": Feature("text"),
    }  # fmt: skip
    nested = [
        {"q": {"text": f"word{i}"}, "answer": {"label": i % 2 if i % 5 else -1}, "meta": {"patient": f"p{i // 4}"}}
        for i in range(60)
    ]

    def open_source(name, split, **_):
        stored = PreparedRows(nested[:40] if split == "train" else nested[40:], "folder", features)
        return sources.Source(stored, {"answer/label": ("no", "yes")}, f"planted:{split}", features)

    monkeypatch.setattr(sources, "open_source", open_source)
    config = planted.config(
        "text", data__modalities__text__feature="q/text", data__targets__label__feature="answer/label",
        data__group="meta/patient",
    )  # fmt: skip
    data = dataset.load(configs.read(config).data, seed=0)
    assert data.class_names == {"label": ("no", "yes")}
    train, valid = data.splits["train"], data.splits["valid"]
    assert not set((train.ids // 4).tolist()) & set((valid.ids // 4).tolist())
    for split in (train, valid):
        assert (split.ids % 5 > 0).all()
        np.testing.assert_array_equal(split.arrays.targets["label"], split.ids % 2)
