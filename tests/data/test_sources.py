import errno
import io
import json
import shutil

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.features import image_feature
from tensorflow_datasets.testing import mocking

from configs import tfds as tfds_config
from mmfusion import config as configs
from mmfusion.data import dataset, sources
from mmfusion.errors import UserError
from tests.errors import rejects


class Toys(tfds.core.GeneratorBasedBuilder):
    """A few rows without images, so that preparation is fast; `arrays` yields pixels, as public builders do."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("colours", "notes", "arrays")]  # noqa: RUF012
    LABELS = {"colours": [0, 1, 2] * 6, "notes": [0] * 3 + [1] * 4 + [2] * 9, "arrays": [0]}  # noqa: RUF012
    fail = None  # an exception to raise before the last row

    def _info(self):
        features = {"label": tfds.features.ClassLabel(num_classes=3), "note": tfds.features.Text()}
        if self.builder_config.name == "arrays":
            features["image"] = tfds.features.Image(shape=(4, 4, 3))
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

    def _generate_examples(self, split):
        name = self.builder_config.name
        for i, label in enumerate(self.LABELS[name]):
            row = {"label": label, "note": f"{name} {split} {i}"}
            yield i, row | ({"image": np.zeros((4, 4, 3), np.uint8)} if name == "arrays" else {})
        if self.fail:
            raise self.fail


@pytest.fixture(scope="module")
def toys_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("toys"))


def open_source(name, data_dir, split="train", seed=0, manual_dir=""):
    return sources.open_source(name, split, data_dir=str(data_dir), manual_dir=str(manual_dir), seed=seed)


@pytest.fixture
def mocked_tfds(monkeypatch):
    """Mocks every TFDS dataset with 24 random rows per split; images are PNG, as after preparation."""

    def png(_, pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(buffer, "PNG")
        return buffer.getvalue()

    def getitems(keys, generator):  # TFDS's own misses its first argument
        return [mocking._getitem(None, key, generator) for key in keys]

    monkeypatch.setattr(image_feature._ImageEncoder, "_encode_image", png)  # TFDS's own needs TensorFlow
    monkeypatch.setattr(mocking, "_getitems", getitems)
    with tfds.testing.mock_data(num_examples=24):
        yield


# --- Names ---


def test_check_name_needs_no_network_or_tensorflow(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mnist", "cifar10", "shapes/match", "mine", "pair:cifar10+imdb_reviews:by=index"):
        sources.check_name(name, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "invalid", "suggestion"),
    [
        ("mnst", "mnst", "mnist"),
        ("shapes/mach", "shapes/mach", "shapes/match"),
        ("pair:mnist+shapes/mach:by=label", "shapes/mach", "shapes/match"),
        ("pair:mnist+cifar10:by=name", "pair:mnist+cifar10:by=name", ""),
        ("", "", ""),
    ],
)
def test_check_name_suggests_the_nearest_name(name, invalid, suggestion):
    with rejects("config.data.name", invalid, suggestion) as error:
        sources.check_name(name, "")
    assert len(str(error.value)) < 600  # not all of TFDS's names


def test_open_source_rejects_unknown_variants_versions_and_splits(toys_dir):
    with rejects("config.data.name", "toys/nope", says="nope"):
        open_source("toys/nope", toys_dir)
    with rejects("config.data.name", "toys/notes:7.0.0", says="version 7.0.0"):
        open_source("toys/notes:7.0.0", toys_dir)
    for split in ("valid", "train[:x]", "train[:0]"):
        with rejects("config.data.name", "toys/notes", says=f"split {split!r}: its splits are train, test"):
            open_source("toys/notes", toys_dir, split=split)


# --- Public datasets, mocked ---


def test_mnist_is_configured_in_one_line(mocked_tfds):
    config = tfds_config.get_config("name=mnist,channels=1,size=14")
    data = dataset.load(configs.read(config).data, seed=0)
    assert data.class_names == {"label": tuple("0123456789")}
    batch = data.splits["test"].take(np.arange(24))
    assert batch.inputs["image"].shape == (24, 14, 14, 1)
    assert batch.inputs["image"].std() > 10
    rows = open_source("mnist", "", split="test").rows
    assert batch.targets["label"].tolist() == [rows[i]["label"] for i in range(24)]


def test_cifar10_with_imdb_is_configured_in_one_line(mocked_tfds):
    config = tfds_config.get_config("name=pair:cifar10+imdb_reviews:by=index,text=text,target=imdb_reviews/label")
    data = dataset.load(configs.read(config).data, seed=0)
    assert data.class_names == {"label": ("neg", "pos")}
    batch = data.splits["test"].take(np.arange(24))
    assert batch.inputs["image"].shape == (24, 32, 32, 3)
    images, texts = (open_source(name, "", split="test").rows for name in ("cifar10", "imdb_reviews"))
    assert batch.targets["label"].tolist() == [texts[i]["label"] for i in range(24)]
    np.testing.assert_array_equal(batch.inputs["image"][3], np.asarray(Image.open(io.BytesIO(images[3]["image"]))))
    tokens = data.reader.fitted["text"].encode(str(texts[3]["text"])).ids
    assert batch.inputs["text"][3][batch.mask["text"][3]].tolist() == tokens


# --- Pairs ---


def test_pair_by_index_wraps_around(toys_dir):
    source = open_source("pair:toys/colours+toys/notes:by=index", toys_dir)
    colours, notes = open_source("toys/colours", toys_dir).rows, open_source("toys/notes", toys_dir).rows
    assert len(source.rows) == 18
    for i in range(18):  # a feature name in both keeps the first dataset's value
        row, other = source.rows[i], notes[i % 16]
        assert (row["note"], row["label"]) == (colours[i]["note"], colours[i]["label"])
        assert (row["toys/note"], row["toys/label"]) == (other["note"], other["label"])
    assert source.class_names["toys/label"] == source.class_names["label"] == ("0", "1", "2")


def test_pair_by_label_uses_all_partners_before_reuse(toys_dir):
    name = "pair:toys/colours+toys/notes:by=label"
    rows = open_source(name, toys_dir).rows
    used = {0: [], 1: [], 2: []}
    for i in range(len(rows)):
        assert rows[i]["label"] == rows[i]["toys/label"]
        used[rows[i]["label"]].append(rows[i]["toys/note"])
    counts = {label: sorted(np.unique(notes, return_counts=True)[1]) for label, notes in used.items()}
    assert counts == {0: [2, 2, 2], 1: [1, 1, 2, 2], 2: [1] * 6}  # 6 rows per label, and 3, 4 and 9 partners
    assert rows.partner.tolist() == open_source(name, toys_dir).rows.partner.tolist()
    assert rows.partner.tolist() != open_source(name, toys_dir, seed=1).rows.partner.tolist()


def test_pair_by_label_rejects_labels_without_partner(toys_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(Toys, "LABELS", {**Toys.LABELS, "notes": [0, 1]})
    with pytest.raises(UserError, match="has no row of label 2"):
        open_source("pair:toys/colours+toys/notes:by=label", tmp_path)


def test_pair_partners_used_twice_are_in_one_split(toys_dir):
    config = tfds_config.get_config("name=pair:toys/colours+toys/notes:by=label,image=,text=toys/note")
    with config.unlocked():
        config.data.dir, config.data.valid_fraction = toys_dir, 0.4
    data = dataset.load(configs.read(config).data, seed=0)
    rows = data.splits["train"].source
    train, valid = ({rows[int(i)]["toys/note"] for i in data.splits[s].ids} for s in ("train", "valid"))
    assert len(train) > 2
    assert len(valid) > 2
    assert not train & valid


# --- Failed preparation ---


def test_builder_that_needs_tensorflow_suggests_the_extra(tmp_path):
    with rejects("config.data.name", "toys/arrays", says="pip install '.[prepare]'"):
        open_source("toys/arrays", tmp_path)
    assert not tfds.builder("toys/arrays", data_dir=tmp_path).is_prepared()


def test_open_source_without_network_suggests_manual_dir(tmp_path, monkeypatch):
    def get(_, url, **__):
        raise requests.ConnectionError("Name or service not known", request=requests.Request("GET", url))

    monkeypatch.setattr(requests.Session, "get", get)
    with rejects("config.data.name", "mnist", says="-ubyte.gz cannot be downloaded") as error:
        open_source("mnist", tmp_path)
    assert "--config.data.manual_dir=FOLDER" in error.value.message
    assert not tfds.builder("mnist", data_dir=tmp_path).is_prepared()


def test_manual_download_rejects_a_changed_file(tmp_path):
    manual_dir = tmp_path / "manual"
    manual_dir.mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (manual_dir / f"{name}-ubyte.gz").write_bytes(b"something else")
    with rejects("config.data.name", "mnist", says=f"{manual_dir}/"):
        open_source("mnist", tmp_path / "data", manual_dir=manual_dir)


def test_open_source_reports_a_required_manual_download(tmp_path):
    with rejects("config.data.name", "imagenet2012", says="--config.data.manual_dir=FOLDER"):
        open_source("imagenet2012", tmp_path)


@pytest.mark.parametrize(
    ("fail", "fact"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError("Not enough disk space. Needed: 3 GiB"), "Needed: 3 GiB"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: set --config.data.dir"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_failed_preparation_leaves_no_files_and_can_be_repeated(fail, fact, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Toys, "fail", fail)
        with rejects("config.data.name", "toys/notes", says=fact):
            open_source("toys/notes", tmp_path)
    assert not list(tmp_path.glob("toys/notes/*"))
    assert len(open_source("toys/notes", tmp_path).rows) == 16


def test_builder_bug_is_not_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Toys, "fail", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        open_source("toys/notes", tmp_path)


def test_open_source_rejects_a_file_as_data_dir(tmp_path):
    (tmp_path / "file").touch()
    with rejects("config.data.name", "toys/notes", says=f"{tmp_path / 'file'}"):
        open_source("toys/notes", tmp_path / "file")


# --- Corrupt prepared data ---


@pytest.fixture
def prepared(toys_dir, tmp_path):
    open_source("toys/notes", toys_dir)
    shutil.copytree(toys_dir, tmp_path / "data")
    return tmp_path / "data" / "toys" / "notes" / "1.0.0"


@pytest.mark.parametrize("corruption", ["cut", "flip", "remove"])
def test_open_source_detects_corrupt_records(corruption, prepared, tmp_path):
    (file,) = prepared.glob("toys-train.array_record*")
    content = bytearray(file.read_bytes())
    position = content.index(b"notes train 7")
    content[position] ^= 1
    file.write_bytes(content if corruption == "flip" else content[:position])
    if corruption == "remove":
        file.unlink()
    with rejects(prepared, None, says="row "):
        rows = open_source("toys/notes", tmp_path / "data").rows
        for i in range(len(rows)):
            rows[i]


def test_open_source_rejects_another_file_format(prepared, tmp_path):
    info = json.loads((prepared / "dataset_info.json").read_text())
    (prepared / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with rejects("config.data.dir", str(tmp_path / "data"), says="ArrayRecord"):
        open_source("toys/notes", tmp_path / "data")
