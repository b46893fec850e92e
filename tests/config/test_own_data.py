import numpy as np
import pytest

import mmfusion
from mmfusion import config as configs
from mmfusion.config.files import load_file
from mmfusion.data import dataset as datasets
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "photo": RANDOM.integers(0, 256, (60, 8, 10, 3), dtype=np.uint8),
    "bands": RANDOM.normal(size=(60, 6, 6, 5)).astype(np.float32),
    "features": RANDOM.normal(size=(60, 4)),
    "signal": RANDOM.normal(size=(60, 7, 2)),
    "age": RANDOM.integers(20, 60, 60),
    "caption": [f"picture number {i} of many" for i in range(60)],
    "label": [("no", "yes")[i % 2] for i in range(60)],
}


def test_from_arrays_reads_back_what_was_given(tmp_path):
    dataset = mmfusion.Dataset.from_arrays(ARRAYS, tmp_path / "own.npz")
    config = load_file(f"{dataset.config},fusion=gmu")
    kinds = {name: section.kind for name, section in config.data.modalities.items()}
    assert kinds == {"table": "table", "photo": "image", "bands": "image", "features": "embedding",
                     "signal": "sequence", "caption": "text"}  # fmt: skip
    assert config.model.fusion.name == "gmu"
    assert (config.data.modalities.photo.size, config.data.modalities.bands.channels) == ((8, 10), 5)
    configs.check(config, devices=1)
    data = datasets.load(configs.read(config).data, seed=0)
    for split in data.splits.values():
        np.testing.assert_array_equal(split.arrays.inputs["photo"], ARRAYS["photo"][split.ids])
        np.testing.assert_array_equal(split.arrays.targets["label"], split.ids % 2)


def test_config_of_a_table_with_dates_and_categories_is_valid(tmp_path):
    rows = [f"2024-01-{1 + i % 28:02d},{('red', 'blue')[i % 2]},{i}.5" for i in range(60)]
    (tmp_path / "own.csv").write_text("\n".join(["sold,colour,price", *rows]))
    config = load_file(f"configs/table.py:data={tmp_path}/own.csv,label=price")
    configs.check(config, devices=1)
    assert config.data.modalities.table.dates == ("sold",)
    config.data.modalities.table.dates = ("bought",)
    with rejects("config.data.modalities.table.dates", "bought", "sold"):
        configs.check(config, devices=1)


@pytest.mark.loop
def test_from_arrays_is_trained_evaluated_and_predicted(tmp_path):
    arrays = {name: ARRAYS[name] for name in ("photo", "features", "label")}
    dataset = mmfusion.Dataset.from_arrays(arrays, tmp_path / "own.npz", label="label")
    changes = {"steps": 2, "eval_every": 2, "checkpoint_every": 2, "model.width": 8}
    result = mmfusion.train(dataset.config, tmp_path / "run", changes=changes)
    model = mmfusion.load(tmp_path / "run")
    assert model.evaluate("test")["accuracy"] == result["test"]["accuracy"]
    predicted = model.predict([{"photo": ARRAYS["photo"][0], "features": ARRAYS["features"][0]}])
    assert predicted.labels[0] in ("no", "yes")


def test_from_arrays_refuses_objects_and_lengths(tmp_path):
    with rejects("arrays['x']", None, says="Python objects"):
        mmfusion.Dataset.from_arrays({"x": [None, {}]}, tmp_path / "own.npz")
    assert list(tmp_path.iterdir()) == []
    with rejects(tmp_path / "own.npz", None, says="label 2, x 3"):
        mmfusion.Dataset.from_arrays({"label": [0, 1], "x": [1, 2, 3]}, tmp_path / "own.npz")
    with rejects("path", str(tmp_path / "own.csv"), says=".npz"):
        mmfusion.Dataset.from_arrays(ARRAYS, tmp_path / "own.csv")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    with rejects(tmp_path / "pickled.npz", None, says="cannot be read"):
        mmfusion.Dataset.from_table(tmp_path / "pickled.npz")
