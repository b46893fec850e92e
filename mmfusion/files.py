"""Folders and files, local or in a bucket, that survive a power loss or a full disk."""

import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec.config
from etils import epath

from mmfusion.errors import UserError, storage_errors

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


class RemoteFolder:
    """A folder in a bucket that is a copy of a local one: files are downloaded to it and uploaded from it.

    `result.json` is always copied last: where it is, the other files are.

    Args:
      url: a URL that fsspec knows, such as `gs://bucket/run`.
      local: the local folder.

    Raises:
      UserError: nothing reads such a URL, or its package is not installed.
    """

    def __init__(self, url: str, local: pathlib.Path):
        self._local = local
        with storage_errors(url):
            self._fs, self._root = fsspec.url_to_fs(url.rstrip("/"))

    def names(self, under: str = "", *, recursive: bool = True) -> list[str]:
        """Returns the files that are in the bucket now, or in a folder below it, by their paths below the root."""
        self._fs.invalidate_cache()  # other machines write there
        top = f"{self._root}/{under}".rstrip("/")
        found = self._fs.find(top, maxdepth=None if recursive else 1) if self._fs.exists(top) else []
        return [path.removeprefix(self._root).lstrip("/") for path in found]

    def read(self, name: str) -> bytes:
        """Returns the content of a file in the bucket."""
        return self._fs.cat_file(f"{self._root}/{name}")

    def download(self, names: Iterable[str]) -> None:
        """Copies files from the bucket, each whole or not at all."""
        for name in sorted(names, key=_is_result):
            path = self._local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary(path)
            self._fs.get_file(f"{self._root}/{name}", str(temporary))
            temporary.replace(path)

    def upload(self, paths: Iterable[pathlib.Path]) -> None:
        """Copies files of the local folder to the bucket; folders among the paths are skipped."""
        for path in sorted(filter(pathlib.Path.is_file, paths), key=lambda path: _is_result(path.name)):
            target = f"{self._root}/{path.relative_to(self._local).as_posix()}"
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), target)

    def remove(self, name: str) -> None:
        """Removes a file from the bucket, if it is there."""
        if self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm_file(f"{self._root}/{name}")


def _is_result(name: str) -> bool:
    return name.rpartition("/")[2] == "result.json"


def describe(path: str) -> str:
    """Returns the size and the times of a file, which change when its content does; empty if it cannot be read."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL character
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"  # ctime: also where a copy keeps its mtime


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
    write_bytes(path, (json.dumps(to_builtin(obj), indent=2) + "\n").encode())


def append_json(path: str, entry: Any) -> None:
    """Appends an entry to a file of a JSON list, created if missing; a file of one object becomes a list of it.

    Processes of one machine that append at the same time wait for each other; those that write to a bucket do not.

    Raises:
      UserError: the file holds something else.
    """
    file = epath.Path(path)
    with contextlib.ExitStack() as stack:
        if "://" not in path:
            folder = os.open(file.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed
        try:
            entries = json.loads(file.read_text()) if file.exists() else []
        except ValueError:
            entries = None
        if isinstance(entries, dict):
            entries = [entries]
        if not isinstance(entries, list):
            raise UserError("holds no list of entries; move it away", path=path)
        write_json(path, [*entries, entry])


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
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file, local or in a bucket, whole or not at all, even where several processes write it."""
    if "://" in str(path):
        epath.Path(path).write_bytes(content)  # a bucket's objects are written whole or not at all
        return
    path = pathlib.Path(path)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
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


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """Returns a name beside the file that is unique over hosts and containers, unlike the process id."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:TEMPORARY_DIGITS]}")
