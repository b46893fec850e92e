"""Arrays of rows in a folder, a NumPy file each, written in chunks by processes that may be killed, and memory-mapped.

A folder `NAME.part` is filled by one process at a time, which moves it to `NAME` when all chunks are written.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mmfusion import files
from mmfusion.files import DISK_FULL

CHUNKS = "chunks.jsonl"  # a line for each chunk that is written whole


def claim(folder: Path, stack: contextlib.ExitStack) -> Path | None:
    """Returns the folder to write into once no other process does; None if another process has finished `folder`."""
    part = folder.with_suffix(".part")
    while not folder.exists():
        part.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the other process has moved it to its final name
            handle = os.open(part, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)  # until it is closed
            if os.path.samestat(os.fstat(handle), os.stat(part)) and not folder.exists():
                return part
    with contextlib.suppress(OSError):
        part.rmdir()  # made after the other process had moved its own
    return None


def create(folder: Path, template: Sequence[np.ndarray], rows: int) -> None:
    """Creates the files of `rows` rows in an existing folder with their final size, unless an earlier process did.

    Args:
      folder: the folder.
      template: an array of any number of rows for each file, which gives its dtype and the shape of a row.
      rows: the number of rows.

    Raises:
      OSError: the disk has not enough space.
    """
    if (folder / CHUNKS).exists():
        return
    for path, leaf in zip(_paths(folder, len(template)), template, strict=True):
        np.lib.format.open_memmap(path, "w+", _stored(leaf.dtype), (rows, *leaf.shape[1:]))
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    (folder / CHUNKS).touch()


def write(folder: Path, rows: int, first: int, arrays: Sequence[Any], note: Any = None) -> None:
    """Writes the rows from `first` on into the files of `rows` rows, and adds the line that says so.

    Args:
      folder: a folder of `create`.
      rows: the number of rows of the files.
      first: the position of the first row.
      arrays: for each file its rows.
      note: JSON value that `finished` returns.

    Raises:
      OSError: the files cannot be written.
    """
    for path, array in zip(_paths(folder, len(arrays)), arrays, strict=True):
        row = array.nbytes // len(array)
        with path.open("r+b") as file:
            file.seek((first - rows) * row, os.SEEK_END)
            file.write(_bytes(array))
    line = {"first": first, "checksum": _checksum(arrays), "note": note}
    handle = os.open(folder / CHUNKS, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(handle, f"{json.dumps(line)}\n".encode())
    finally:
        os.close(handle)


def finished(folder: Path, dtypes: Sequence[np.dtype], chunk: int) -> dict[int, Any]:
    """Returns by its first row the note of each chunk, of at most `chunk` rows, that is written whole."""
    arrays, result = load(folder, dtypes), {}
    for text in (folder / CHUNKS).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the process was killed as it wrote this line
        first = line["first"]
        if _checksum([array[first : first + chunk] for array in arrays]) == line["checksum"]:
            result[first] = line["note"]
    return result


def move(folder: Path, target: Path) -> None:
    """Moves a folder whose chunks are all written to its final name, durably."""
    files.sync(folder)
    folder.rename(target)
    files.sync_file(target.parent)


def load(folder: Path, dtypes: Sequence[np.dtype]) -> list[np.ndarray]:
    """Returns the arrays as memory maps; `dtypes` are those of the files."""
    result = []
    for path, dtype in zip(_paths(folder, len(dtypes)), dtypes, strict=True):
        array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        result.append(array if array.dtype == dtype else array.view(dtype))
    return result


@contextlib.contextmanager
def removed_from_full_disk(folders: Iterable[Path]) -> Iterator[None]:
    """Removes folders that a full disk cannot hold: what is in them would leave no space for the run itself."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        raise


def _paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"{i:02d}.npy" for i in range(count)]


def _stored(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.uint16) if dtype.kind == "V" else dtype  # NumPy's files have no bfloat16


def _bytes(array: Any) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _checksum(arrays: Sequence[Any]) -> str:
    digest = xxhash.xxh3_64()
    for array in arrays:
        digest.update(_bytes(array))
    return digest.hexdigest()
