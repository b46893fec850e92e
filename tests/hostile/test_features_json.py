"""Prepared datasets whose features.json names code, or is no file that can be read."""

import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mmfusion.data import prepared_files, sources
from tests.errors import rejects
from tests.hostile.limits import within

TEXT = "tensorflow_datasets.core.features.text_feature.Text"
DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
CODE = "planted_code.Feature"
INFO = {"name": "planted", "version": "1.0.0", "fileFormat": "array_record"}


def prepared(folder, features, version="planted/1.0.0"):
    """Writes a prepared dataset without rows, and returns its features.json."""
    path = folder / version / "features.json"
    path.parent.mkdir(parents=True)
    (path.parent / "dataset_info.json").write_text(json.dumps(INFO))
    path.write_text(features if isinstance(features, str) else json.dumps(features))
    return path


def of_dict(feature, name="pythonClassName"):
    return {name: DICT, "featuresDict": {"features": {"x": feature}}}


def legacy(feature):
    return {"type": DICT, "content": {"x": feature}}


FORMS = {
    "proto": lambda name: of_dict({"pythonClassName": name, "text": {}}),
    "the whole": lambda name: {"pythonClassName": name, "text": {}},
    "snake case": lambda name: of_dict({"python_class_name": name, "text": {}}, "python_class_name"),
    "legacy": lambda name: legacy({"type": name, "content": {}}),
    "JSON in a proto": lambda name: {
        "pythonClassName": DICT, "jsonFeature": {"json": json.dumps({"x": {"type": name, "content": {}}})},
    },
    "proto in JSON": lambda name: {
        "type": DICT, "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"x": {"pythonClassName": name, "text": {}}}}),
    },
    "sequence": lambda name: of_dict({
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "sequence": {"feature": {"pythonClassName": name, "text": {}}},
    }),
    "feature called type": lambda name: legacy({"type": DICT, "content": {"type": {"type": name, "content": {}}}}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_open_source_imports_no_code_that_a_dataset_names(form, tmp_path, code):
    name, mark = CODE, code
    path = prepared(tmp_path, FORMS[form](name))
    with rejects(path, None, says=name):
        sources.open_source("planted", "train", data_dir=str(tmp_path), manual_dir="", seed=0)
    assert not mark.exists()


@pytest.mark.parametrize("how", ["variant", "link", "dotted variant", "camel case", "version"])
def test_open_source_checks_the_version_that_tfds_reads(how, tmp_path, code):
    name, mark = CODE, code
    features = FORMS["proto"](name)
    if how == "link":
        path = prepared(tmp_path / "elsewhere", features)
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "planted").symlink_to(tmp_path / "elsewhere" / "planted")
        path = tmp_path / "data" / "planted" / "1.0.0" / "features.json"
    else:
        version = {"variant": "planted/big/1.0.0", "dotted variant": "planted/.big/1.0.0"}.get(how, "planted/1.0.0")
        path = prepared(tmp_path / "data", features, version)
    dataset = {"variant": "planted/big", "dotted variant": "planted/.big", "camel case": "Planted"}.get(how, "planted")
    dataset += ":1.0.0" if how == "version" else ""
    with rejects(path, None):
        sources.open_source(dataset, "train", data_dir=str(tmp_path / "data"), manual_dir="", seed=0)
    assert not mark.exists()


def test_open_source_refuses_a_name_that_moves_the_data(tmp_path, code):
    name, mark = CODE, code
    prepared(tmp_path, FORMS["proto"](name))
    with rejects("config.data.name"):  # TFDS takes arguments of a builder from the name
        sources.open_source(f"planted/data_dir={tmp_path}", "train", data_dir="", manual_dir="", seed=0)
    assert not mark.exists()


def test_check_features_accepts_the_classes_of_tfds(tmp_path):
    f = tfds.features  # Audio and Video need TensorFlow
    every = f.FeaturesDict({
        "text": f.Text(), "image": f.Image(shape=(2, 2, 3)), "label": f.ClassLabel(num_classes=3),
        "box": f.BBoxFeature(), "numbers": f.Tensor(shape=(2,), dtype=np.float32),
        "scalar": f.Scalar(dtype=np.int64), "list": f.Sequence({"type": f.Text(), "content": f.Text()}),
        "translation": f.Translation(("de", "en")), "nested": {"inner": f.Text(doc="{not JSON")},
        "steps": f.Dataset({"x": f.Text()}),
    })  # fmt: skip
    every.save_config(tmp_path)
    prepared_files.check_features(tmp_path / "features.json")
    (tmp_path / "features.json").write_text(json.dumps(legacy({"type": TEXT, "content": {}})))
    prepared_files.check_features(tmp_path / "features.json")


def test_check_features_accepts_classes_of_the_package_of_a_builder(tmp_path):
    path = tmp_path / "features.json"
    path.write_text(json.dumps(FORMS["proto"]("my_package.features.Volume")))
    prepared_files.check_features(path, "my_package")
    with rejects(path, None):
        prepared_files.check_features(path, "my_pack")


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json", "label.labels.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "large"])
def test_open_source_reads_regular_files_of_limited_size_only(file, kind, tmp_path):
    path = prepared(tmp_path, of_dict({"pythonClassName": TEXT, "text": {}})).with_name(file)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.touch()
        os.truncate(path, 1 << 40)  # no bytes on the disk
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/dev/stdin")
    with rejects(path, None), within(5):
        sources.open_source("planted", "train", data_dir=str(tmp_path), manual_dir="", seed=0)


DAMAGED = {
    "deep objects": b'{"a":' * 100_000, "deep lists": b"[" * 200 + b"]" * 200, "no UTF-8": b"\xff", "empty": b"",
    "deep JSON in a string": json.dumps({"json": "[" * 5000 + "]" * 5000}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_check_features_refuses_what_is_nested_too_deeply_or_no_json(kind, tmp_path):
    path = tmp_path / "features.json"
    path.write_bytes(DAMAGED[kind])
    with rejects(path, None, says="cannot be read"):
        prepared_files.check_features(path)
