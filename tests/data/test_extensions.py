"""Out-of-tree datasets and modality types, as in the README."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

import mmfusion.data
from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.data import dataset as datasets
from mmfusion.data import sources
from mmfusion.data.modalities import modality_type
from mmfusion.training.loop import train
from tests.errors import rejects

README = Path(mmfusion.data.__path__[0], "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """Installs the README's module `points` and yields its config with an additional text modality."""
    module, changes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(README.splitlines()) <= 120
    folder = tmp_path_factory.mktemp("extension")
    (folder / "points.py").write_text(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        config, args = defaults.begin("fusion=concat")
        exec(changes, {"config": config, "defaults": defaults})
        config.data.dir = str(folder / "data")
        config.data.modalities.text = defaults.modality("text", "caption", vocabulary_size=20, length=4)
        config.model.encoders.text = defaults.encoder("text", "bow")
        config.data.targets.label = defaults.target("classification", "label")
        config.model.width = 8
        config.batch_size = 8
        config.steps = config.eval_every = config.checkpoint_every = 2
        yield defaults.finish(config, args)
        sys.modules.pop("points", None)
        tfds.core.registered._DATASET_REGISTRY.pop("points", None)


def test_out_of_tree_dataset_and_modality_type_are_read(points):
    configs.check(points, devices=1)
    data = datasets.load(configs.read(points).data, seed=0)
    source = data.splits["test"].source
    stored = np.array([source[i]["point"] for i in range(len(source))])
    expected = np.random.default_rng(1).normal(size=(16, 2)).astype(np.float32)
    np.testing.assert_array_equal(np.sort(stored, axis=0), np.sort(expected, axis=0))  # TFDS shuffles
    batch = data.splits["test"].take(np.array([3, 0, -1]))
    np.testing.assert_array_equal(batch.inputs["point"], [0.5 * stored[3], 0.5 * stored[0], [0, 0]])
    np.testing.assert_array_equal(batch.mask["point"], [[True], [True], [False]])
    np.testing.assert_array_equal(batch.targets["label"][:2], stored[[3, 0], 0] > 0)
    assert data.class_names == {"label": ("left", "right")}
    assert len(data.splits["train"]) + len(data.splits["valid"]) == 64


def test_out_of_tree_dataset_can_be_paired(points):
    name = "pair:points:Points+points:Points:by=index"
    sources.check_name(name, points.data.dir)
    source = sources.open_source(name, "test", data_dir=points.data.dir, manual_dir="", seed=0)
    assert source.rows[3]["label"] == source.rows[3]["points/label"]


@pytest.mark.loop
def test_out_of_tree_dataset_and_modality_type_can_be_trained_on(points, tmp_path):
    result = train(points, tmp_path)
    assert np.isfinite(result["test"]["loss"])


def test_check_name_rejects_an_unknown_builder_class(points):
    for name, choices in (("points:Point", ["points:PointEncoder", "points:Points"]), ("nowhere:Points", [])):
        with rejects("config.data.name", name) as error:
            sources.check_name(name, "")
        assert set(choices) <= set(error.value.choices)
    with rejects("config.data.name", "points:PointEncoder", says="TFDS builder"):
        sources.check_name("points:PointEncoder", "")


def test_check_name_distinguishes_versions_from_classes(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mnist:3.0.1", "mine:1.0.0"):
        sources.check_name(name, str(tmp_path))


def test_modality_type_rejects_an_unknown_name(points):
    for kind, choices in (("points:Points", ["points:POINT"]), ("imag", ["image", "text"])):
        with rejects("config.data.modalities.m.kind", kind) as error:
            modality_type(kind, "config.data.modalities.m.kind")
        assert set(choices) <= set(error.value.choices)
