"""Reads tables from NumPy archives (.npz) without pickles: an array per column, with the row on axis 0."""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.errors import UserError, one_line


def open_npz(path: Path, label: str) -> tuple[list[str], Callable[[], Iterator[dict[str, Any]]]]:
    """Returns the names of the columns, and a function that yields the rows.

    Args:
      path: the file.
      label: what errors call it.

    Raises:
      UserError: it is no archive of arrays, has Python objects, or arrays with another number of rows.
    """
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(member.file_size for member in file.infolist())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > memory:
            raise UserError(f"has arrays of {size:,} bytes, and this machine has {memory:,} of memory", path=label)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    # MemoryError: a header that declares a larger array than there is memory
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot be read: {one_line(error)}", path=label) from error
    sizes = {name: len(array) if array.ndim else 1 for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"must have arrays with the same number of rows, has {listed}", path=label)
    count = next(iter(sizes.values()), 0)

    def rows() -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield {name: array[i].item() if array.ndim == 1 else array[i] for name, array in arrays.items()}

    return list(arrays), rows
