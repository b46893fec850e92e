"""Folders that are moved and copied, in a bucket, too, and files that outlast a power loss or a full disk."""

import contextlib
import errno
import json
import math
import os
import pathlib
import uuid
from collections.abc import Mapping

import fsspec
from etils import epath


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder to where there is none yet; it may be in a bucket."""
    if "://" not in str(folder):
        folder.rename(target)
        return
    copy_tree(folder, target)  # a bucket has no folders that could be renamed
    folder.rmtree()


def copy_tree(folder: epath.Path, target: epath.Path) -> None:
    """Copies a folder's files; each of the two may be in a bucket."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            path.copy(target / path.name)


def invalidate_listings(folder: epath.Path) -> None:
    """Has what is in a folder looked up anew, where it is in a bucket, whose library keeps what it was told."""
    if "://" in str(folder):
        kind = type(fsspec.url_to_fs(str(folder))[0])
        for one in list(kind._cache.values()):  # epath has one of its own, which it does not give away
            one.invalidate_cache()


def sync(folder: str | os.PathLike) -> None:
    """Brings a folder's files, their names and its own to the disk, where a power loss leaves them."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in [*(os.path.join(place, name) for name in names), place]:
            sync_file(name)
    sync_file(os.path.dirname(os.path.abspath(folder)))


def sync_file(path: str | os.PathLike) -> None:
    """Brings a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Appended:
    """A file that is appended to; what cannot be written yet is kept, and goes before what comes after it.

    Raises:
      OSError: it cannot be opened; of `write` and `sync`, too: something is still kept.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._kept = b""

    def write(self, data: bytes) -> None:
        """Adds bytes, and writes what there is."""
        self._kept += data
        while self._kept:
            self._kept = self._kept[os.write(self._handle, self._kept) :]

    def sync(self) -> None:
        """Brings everything to the disk; raises FileNotFoundError where the file is no longer where it was."""
        self.write(b"")
        os.fsync(self._handle)
        if not os.path.samestat(os.stat(self._path), os.fstat(self._handle)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))

    def close(self) -> None:
        """Closes the file; what is still kept is lost."""
        with contextlib.suppress(OSError):
            self.write(b"")
        os.close(self._handle)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


PARTIAL = 12  # digits in the name of a file that is not written whole yet


def write_json(path: str | os.PathLike, obj) -> None:
    """Writes an object as JSON, whole or not at all; NumPy becomes plain and non-finite numbers null.

    Args:
      path: the file, replaced if there is one; it may be in a bucket.
      obj: dicts, lists, numbers, strings, NumPy arrays.
    """
    text = json.dumps(plain(obj), indent=2) + "\n"
    if "://" in str(path):
        epath.Path(path).write_text(text)  # an object of a bucket is there whole, or not
    else:
        write_text(pathlib.Path(path), text)


def plain(value):
    """Returns the value with NumPy and JAX numbers and arrays as Python's own, and None for non-finite numbers."""
    if isinstance(value, Mapping):
        return {str(name): plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file, whole or not at all, whoever else writes it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:PARTIAL]}")  # process numbers are those of a container
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_file(path.parent)  # the new name is durable only with its directory
