"""Public archives, from `manual_dir` or downloaded, and read straight from the zip: nothing is extracted to disk."""

import contextlib
import dataclasses
import hashlib
import http.client
import os
import re
import ssl
import stat
import struct
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator

import tensorflow_datasets as tfds
from absl import logging

from mmfusion.errors import UserError

LIMIT = 512 * 2**20  # bytes an archive may hold once inflated: some twenty times the largest one we read
# What Python's zipfile raises of bytes that are not as they were. RuntimeError: encrypted; NotImplementedError: several
# disks, or a compression that this Python does not have; OSError: a place before the file's beginning.
BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)
TIMEOUT = 30  # seconds without an answer from the network


@dataclasses.dataclass(frozen=True)
class Archive:
    """A zip of a GitHub branch, pinned by its content: the zip's own bytes may change from one download to the next.

    Attributes:
      filename: its name in `manual_dir`, and among the downloads.
      url: where it comes from.
      members: regular expression of the members that are used, below the archive's one top folder.
      count: how many members that are.
      digest: their `fingerprint`.
    """

    filename: str
    url: str
    members: str
    count: int
    digest: str


def locate(archive: Archive, dl_manager: tfds.download.DownloadManager) -> str:
    """Returns the path of the archive: in `manual_dir` where it is there, else downloaded once.

    Raises:
      UserError: it is not in `manual_dir` and cannot be downloaded.
    """
    with contextlib.suppress(AssertionError):  # TFDS: no manual_dir was given, or it is absent or empty
        if (dl_manager.manual_dir / archive.filename).exists():
            return os.fspath(dl_manager.manual_dir / archive.filename)
    path = os.path.join(os.fspath(dl_manager.download_dir), archive.filename)
    if not os.path.exists(path):
        download(archive, path)
    return path


def download(archive: Archive, path: str) -> None:
    """Downloads the archive to `path`, which appears only once it is whole.

    TFDS's own downloader is not used because without a network it retries for over three minutes.

    Raises:
      UserError: the address does not answer, or breaks off.
    """
    logging.info("downloading %s from %s", archive.filename, archive.url)
    partial = None
    try:
        with urllib.request.urlopen(archive.url, timeout=TIMEOUT) as response:
            expected = int(response.headers.get("Content-Length") or 0)
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), suffix=".partial", delete=False) as file:
                partial, size = file.name, 0
                while block := response.read(2**18):
                    size += len(block)
                    if size > LIMIT:
                        raise UserError(f"{archive.url} sends more than {LIMIT} bytes: it is not the archive")
                    file.write(block)
        if expected and size != expected:
            raise http.client.IncompleteRead(b"", expected - size)
        os.replace(partial, path)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise UserError(
            f"{archive.filename} is not at hand and {archive.url} cannot be downloaded "
            f"({getattr(error, 'reason', None) or error}): put {archive.filename} into a folder and name it with "
            "--config.data.manual_dir=FOLDER"
        ) from error
    finally:
        if partial and os.path.exists(partial):
            os.unlink(partial)


def check(archive: Archive, path: str) -> list[str]:
    """Returns the sorted names of the members that are used, without the top folder, once the whole list is verified.

    Raises:
      UserError: the file is missing, truncated or no zip; a member leaves the folder or is a link; it would inflate
        past `LIMIT`; or its members are not the known ones.
    """
    with _opened(archive, path) as file:
        infos = _used(archive, path, file)
    if len(infos) != archive.count:
        raise UserError(
            f"{path} holds {len(infos)} of the {archive.count} members that are used: fetch it again from {archive.url}"
        )
    if (digest := fingerprint(infos)) != archive.digest:
        raise UserError(
            f"{path} is not the known archive (fingerprint {digest[:12]}, known {archive.digest[:12]}): "
            f"fetch it again from {archive.url}"
        )
    return sorted(infos)


def read(archive: Archive, path: str, names: Iterable[str]) -> dict[str, bytes]:
    """Returns the bytes of each named member, each verified against its CRC-32.

    Args:
      archive: which archive it is.
      path: where it lies.
      names: members without the top folder, as `check` returns them.

    Raises:
      UserError: the file or a member is missing or damaged; names both.
    """
    result = {}
    with _opened(archive, path) as file:
        infos = _used(archive, path, file)
        for name in names:
            if name not in infos:
                raise UserError(f"{path} has no member {name}: fetch it again from {archive.url}")
            try:
                with file.open(infos[name]) as member:
                    result[name] = member.read(infos[name].file_size + 1)  # and no more, where it inflates to more
            except BROKEN as error:
                raise UserError(f"{path}: member {name} is damaged ({error}): fetch it from {archive.url}") from error
    return result


def fingerprint(infos: dict[str, zipfile.ZipInfo]) -> str:
    """Returns the SHA-256 over the sorted (name, size, CRC-32) of members: equal where their contents are."""
    lines = (f"{name} {info.file_size} {info.CRC:08x}\n" for name, info in sorted(infos.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def _opened(archive: Archive, path: str) -> Iterator[zipfile.ZipFile]:
    try:
        file = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: it comes from {archive.url}") from None
    except PermissionError:
        raise UserError(f"{path} may not be read") from None
    except BROKEN as error:
        raise UserError(f"{path} is truncated or not a zip ({error}): fetch it again from {archive.url}") from error
    with file:
        yield file


def _used(archive: Archive, path: str, file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the members that are used by their name below the top folder; every member must be harmless."""
    used, pattern, total = {}, re.compile(archive.members), 0
    for info in file.infolist():
        name = info.filename
        if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
            raise UserError(f"{path}: member {name!r} leaves the archive's folder: fetch it from {archive.url}")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{path}: member {name!r} is a link: fetch it from {archive.url}")
        total += info.file_size
        below = name.partition("/")[2]
        if pattern.fullmatch(below):
            used[below] = info
    if total > LIMIT:
        raise UserError(f"{path} would inflate to {total} bytes, over {LIMIT}: fetch it from {archive.url}")
    return used


def given(dl_manager: tfds.download.DownloadManager, name: str, digest: str) -> bytes:
    """Returns the bytes of a file that must be in `manual_dir`, since it has no address of its own.

    Args:
      dl_manager: that knows `manual_dir`.
      name: the file's path below it.
      digest: its SHA-256.

    Raises:
      UserError: it is not there, or another file.
    """
    path = dl_manager.manual_dir / name
    if not path.exists():
        raise UserError(f"{name} is not in --config.data.manual_dir={dl_manager.manual_dir}: it must be put there")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"{path} is not the known file: its SHA-256 is not {digest[:12]}...")
    return data
