import dataclasses
import io
import pathlib
import tracemalloc
import zipfile

import pytest
import tensorflow_datasets as tfds

from mmfusion.data.builders import archives
from tests.data.prepare import as_known_archive, write_zip
from tests.errors import rejects


@pytest.fixture
def archive(tmp_path):
    path = str(tmp_path / "a.zip")
    write_zip(path, {"data/x.txt": b"first member" * 9, "data/y.txt": b"second member" * 9, "README": b"not used"})
    return as_known_archive(path), path


def test_archive_reads_the_declared_members(archive):
    assert archives.check(*archive) == ["data/x.txt", "data/y.txt"]
    assert archives.read(*archive, ["data/y.txt"]) == {"data/y.txt": b"second member" * 9}


def test_archive_check_rejects_missing_and_truncated_files(archive, tmp_path):
    declared, path = archive
    with rejects(tmp_path / "missing.zip", says="does not exist"):
        archives.check(declared, str(tmp_path / "missing.zip"))
    content = pathlib.Path(path).read_bytes()
    for n in (0, 10, len(content) // 2, len(content) - 1):
        pathlib.Path(path).write_bytes(content[:n])
        with rejects(path, says="truncated"):
            archives.check(declared, path)


def test_archive_read_reports_the_corrupt_member(archive):
    declared, path = archive
    data = bytearray(pathlib.Path(path).read_bytes())
    data[data.index(b"second") + 3] ^= 1
    pathlib.Path(path).write_bytes(data)
    assert archives.read(declared, path, ["data/x.txt"])
    with rejects(path, says="data/y.txt is corrupt"):
        archives.read(declared, path, ["data/y.txt"])
    with rejects(path, says="no member data/z.txt"):
        archives.read(declared, path, ["data/z.txt"])


def test_archive_check_rejects_changed_and_incomplete_files(archive):
    declared, path = archive
    write_zip(path, {"data/x.txt": b"first member" * 9, "data/y.txt": b"other content" * 9})
    with rejects(path, says="fingerprint"):
        archives.check(declared, path)
    write_zip(path, {"data/x.txt": b"first member" * 9})
    with rejects(path, says="1 of the 2 members"):
        archives.check(declared, path)


@pytest.mark.parametrize("name", ["top-main/data/../../../x", "/etc/x", "top-main/..", "C:/x", "top-main\\..\\x"])
def test_archive_check_rejects_members_outside_the_directory(archive, name):
    declared, path = archive
    info = zipfile.ZipInfo("x")
    info.filename = name
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(info, b"")
    with rejects(path, says="outside"):
        archives.check(declared, path)


def test_archive_check_rejects_links_and_zip_bombs(archive, monkeypatch):
    declared, path = archive
    monkeypatch.setattr(archives, "LIMIT", 100)
    with rejects(path, says="would decompress to"):
        archives.check(declared, path)
    monkeypatch.undo()
    info = zipfile.ZipInfo("top-main/data/z.txt")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(info, b"/etc/passwd")
    with rejects(path, says="link"):
        archives.check(declared, path)


def manager(tmp_path, manual_dir=None):
    return tfds.download.DownloadManager(
        download_dir=tmp_path / "downloads", manual_dir=manual_dir, manual_dir_instructions="put it here"
    )


def test_archive_read_stops_at_the_declared_member_size(archive):
    _, path = archive
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("top-main/data/x.txt", bytes(50_000_000))
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data.replace((50_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    declared = as_known_archive(path)
    assert archives.check(declared, path)
    tracemalloc.start()
    with rejects(path, says="data/x.txt is corrupt"):
        archives.read(declared, path, ["data/x.txt"])
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_archive_locate_uses_manual_dir_or_downloads_once(archive, tmp_path, monkeypatch):
    declared, path = archive
    with_url = dataclasses.replace(declared, url=pathlib.Path(path).as_uri())
    (tmp_path / "manual").mkdir()
    # Downloaded, because the directory is empty.
    downloaded = archives.locate(with_url, manager(tmp_path, tmp_path / "manual"))
    assert downloaded == str(tmp_path / "downloads" / "a.zip")
    assert pathlib.Path(downloaded).read_bytes() == pathlib.Path(path).read_bytes()
    monkeypatch.setattr(archives, "download", lambda *_: pytest.fail("downloaded again"))
    assert archives.locate(with_url, manager(tmp_path)) == downloaded
    assert archives.locate(with_url, manager(tmp_path, tmp_path)) == path


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.zip", "file:///nowhere/a.zip"])
def test_archive_locate_without_network_suggests_manual_dir(archive, tmp_path, url):
    declared = dataclasses.replace(archive[0], filename="b.zip", url=url)
    with rejects(url, None, says="put b.zip into a folder and set --config.data.manual_dir=FOLDER"):
        archives.locate(declared, manager(tmp_path, tmp_path))
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["extracted"]


def test_archive_failed_download_leaves_no_file(archive, tmp_path, monkeypatch):
    class Broken(io.BytesIO):
        headers = {"Content-Length": "1000"}  # noqa: RUF012

    monkeypatch.setattr(archives.urllib.request, "urlopen", lambda *_, **__: Broken(b"only this"))
    with rejects(archive[0].url, says="cannot be downloaded"):
        archives.locate(dataclasses.replace(archive[0], filename="b.zip"), manager(tmp_path))
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["extracted"]
