"""Datasets from manual files (photos with titles, leaves, digits), as small files of the same layout."""

import csv
import hashlib
import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from mmfusion.data.builders.digit_views import digit_views_dataset_builder as digits
from mmfusion.data.builders.fashion_small import fashion_small_dataset_builder as fashion
from mmfusion.data.builders.leaf import leaf_dataset_builder as leaf
from tests.data.prepare import prepare, rows
from tests.data.test_builders import DATA, remaining_files
from tests.errors import rejects

SPLITS = {"train": 20, "val": 6, "test": 6}


def digest(data):
    return hashlib.sha256(data).hexdigest()


def table(header, lines):
    file = io.StringIO(newline="")
    file.write(f"{header}\r\n")
    csv.writer(file).writerows(lines)
    return file.getvalue().encode()


def write_files(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {name: digest(data) for name, data in files.items()}


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.fixture
def small_fashion(tmp_path, monkeypatch):
    images, lines = io.BytesIO(), []
    with zipfile.ZipFile(images, "w") as file:
        for split, count in SPLITS.items():
            for i in range(count):
                number = f"{len(lines)}"
                photo = io.BytesIO()
                Image.fromarray(np.full((80, 60, 3), 5 * len(lines), np.uint8)).save(photo, "JPEG")
                file.writestr(f"images/{number}.jpg", photo.getvalue())
                season = "" if i == 5 else fashion.SEASONS[i % 4]
                article = fashion.ARTICLES[i % 3]
                lines.append(
                    [
                        split,
                        number,
                        f"{split} {article} {i}",
                        article,
                        i % 3,
                        "a",
                        "b",
                        "Men",
                        "Red",
                        season,
                        2012,
                        "Casual",
                    ]
                )
    header = "split,id,title,articleType,label,masterCategory,subCategory,gender,baseColour,season,year,usage"
    contents = (images.getvalue(), table(header, lines), "\n".join(fashion.ARTICLES).encode())
    digests = write_files(tmp_path / "manual", dict(zip(fashion.FILES, contents, strict=True)))
    monkeypatch.setattr(fashion, "FILES", digests)
    return tmp_path / "manual"


@pytest.fixture
def small_leaf(tmp_path, monkeypatch):
    random, count = np.random.default_rng(0), sum(SPLITS.values())
    label = np.arange(count) % 3
    views = {view: random.normal(label[:, None], 1, (count, 64)).astype(np.float32) for view in leaf.VIEWS}
    images = random.integers(0, 256, (count, 96, 96), np.uint8)
    splits = np.repeat(list(SPLITS), list(SPLITS.values()))
    lines = [[i, 7 * i, splits[i], "Acer", label[i], 9, 9] for i in range(count)]
    header = "row,kaggle_id,split,species,label,orig_width,orig_height"
    contents = (npz(images=images, label=label, **views), table(header, lines))
    monkeypatch.setattr(leaf, "FILES", write_files(tmp_path / "manual", dict(zip(leaf.FILES, contents, strict=True))))
    return tmp_path / "manual"


@pytest.fixture
def small_digits(tmp_path, monkeypatch):
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 20), ("test", 8)):
        arrays[f"label_{split}"] = np.arange(count) % 10
        for view, size in digits.VIEWS.items():
            arrays[f"{view}_{split}"] = random.normal(size=(count, size)).astype(np.float32)
    digests = write_files(tmp_path / "manual", {digits.FILE: npz(**arrays)})
    monkeypatch.setattr(digits, "DIGEST", digests[digits.FILE])
    return tmp_path / "manual"


def test_fashion_small_rows_have_titles_and_seasons(small_fashion, tmp_path):
    builder = prepare("fashion_small", tmp_path / "data", small_fashion)
    read = {row["id"].decode(): row for row in rows(builder, "train")}
    assert len(read) == SPLITS["train"] - 1
    assert "5" not in read
    assert read["7"]["title"].decode() == f"train {fashion.ARTICLES[1]} 7"
    assert (read["7"]["label"], read["7"]["season"], read["7"]["gender"]) == (1, 3, 2)
    assert all(row["summer"] == (fashion.SEASONS[row["season"]] == "Summer") for row in read.values())
    assert {row["summer"] for row in read.values()} == {0, 1}
    assert abs(int(read["7"]["image"][40, 30, 0]) - 35) <= 2
    assert len(rows(builder, "valid")) == len(rows(builder, "test")) == 5


def test_leaf_rows_have_their_views(small_leaf, tmp_path):
    builder = prepare("leaf", tmp_path / "data", small_leaf)
    arrays = np.load(small_leaf / next(iter(leaf.FILES)))
    for split, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        read = rows(builder, split)
        assert len(read) == SPLITS[name]
        for row in read:
            number = int(row["id"].decode().partition("-")[2]) // 7
            np.testing.assert_array_equal(row["image"][..., 0], arrays["images"][number])
            np.testing.assert_array_equal(row["shape"], arrays["shape"][number])
            assert row["label"] == arrays["label"][number]


def test_digit_views_rows_have_their_views(small_digits, tmp_path):
    builder = prepare("digit_views", tmp_path / "data", small_digits)
    arrays = np.load(small_digits / digits.FILE)
    for row in rows(builder, "test"):
        number = int(row["id"].decode().partition("-")[2])
        for view in digits.VIEWS:
            np.testing.assert_array_equal(row[view], arrays[f"{view}_test"][number])


def test_manual_files_reject_changed_and_missing_files(small_digits, tmp_path):
    (small_digits / digits.FILE).write_bytes(b"other")
    with rejects(small_digits / digits.FILE, says="SHA-256"):
        prepare("digit_views", tmp_path / "data", small_digits)
    (small_digits / digits.FILE).unlink()
    with rejects("--config.data.manual_dir", str(small_digits), says=digits.FILE):
        prepare("digit_views", tmp_path / "data", small_digits)
    assert remaining_files(tmp_path / "data") == []


@pytest.mark.parametrize(
    ("name", "expected"), [*fashion.FILES.items(), *leaf.FILES.items(), (digits.FILE, digits.DIGEST)]
)
def test_real_manual_files_match_their_digests(name, expected):
    if not (DATA / name).exists():
        fail_or_skip = pytest.fail if os.environ.get("CI") else pytest.skip  # CI has the data
        fail_or_skip(f"{name} is not in {DATA} (set MMFUSION_DATA)")
    assert digest((DATA / name).read_bytes()) == expected
