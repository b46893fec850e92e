"""Public zip archives, from `manual_dir` or downloaded, which are read without extracting them to disk."""

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
from etils import epath

from mmfusion.errors import UserError

LIMIT = 512 * 2**20  # maximum decompressed size in bytes, about twenty times that of the largest archive here
# Exceptions of zipfile for corrupt bytes. RuntimeError: encrypted, several disks, or an unsupported compression (as
# NotImplementedError); OSError: an offset before the start of the file.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)
TIMEOUT = 30  # seconds without a response


@dataclasses.dataclass(frozen=True)
class Archive:
    """A zip of a GitHub branch, pinned by its content, as the bytes of the zip may differ between downloads.

    Attributes:
      filename: its name in `manual_dir` and in the download folder.
      url: its URL.
      members: a regular expression of the members used, below the archive's top folder.
      count: the number of these members.
      digest: their `fingerprint`.
    """

    filename: str
    url: str
    members: str
    count: int
    digest: str


def locate(archive: Archive, dl_manager: tfds.download.DownloadManager) -> str:
    """Returns the path of the archive in `manual_dir`, or in the download folder, where it is downloaded once.

    Raises:
      UserError: it is not in `manual_dir` and cannot be downloaded.
    """
    with contextlib.suppress(AssertionError):  # TFDS raises it if manual_dir is not given, missing or empty
        if (dl_manager.manual_dir / archive.filename).exists():
            return os.fspath(dl_manager.manual_dir / archive.filename)
    path = os.path.join(os.fspath(dl_manager.download_dir), archive.filename)
    if not os.path.exists(path):
        download(archive, path)
    return path


def download(archive: Archive, path: str) -> None:
    """Downloads the archive to `path`, atomically.

    TFDS's downloader is not used because it retries for over three minutes without a network.

    Raises:
      UserError: the server does not respond, or the download is incomplete.
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
                        raise UserError(f"more than {LIMIT} bytes, so it is not the archive", path=archive.url)
                    file.write(block)
        if expected and size != expected:
            raise http.client.IncompleteRead(b"", expected - size)
        os.replace(partial, path)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise UserError(
            f"cannot be downloaded ({getattr(error, 'reason', None) or error}): put {archive.filename} into a folder "
            "and set --config.data.manual_dir=FOLDER",
            path=archive.url,
        ) from error
    finally:
        if partial and os.path.exists(partial):
            os.unlink(partial)


def check(archive: Archive, path: str) -> list[str]:
    """Verifies the archive and returns the sorted names of the members used, without the top folder.

    Raises:
      UserError: the file is missing, truncated or not a zip; a member's path is outside the folder, or a member is a
        link; the decompressed size exceeds `LIMIT`; or the members are not the known ones.
    """
    with _opened(archive, path) as file:
        infos = _used(archive, path, file)
    if len(infos) != archive.count:
        raise _error(archive, path, f"has {len(infos)} of the {archive.count} members used")
    digest = fingerprint(infos)
    if digest != archive.digest:
        raise _error(
            archive, path, f"is not the known archive (fingerprint {digest[:12]}, known {archive.digest[:12]})"
        )
    return sorted(infos)


def read(archive: Archive, path: str, names: Iterable[str]) -> dict[str, bytes]:
    """Returns the bytes of named members, each verified against its CRC-32.

    Args:
      archive: the archive.
      path: its path.
      names: members without the top folder, as returned by `check`.

    Raises:
      UserError: the file or a member is missing or corrupt.
    """
    result = {}
    with _opened(archive, path) as file:
        infos = _used(archive, path, file)
        for name in names:
            if name not in infos:
                raise _error(archive, path, f"has no member {name}")
            size = infos[name].file_size + 1  # one more byte, to detect a wrong size
            try:
                with file.open(infos[name]) as member:
                    result[name] = member.read(size)
            except ZIP_ERRORS as error:
                raise _error(archive, path, f"member {name} is corrupt ({error})") from error
    return result


def fingerprint(infos: dict[str, zipfile.ZipInfo]) -> str:
    """Returns the SHA-256 of the sorted (name, size, CRC-32) of members, which is equal for equal contents."""
    lines = (f"{name} {info.file_size} {info.CRC:08x}\n" for name, info in sorted(infos.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _error(archive: Archive, path: str, message: str) -> UserError:
    return UserError(f"{message}: download it again from {archive.url}", path=path)


@contextlib.contextmanager
def _opened(archive: Archive, path: str) -> Iterator[zipfile.ZipFile]:
    try:
        file = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"does not exist; download it from {archive.url}", path=path) from None
    except PermissionError:
        raise UserError("cannot be read: permission denied", path=path) from None
    except ZIP_ERRORS as error:
        raise _error(archive, path, f"is truncated or not a zip ({error})") from error
    with file:
        yield file


def _used(archive: Archive, path: str, file: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the members used by name below the top folder, and checks that every member is safe."""
    used, pattern, total = {}, re.compile(archive.members), 0
    for info in file.infolist():
        name = info.filename
        if name.startswith("/") or "\\" in name or ":" in name or ".." in name.split("/"):
            raise _error(archive, path, f"member {name!r} is outside the archive's folder")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise _error(archive, path, f"member {name!r} is a link")
        total += info.file_size
        below_top = name.partition("/")[2]
        if pattern.fullmatch(below_top):
            used[below_top] = info
    if total > LIMIT:
        raise _error(archive, path, f"would decompress to {total} bytes, over {LIMIT}")
    return used


def manual_file(dl_manager: tfds.download.DownloadManager, name: str) -> epath.Path:
    """Returns the path of a file that must be in `manual_dir`, as it has no public URL.

    Args:
      dl_manager: TFDS's download manager.
      name: the file's path below `manual_dir`.

    Raises:
      UserError: the file does not exist.
    """
    folder = dl_manager.manual_dir
    if not (folder / name).exists():
        raise UserError(f"must contain {name}", path="--config.data.manual_dir", value=str(folder))
    return folder / name


def read_manual_file(dl_manager: tfds.download.DownloadManager, name: str, digest: str) -> bytes:
    """Returns the bytes of a file that must be in `manual_dir`.

    Args:
      dl_manager: see `manual_file`.
      name: see `manual_file`.
      digest: its SHA-256.

    Raises:
      UserError: the file does not exist, or has another SHA-256.
    """
    path = manual_file(dl_manager, name)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(f"not the known file: its SHA-256 is not {digest[:12]}...", path=str(path))
    return data
