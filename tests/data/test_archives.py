import dataclasses
import io
import pathlib
import tracemalloc
import zipfile

import pytest
import tensorflow_datasets as tfds

from mmfusion.data.builders import archives
from mmfusion.errors import UserError
from tests.data.prepare import known, write_zip


@pytest.fixture
def archive(tmp_path):
    path = str(tmp_path / "a.zip")
    write_zip(path, {"data/x.txt": b"first member" * 9, "data/y.txt": b"second member" * 9, "README": b"not used"})
    return known(path), path


def test_archive_reads_what_is_used(archive):
    assert archives.check(*archive) == ["data/x.txt", "data/y.txt"]
    assert archives.read(*archive, ["data/y.txt"]) == {"data/y.txt": b"second member" * 9}


def test_archive_missing_or_truncated(archive, tmp_path):
    one, path = archive
    with pytest.raises(UserError, match=r"gone\.zip: does not exist"):
        archives.check(one, str(tmp_path / "gone.zip"))
    whole = pathlib.Path(path).read_bytes()
    for n in (0, 10, len(whole) // 2, len(whole) - 1):
        pathlib.Path(path).write_bytes(whole[:n])
        with pytest.raises(UserError, match=r"a\.zip: is truncated or not a zip"):
            archives.check(one, path)


def test_archive_with_a_flipped_bit_names_the_member(archive):
    one, path = archive
    data = bytearray(pathlib.Path(path).read_bytes())
    data[data.index(b"second") + 3] ^= 1
    pathlib.Path(path).write_bytes(data)
    assert archives.read(one, path, ["data/x.txt"])
    with pytest.raises(UserError, match=r"a\.zip: member data/y\.txt is corrupt"):
        archives.read(one, path, ["data/y.txt"])
    with pytest.raises(UserError, match=r"no member data/z\.txt"):
        archives.read(one, path, ["data/z.txt"])


def test_archive_tampered_or_incomplete(archive):
    one, path = archive
    write_zip(path, {"data/x.txt": b"first member" * 9, "data/y.txt": b"other content" * 9})
    with pytest.raises(UserError, match="is not the known archive"):
        archives.check(one, path)
    write_zip(path, {"data/x.txt": b"first member" * 9})
    with pytest.raises(UserError, match="has 1 of the 2 members"):
        archives.check(one, path)


@pytest.mark.parametrize("name", ["top-main/data/../../../x", "/etc/x", "top-main/..", "C:/x", "top-main\\..\\x"])
def test_archive_members_stay_in_the_folder(archive, name):
    one, path = archive
    info = zipfile.ZipInfo("x")
    info.filename = name
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(info, b"")
    with pytest.raises(UserError, match="is outside the archive's folder"):
        archives.check(one, path)


def test_archive_refuses_links_and_bombs(archive, monkeypatch):
    one, path = archive
    monkeypatch.setattr(archives, "LIMIT", 100)
    with pytest.raises(UserError, match="would decompress to"):
        archives.check(one, path)
    monkeypatch.undo()
    info = zipfile.ZipInfo("top-main/data/z.txt")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(info, b"/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        archives.check(one, path)


def manager(tmp_path, manual_dir=None):
    return tfds.download.DownloadManager(
        download_dir=tmp_path / "downloads", manual_dir=manual_dir, manual_dir_instructions="put it here"
    )


def test_archive_member_with_a_wrong_size_is_not_decompressed(archive):
    _, path = archive
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("top-main/data/x.txt", bytes(50_000_000))
    data = pathlib.Path(path).read_bytes()
    pathlib.Path(path).write_bytes(data.replace((50_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    one = known(path)
    assert archives.check(one, path)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"member data/x\.txt is corrupt"):
        archives.read(one, path, ["data/x.txt"])
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_archive_is_read_from_manual_dir_or_downloaded_once(archive, tmp_path, monkeypatch):
    one, path = archive
    served = dataclasses.replace(one, url=pathlib.Path(path).as_uri())
    (tmp_path / "manual").mkdir()
    downloaded = archives.locate(served, manager(tmp_path, tmp_path / "manual"))  # empty: so it is downloaded
    assert downloaded == str(tmp_path / "downloads" / "a.zip")
    assert pathlib.Path(downloaded).read_bytes() == pathlib.Path(path).read_bytes()
    monkeypatch.setattr(archives, "download", lambda *_: pytest.fail("it was there already"))
    assert archives.locate(served, manager(tmp_path)) == downloaded
    assert archives.locate(served, manager(tmp_path, tmp_path)) == path


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.zip", "file:///nowhere/a.zip"])
def test_archive_without_a_network_says_what_to_do(archive, tmp_path, url):
    one = dataclasses.replace(archive[0], filename="b.zip", url=url)
    with pytest.raises(UserError, match=r"put b\.zip into a folder.*--config\.data\.manual_dir=FOLDER"):
        archives.locate(one, manager(tmp_path, tmp_path))
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["extracted"]


def test_archive_download_that_fails_leaves_nothing(archive, tmp_path, monkeypatch):
    class Broken(io.BytesIO):
        headers = {"Content-Length": "1000"}  # noqa: RUF012

    monkeypatch.setattr(archives.urllib.request, "urlopen", lambda *_, **__: Broken(b"only this"))
    with pytest.raises(UserError, match=r"cannot be downloaded"):
        archives.locate(dataclasses.replace(archive[0], filename="b.zip"), manager(tmp_path))
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["extracted"]
