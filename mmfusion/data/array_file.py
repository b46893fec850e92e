"""Reads tables from NumPy archives (.npz) without pickles: an array per column, with the row on axis 0."""

import zipfile
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
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
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
