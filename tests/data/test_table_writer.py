import io
import json

import numpy as np
from PIL import Image

from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.data import dataset as datasets
from mmfusion.data.features import Feature
from mmfusion.data.sources import Source
from mmfusion.data.table_writer import write_table
from tests.errors import rejects

RNG = np.random.default_rng(0)
FEATURES = {
    "picture": Feature("image"),
    "sound": Feature("array[1]", "int16", (None,)),
    "words": Feature("text"),
    "vector": Feature("array[1]", "float32", (5,)),
    "steps": Feature("array[2]", "float32", (None, 2)),
    "size": Feature("number", "int64"),
    "label": Feature("class", class_names=("ant", "bee, or wasp")),
}
COLUMNS = {**dict.fromkeys(FEATURES, 0), "sound": 8000}


def png():
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (6, 5, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def rows(count):
    return [
        {
            "picture": png(),
            "sound": RNG.integers(-(2**15), 2**15, 900, np.int16),
            "words": 'He said "no",\nand left ünder'.encode(),
            "vector": RNG.normal(size=5).astype(np.float32) * 10.0**i,
            "steps": RNG.normal(size=(2 + i, 2)).astype(np.float32),
            "size": 2**60 + i,
            "label": i % 2,
        }
        for i in range(count)
    ]


def source(count=4):
    return Source(rows(count), {"label": FEATURES["label"].class_names}, "synthetic", FEATURES)


def data_config(name=""):
    config, _ = defaults.begin("", "concat")
    config.data.name, config.data.valid = name, "valid"
    for modality, kind, feature, options in (
        ("image", "image", "picture", {"size": (6, 5)}),
        ("audio", "audio", "sound", {"rate": 8000, "seconds": 0.1}),
        ("text", "text", "words", {"length": 12}),
        ("vector", "embedding", "vector", {}),
        ("steps", "sequence", "steps", {"length": 6}),
    ):
        config.data.modalities[modality] = defaults.modality(kind, feature, **options)
    config.data.targets.label = defaults.target("classification", "label")
    return configs.read(config).data


def test_write_table_gives_back_every_value_of_the_dataset(tmp_path):
    sources = {"train": source(), "valid": source(2), "test": source(3)}
    assert write_table(sources, COLUMNS, tmp_path / "my.csv") == 9
    table = datasets.load(data_config(str(tmp_path / "my.csv")), seed=0)
    assert table.class_names == {"label": FEATURES["label"].class_names}
    for split, original in sources.items():
        rows_of_split = table.splits[split].arrays
        for i, row in enumerate(original.rows):
            values, targets = table.reader.read(row, i)
            assert rows_of_split.targets["label"][i] == targets["label"]
            for modality, (value, mask) in values.items():
                np.testing.assert_array_equal(rows_of_split.inputs[modality][i], value)
                np.testing.assert_array_equal(rows_of_split.mask[modality][i], mask)


def test_write_table_stores_integers_and_floats_without_loss(tmp_path):
    original = source(2)
    write_table({"test": original}, {"size": 0, "vector": 0}, tmp_path / "my.csv")
    lines = (tmp_path / "my.csv").read_text().splitlines()
    assert lines[0] == "split,size,vector"
    assert lines[1].startswith(f"test,{2**60},")
    stored = np.array(json.loads(lines[2].split(",", 2)[2].strip('"')), np.float32)
    np.testing.assert_array_equal(stored, original.rows[1]["vector"])


def test_write_table_refuses_what_exists_and_features_without_a_form(tmp_path):
    (tmp_path / "my").mkdir()
    with rejects("--output", str(tmp_path / "my")):
        write_table({"test": source(1)}, {"size": 0}, tmp_path / "my.csv")
    strange = Source(rows(1), {}, "synthetic", {"size": Feature("other")})
    with rejects("--config", "size"):
        write_table({"test": strange}, {"size": 0}, tmp_path / "other.csv")
    assert not (tmp_path / "other.csv").exists()
