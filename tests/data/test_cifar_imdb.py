"""CIFAR-10 as JPEG files and the subset of IMDB reviews, small ones, and beside each other."""

import csv
import gzip
import hashlib
import io

import numpy as np
import pytest
import requests
from PIL import Image

from configs import cifar_imdb
from mmfusion import config as configs
from mmfusion.data import dataset as datasets
from mmfusion.data import sources
from mmfusion.data.builders.cifar10_images import cifar10_images_dataset_builder as cifar
from mmfusion.data.builders.imdb_subset import imdb_subset_dataset_builder as imdb
from mmfusion.errors import UserError
from tests.data.prepare import known, prepare, rows, write_zip
from tests.data.test_builders import REAL, left_behind, real

REVIEWS = {"train": 8, "test": 4}


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def small_cifar_imdb(tmp_path, monkeypatch):
    folder = tmp_path / "manual"
    (folder / "imdb_subset").mkdir(parents=True)
    pictures = {
        f"{split}/{name}/{i:04d}.jpg": jpeg(20 * c + i)
        for split, n in (("train", 3), ("test", 1))
        for c, name in enumerate(cifar.CLASSES)
        for i in range(n)
    }
    write_zip(folder / cifar.ARCHIVE.filename, {**pictures, "README.md": b"about"})
    monkeypatch.setattr(cifar, "ARCHIVE", known(folder / cifar.ARCHIVE.filename, members=cifar.ARCHIVE.members))
    table = io.StringIO(newline="")
    lines = csv.writer(table)
    lines.writerow(["split", "official_split", "id", "stars", "label", "text"])
    for split, n in REVIEWS.items():
        for i in range(n):
            part = "val" if split == "train" and i == 0 else split
            lines.writerow([part, split, f"{i}_9", 9, i % 2, f'"Review" {i // 2},\nof {split}'])
    data = table.getvalue().encode()
    (folder / imdb.FILE).write_bytes(gzip.compress(data))
    monkeypatch.setattr(imdb, "DIGEST", hashlib.sha256(data).hexdigest())
    return folder


def test_fallback_is_used_where_the_official_data_is_not_available(small_cifar_imdb, tmp_path, monkeypatch, capsys):
    asked = []

    def get(_, url, **__):
        asked.append(url)
        raise requests.ConnectionError("Name or service not known", request=requests.Request("GET", url))

    monkeypatch.setattr(requests.Session, "get", get)
    config = cifar_imdb.get_config()
    with config.unlocked():
        config.data.update(dir=str(tmp_path / "data"), manual_dir=str(small_cifar_imdb), valid_fraction=0.3)
    for times in (1, 1):  # what failed once is not tried again
        dataset = datasets.load(configs.read(config).data, seed=0)
        assert dataset.name == cifar_imdb.ARCHIVES and len(dataset.splits["test"]) == 10
        assert len(asked) == times
    said = capsys.readouterr().out
    assert f"{cifar_imdb.ARCHIVES} in place of {cifar_imdb.TFDS}: dataset 'cifar10' is not prepared yet" in said
    with monkeypatch.context() as patch:
        patch.setattr(sources, "available_name", lambda *_, **__: cifar_imdb.TFDS)  # as if it was prepared since
        assert (
            datasets.load(configs.read(config).data, seed=0, splits=("test",), saved=dataset.saved()).name
            == cifar_imdb.ARCHIVES
        )
    with config.unlocked():
        config.data.fallback_name = ""
    with pytest.raises(UserError, match="cannot be downloaded"):
        datasets.load(configs.read(config).data, seed=0)


def test_images_keep_their_bytes_and_classes(small_cifar_imdb, tmp_path):
    builder = prepare("cifar10_images", tmp_path / "data", small_cifar_imdb)
    read = sorted(rows(builder, "train"), key=lambda row: row["id"])
    assert len(read) == 30 and len(rows(builder, "test")) == 10
    for row in read:
        _, name, number = row["id"].decode().split("/")
        assert cifar.CLASSES[row["label"]] == name
        assert abs(int(row["image"][0, 0, 0]) - (20 * int(row["label"]) + int(number[:4]))) <= 2


def test_reviews_keep_the_official_splits(small_cifar_imdb, tmp_path):
    builder = prepare("imdb_subset", tmp_path / "data", small_cifar_imdb)
    for split, n in REVIEWS.items():
        read = sorted(rows(builder, split), key=lambda row: row["id"])
        assert [row["label"] for row in read] == [i % 2 for i in range(n)]
        assert read[1]["text"] == f'"Review" 0,\nof {split}'.encode()
        assert read[0]["group"] == read[1]["group"] != read[2]["group"]  # the same words


def test_pair_joins_row_i_with_review_i(small_cifar_imdb, tmp_path):
    source = sources.open_source(
        "pair:cifar10_images+imdb_subset:by=index", "train", data_dir=str(tmp_path / "data"),
        manual_dir=str(small_cifar_imdb), seed=0,
    )  # fmt: skip
    assert len(source.rows) == 30
    assert source.class_names["label"] == cifar.CLASSES  # the picture's
    assert source.rows[0]["text"] == source.rows[8]["text"] != source.rows[2]["text"]


def test_reviews_of_another_file_or_none_are_refused(small_cifar_imdb, tmp_path):
    path = small_cifar_imdb / imdb.FILE
    path.write_bytes(gzip.compress(b"split,official_split\n"))
    with pytest.raises(UserError, match="not the known file"):
        prepare("imdb_subset", tmp_path / "data", small_cifar_imdb)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"reviews\.csv\.gz: the file is corrupt"):
        prepare("imdb_subset", tmp_path / "data", small_cifar_imdb)
    path.unlink()
    with pytest.raises(UserError, match=r"manual_dir=.* must contain .*reviews\.csv\.gz"):
        prepare("imdb_subset", tmp_path / "data", small_cifar_imdb)
    assert left_behind(tmp_path / "data") == []


def test_real_files_are_the_known_ones():
    folder = real(cifar.ARCHIVE)
    assert len(cifar.archives.check(cifar.ARCHIVE, str(folder / cifar.ARCHIVE.filename))) == 60_000
    with gzip.open(REAL / imdb.FILE) as file:
        assert hashlib.sha256(file.read()).hexdigest() == imdb.DIGEST
