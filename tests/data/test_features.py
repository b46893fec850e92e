import numpy as np
import pytest
import tensorflow_datasets as tfds

from mmfusion import config as configs
from mmfusion.data import dataset, features, sources
from mmfusion.data.modalities import MODALITY_TYPES
from tests import planted
from tests.errors import rejects

f = tfds.features
STORED = f.FeaturesDict(
    {
        "q": {"text": f.Text(), "asked": np.int64},
        "image": f.Image(),
        "label": f.ClassLabel(names=["a", "b"]),
        "tags": f.Sequence(f.ClassLabel(num_classes=3)),
        "hot": f.Tensor(shape=(3,), dtype=np.int64),
        "steps": f.Sequence(np.float32),
        "pairs": f.Tensor(shape=(None, 2), dtype=np.float32),
        "captions": f.Sequence(f.Text()),
        "objects": f.Sequence({"name": f.Text(), "box": f.Tensor(shape=(4,), dtype=np.float32)}),
        "raw": np.str_,
    }
)


def test_from_tfds_describes_every_kind_of_feature():
    found = {name: str(feature) for name, feature in features.from_tfds(STORED).items()}
    assert found == {
        "q/text": "a text",
        "q/asked": "a number",
        "image": "an image",
        "label": "a class",
        "tags": "a list of classes",
        "hot": "an array int64 [3]",
        "steps": "an array float32 [any]",
        "pairs": "an array float32 [any, 2]",
        "captions": "a list of texts",
        "objects/name": "a list of texts",
        "objects/box": "an array float32 [any, 4]",
        "raw": "bytes",
    }


def test_flatten_names_nested_features_by_their_path():
    specs = {"q/text": features.Feature("text"), "q/a/b": features.Feature("number"), "x": features.Feature("number")}
    assert features.flatten({"q": {"text": b"hi", "a": {"b": 3}}, "x": 1}, specs) == {
        "q/text": b"hi",
        "q/a/b": 3,
        "x": 1,
    }


@pytest.mark.parametrize(
    ("feature", "kind", "holds", "takes"),
    [
        ("image", "text", "an image", "image"),
        ("captions", "text", "a list of texts", "none"),
        ("pairs", "table", "an array float32 [any, 2]", "image, audio, sequence, graph"),
        ("label", "image", "a class", "table, knowledge"),
    ],
)
def test_modality_types_refuse_features_of_another_type(feature, kind, holds, takes):
    stored = features.from_tfds(STORED)[feature]
    says = f"holds {holds}, which the modality type {kind!r} does not take; types that do: {takes}"
    with rejects("path", feature, says=says):
        features.check_takes(stored, kind, MODALITY_TYPES, "path", feature)


def test_load_refuses_a_feature_of_another_type(monkeypatch):
    rows = [planted.row(i) for i in range(20)]
    planted.plant(monkeypatch, train=rows, test=rows[:5])
    plain = sources.open_source
    image = {"image": features.Feature("image")}

    def open_source(*args, **kwargs):
        source = plain(*args, **kwargs)
        return sources.Source(source.rows, source.class_names, source.version, image)

    monkeypatch.setattr(sources, "open_source", open_source)
    config = planted.config("text", data__modalities__text__feature="image")
    with rejects("config.data.modalities.text.feature", "image", says="holds an image"):
        dataset.load(configs.read(config).data, seed=0)
