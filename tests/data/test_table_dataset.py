import csv
import json

import numpy as np
import pytest
from PIL import Image

from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.config.from_table import propose
from mmfusion.data import dataset
from tests.errors import rejects


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path):
    """60 rows: an image of the row's number, a text, a number and a category, and a label that is their parity."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for i in range(60):
        Image.new("L", (8, 8), i * 4).save(tmp_path / "pictures" / f"{i}.png")
        rows.append(
            {
                "id": f"row{i}", "photo": f"pictures/{i}.png", "caption": f"this is number {i} of all",
                "price": 1000 + i, "colour": ("red", "blue", "green")[i % 3], "label": ("odd", "even")[i % 2 == 0],
            }
        )  # fmt: skip
    return rows


def load(path, label="label", columns=(), task="", **changes):
    config, args = defaults.begin("", "concat")
    propose(config, str(path), label, columns, task)
    for name, value in changes.items():
        config.data[name] = value
    defaults.finish(config, args)
    return dataset.load(configs.read(config).data, seed=0), config


def test_table_dataset_reads_files_text_numbers_and_labels(table, tmp_path):
    data, config = load(write(tmp_path / "t.csv", table))
    assert {m: section.kind for m, section in config.data.modalities.items()} == {
        "photo": "image", "caption": "text", "table": "table",
    }  # fmt: skip
    assert config.data.modalities.table.feature == "price+colour"  # an identifier is no input
    assert data.class_names == {"label": ("even", "odd")}
    ids = np.concatenate([split.ids for split in data.splits.values()])
    assert sorted(ids) == list(range(60))  # every row is in one split
    for split in data.splits.values():
        batch = split.take(np.arange(len(split)))
        np.testing.assert_array_equal(batch.inputs["photo"][:, 0, 0, 0], split.ids * 4)
        np.testing.assert_array_equal(batch.targets["label"], split.ids % 2)


def test_table_dataset_makes_stratified_splits(table, tmp_path):
    for row in table[:50]:
        row["label"] = "common"
    for row in table[50:]:
        row["label"] = "rare"
    data, _ = load(write(tmp_path / "t.csv", table), columns=("caption",))
    counts = {name: np.bincount(split.arrays.targets["label"]).tolist() for name, split in data.splits.items()}
    assert counts == {"train": [36, 7], "valid": [4, 1], "test": [10, 2]}


def test_table_dataset_keeps_groups_in_one_split(table, tmp_path):
    for i, row in enumerate(table):
        row["group"] = f"g{i // 6}"
    data, config = load(write(tmp_path / "t.csv", table))
    assert config.data.group == "group"
    groups = [{int(i) // 6 for i in split.ids} for split in data.splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 10


def test_table_dataset_takes_splits_from_a_column(table, tmp_path):
    for i, row in enumerate(table):
        row["split"] = ("train", "train", "val", "TEST")[i % 4]
    data, config = load(write(tmp_path / "t.csv", table))
    assert config.data.valid == "valid"
    assert [(name, len(split)) for name, split in data.splits.items()] == [("train", 30), ("valid", 15), ("test", 15)]
    table[3]["split"] = "holdout"
    with rejects("column split", "holdout", says="names no split"):
        load(write(tmp_path / "t.csv", table))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_table_dataset_is_the_same_in_every_format(table, tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    if suffix == ".tsv":
        path.write_text("\n".join("\t".join(map(str, row)) for row in [table[0], *(r.values() for r in table)]))
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, table)))
    elif suffix == ".json":
        path.write_text(json.dumps(table))
    elif suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(table), path)
    else:
        write(path, table)
    expected, _ = load(write(tmp_path / "expected.csv", table))
    found, _ = load(path)
    for name, split in expected.splits.items():
        np.testing.assert_array_equal(found.splits[name].ids, split.ids)
        for modality, inputs in split.arrays.inputs.items():
            np.testing.assert_array_equal(found.splits[name].arrays.inputs[modality], inputs)
        np.testing.assert_array_equal(found.splits[name].arrays.targets["label"], split.arrays.targets["label"])


def test_table_dataset_reads_prices_in_their_own_units(table, tmp_path):
    data, config = load(write(tmp_path / "t.csv", table), label="price", columns=("colour", "caption"))
    assert config.data.targets.price.kind == "regression"
    scale, train = data.reader.scales["price"], data.splits["train"]
    np.testing.assert_allclose(scale.invert(train.arrays.targets["price"]), 1000 + train.ids, rtol=1e-6)


def test_table_dataset_reads_lists_of_labels(table, tmp_path):
    rows = [{**row, "tags": json.dumps(["a", "b"] if i % 2 else ["c"])} for i, row in enumerate(table)]
    data, config = load(write(tmp_path / "t.csv", rows), label="tags", columns=("caption",))
    assert (config.data.targets.tags.kind, data.class_names["tags"]) == ("multilabel", ("a", "b", "c"))
    split = data.splits["train"]
    expected = np.where(split.ids[:, None] % 2, [1, 1, 0], [0, 0, 1])
    np.testing.assert_array_equal(split.arrays.targets["tags"], expected)


def test_table_dataset_leaves_out_rows_without_label_and_says_so(table, tmp_path):
    table[5]["label"] = table[6]["label"] = ""
    data, _ = load(write(tmp_path / "t.csv", table))
    assert sum(map(len, data.splits.values())) == 58
    assert "2 of 60 rows have no label and are left out" in data.notes


def test_table_dataset_counts_bad_rows_up_to_the_limit(table, tmp_path):
    path = write(tmp_path / "t.csv", table)
    path.write_text(path.read_text() + "too,few,cells\n")
    with rejects("config.data.max_bad_fraction", 0.01, says="1 of 61 rows"):
        load(path)
    data, _ = load(path, max_bad_fraction=0.1)
    assert any("1 rows cannot be read and are left out; the first: row 60" in note for note in data.notes)
    (tmp_path / "pictures" / "7.png").write_bytes(b"damaged")
    data, _ = load(path, max_bad_fraction=0.1)
    assert data.rejected == ((7, "photo", "not an image"), (60, "", data.rejected[1][2]))
    assert "3 cells" in data.rejected[1][2]


def test_table_dataset_refuses_a_class_that_train_does_not_have(table, tmp_path):
    for i, row in enumerate(table):
        row["split"] = "test" if i >= 50 else "train"
    table[55]["label"] = "neither"
    with rejects("config.data.targets", says="'neither' is none of the 2 classes"):
        load(write(tmp_path / "t.csv", table))


def test_table_dataset_refuses_what_it_cannot_read(table, tmp_path):
    path = write(tmp_path / "t.csv", table)
    with rejects("label", "prise", suggests="price"):
        load(path, label="prise")
    with rejects("columns", "capton", suggests="caption"):
        load(path, columns=("capton",))
    with rejects(tmp_path / "none.csv", says="cannot be read"):
        load(tmp_path / "none.csv")
    with rejects("config.data.train", "train[:50%]", says="no slices"):
        load(path, train="train[:50%]")
    (tmp_path / "pictures" / "7.png").unlink()
    with rejects("column photo", says="1 of 60 files do not exist"):
        load(path)


def test_table_dataset_reads_vectors_sequences_and_several_images(table, tmp_path):
    rows = [
        {
            "views": json.dumps([f"pictures/{i}.png", f"pictures/{(i + 1) % 60}.png"][: i % 2 + 1]),
            "features": json.dumps([i, i / 2, -i]), "signal": json.dumps([[t, i] for t in range(i % 4 + 2)]),
            "label": row["label"],
        }
        for i, row in enumerate(table)
    ]  # fmt: skip
    data, config = load(write(tmp_path / "t.csv", rows))
    kinds = {m: (section.kind, config.model.encoders[m].name) for m, section in config.data.modalities.items()}
    assert kinds == {"views": ("images", "cnn"), "features": ("embedding", "mlp"), "signal": ("sequence", "tcn")}
    batch, ids = data.splits["train"].take(np.arange(20)), data.splits["train"].ids[:20]
    np.testing.assert_array_equal(batch.mask["views"].sum(axis=1), ids % 2 + 1)
    np.testing.assert_array_equal(batch.inputs["views"][:, 0, 0, 0, 0], ids * 4)
    np.testing.assert_array_equal(batch.mask["signal"].sum(axis=1), np.minimum(ids % 4 + 2, 5))
    np.testing.assert_allclose(np.diff(batch.inputs["features"][:, 0]) > 0, np.diff(ids) > 0)
