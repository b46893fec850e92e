"""Folders and files, local or in a bucket, that survive a power loss or a full disk."""

import contextlib
import errno
import json
import math
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import fsspec.config
from etils import epath

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of a disk that takes nothing more
TEMPORARY_DIGITS = 12  # hexadecimal digits that end the name of a file not yet written whole

# Another host, or another machine, may have written to a bucket: its listings are not kept.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder, local or in a bucket, to a path that does not exist."""
    if "://" not in str(folder):
        folder.rename(target)
        return
    copy_tree(folder, target)  # a bucket cannot rename folders
    folder.rmtree()


def copy_tree(folder: epath.Path, target: epath.Path) -> None:
    """Copies all files of a folder; either path may be in a bucket."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            path.copy(target / path.name)


def sync(folder: str | os.PathLike) -> None:
    """Flushes all files of a folder, their names and the folder's own name to the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(os.path.join(parent, name))
        sync_file(parent)
    sync_file(os.path.dirname(os.path.abspath(folder)))


def sync_file(path: str | os.PathLike) -> None:
    """Flushes the content of a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AppendFile:
    """A file that is appended to; bytes that cannot be written yet are kept in memory, and written before later ones.

    Raises:
      OSError: the file cannot be opened. `write` and `sync` raise it while bytes are kept.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._pending = b""

    def write(self, data: bytes) -> None:
        """Appends bytes, after those that are still kept."""
        self._pending += data
        while self._pending:
            self._pending = self._pending[os.write(self._handle, self._pending) :]

    def sync(self) -> None:
        """Flushes everything to the disk; raises FileNotFoundError where the file was moved, replaced or deleted."""
        self.write(b"")
        os.fsync(self._handle)
        if not os.path.samestat(os.stat(self._path), os.fstat(self._handle)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))

    def close(self) -> None:
        """Closes the file; bytes that still cannot be written are lost."""
        with contextlib.suppress(OSError):
            self.write(b"")
        os.close(self._handle)


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes an object as JSON, whole or not at all; NumPy values become numbers and lists, non-finite numbers null.

    Args:
      path: the file, local or in a bucket; an existing one is replaced.
      obj: dicts, lists, numbers, strings, NumPy arrays.
    """
    text = json.dumps(to_builtin(obj), indent=2) + "\n"
    if "://" in str(path):
        epath.Path(path).write_text(text)  # a bucket's objects are written whole or not at all
    else:
        write_text(pathlib.Path(path), text)


def to_builtin(value: Any) -> Any:
    """Returns a value with NumPy and JAX numbers and arrays as numbers and lists, and None for non-finite numbers."""
    if isinstance(value, Mapping):
        return {str(name): to_builtin(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_builtin(v) for v in value]
    if hasattr(value, "tolist"):
        return to_builtin(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file, whole or not at all, even where several processes write it."""
    # Not the process id, which is not unique over hosts and containers.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:TEMPORARY_DIGITS]}")
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
    sync_file(path.parent)  # a name is durable only with its folder


def remove_temporary_files(folder: pathlib.Path) -> None:
    """Deletes what `write_text` left in a folder when it was killed."""
    for path in folder.glob(f".*.{'[0-9a-f]' * TEMPORARY_DIGITS}"):
        path.unlink(missing_ok=True)
