"""Small versions of CIFAR-10 as JPEG files and of the IMDB review subset, and their pairing."""

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
from tests.data.prepare import as_known_archive, prepare, rows, write_zip
from tests.data.test_builders import DATA, remaining_files, require_archives
from tests.errors import rejects

REVIEWS = {"train": 8, "test": 4}


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def small_cifar_imdb(tmp_path, monkeypatch):
    folder = tmp_path / "manual"
    (folder / "imdb_subset").mkdir(parents=True)
    images = {
        f"{split}/{name}/{i:04d}.jpg": jpeg(20 * c + i)
        for split, n in (("train", 3), ("test", 1))
        for c, name in enumerate(cifar.CLASSES)
        for i in range(n)
    }
    write_zip(folder / cifar.ARCHIVE.filename, {**images, "README.md": b"about"})
    monkeypatch.setattr(
        cifar, "ARCHIVE", as_known_archive(folder / cifar.ARCHIVE.filename, members=cifar.ARCHIVE.members)
    )
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


def test_fallback_is_used_when_the_official_data_is_unavailable(small_cifar_imdb, tmp_path, monkeypatch, capsys):
    requested = []

    def get(_, url, **__):
        requested.append(url)
        raise requests.ConnectionError("Name or service not known", request=requests.Request("GET", url))

    monkeypatch.setattr(requests.Session, "get", get)
    config = cifar_imdb.get_config()
    with config.unlocked():
        config.data.update(dir=str(tmp_path / "data"), manual_dir=str(small_cifar_imdb), valid_fraction=0.3)
    for num_requests in (1, 1):  # a failed request is not repeated
        dataset = datasets.load(configs.read(config).data, seed=0)
        assert dataset.name == cifar_imdb.ARCHIVES and len(dataset.splits["test"]) == 10
        assert len(requested) == num_requests
    output = capsys.readouterr().out
    assert (
        f"{cifar_imdb.ARCHIVES} in place of {cifar_imdb.TFDS}: config.data.name='cifar10': not prepared yet" in output
    )
    with monkeypatch.context() as patch:
        # As if it was prepared in the meantime.
        patch.setattr(sources, "available_name", lambda *_, **__: cifar_imdb.TFDS)
        assert (
            datasets.load(configs.read(config).data, seed=0, splits=("test",), saved=dataset.saved()).name
            == cifar_imdb.ARCHIVES
        )
    with config.unlocked():
        config.data.fallback_name = ""
    with rejects("config.data.name", says="cannot be downloaded"):
        datasets.load(configs.read(config).data, seed=0)


def test_cifar10_images_keep_their_pixels_and_classes(small_cifar_imdb, tmp_path):
    builder = prepare("cifar10_images", tmp_path / "data", small_cifar_imdb)
    read = sorted(rows(builder, "train"), key=lambda row: row["id"])
    assert len(read) == 30 and len(rows(builder, "test")) == 10
    for row in read:
        _, name, number = row["id"].decode().split("/")
        assert cifar.CLASSES[row["label"]] == name
        assert abs(int(row["image"][0, 0, 0]) - (20 * int(row["label"]) + int(number[:4]))) <= 2


def test_imdb_subset_keeps_the_official_splits(small_cifar_imdb, tmp_path):
    builder = prepare("imdb_subset", tmp_path / "data", small_cifar_imdb)
    for split, n in REVIEWS.items():
        read = sorted(rows(builder, split), key=lambda row: row["id"])
        assert [row["label"] for row in read] == [i % 2 for i in range(n)]
        assert read[1]["text"] == f'"Review" 0,\nof {split}'.encode()
        assert read[0]["group"] == read[1]["group"] != read[2]["group"]  # the same text


def test_pair_source_by_index_wraps_around(small_cifar_imdb, tmp_path):
    source = sources.open_source(
        "pair:cifar10_images+imdb_subset:by=index", "train", data_dir=str(tmp_path / "data"),
        manual_dir=str(small_cifar_imdb), seed=0,
    )  # fmt: skip
    assert len(source.rows) == 30
    assert source.class_names["label"] == cifar.CLASSES  # those of the image dataset
    assert source.rows[0]["text"] == source.rows[8]["text"] != source.rows[2]["text"]


def test_imdb_subset_rejects_a_changed_or_missing_file(small_cifar_imdb, tmp_path):
    path = small_cifar_imdb / imdb.FILE
    path.write_bytes(gzip.compress(b"split,official_split\n"))
    with rejects(path, says=f"SHA-256 is not {imdb.DIGEST[:12]}"):
        prepare("imdb_subset", tmp_path / "data", small_cifar_imdb)
    path.write_bytes(path.read_bytes()[:-9])
    with rejects(path, says="corrupt"):
        prepare("imdb_subset", tmp_path / "data", small_cifar_imdb)
    path.unlink()
    with rejects("--config.data.manual_dir", str(small_cifar_imdb), says=imdb.FILE):
        prepare("imdb_subset", tmp_path / "data", small_cifar_imdb)
    assert remaining_files(tmp_path / "data") == []


def test_real_cifar_and_imdb_files_match_their_fingerprints():
    folder = require_archives(cifar.ARCHIVE)
    assert len(cifar.archives.check(cifar.ARCHIVE, str(folder / cifar.ARCHIVE.filename))) == 60_000
    with gzip.open(DATA / imdb.FILE) as file:
        assert hashlib.sha256(file.read()).hexdigest() == imdb.DIGEST
