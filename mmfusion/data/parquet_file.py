"""Reads Parquet files as rows of raw values."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfusion.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow

ROWS = 256  # rows decoded at a time


def open_parquet(path: Path, label: str) -> tuple[list[str], Callable[[], Iterator[dict[str, Any]]]]:
    """Returns the columns of a Parquet file, and a function that yields its rows in constant memory.

    Args:
      path: the file.
      label: what errors call the file.

    Raises:
      UserError: the file is no Parquet file, or pyarrow is not installed.
    """
    with _errors(label):
        from pyarrow import array, parquet

        with parquet.ParquetFile(path) as file:
            fields = [(field.name, array([], field.type)) for field in file.schema_arrow]
    return [name for field in fields for name, _ in _leaves(*field)], functools.partial(_rows, path, label)


def _rows(path: Path, label: str) -> Iterator[dict[str, Any]]:
    with _errors(label):
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                fields = zip(batch.schema.names, batch.columns, strict=True)
                columns = {name: _values(array) for field in fields for name, array in _leaves(*field)}
                for i in range(batch.num_rows):
                    yield {name: values[i] for name, values in columns.items()}


@contextlib.contextmanager
def _errors(label: str) -> Iterator[None]:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError("Parquet needs pyarrow: pip install '.[parquet]' in the repository", path=label) from error
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a string that is not UTF-8
        raise UserError(f"cannot be read as Parquet: {one_line(error)}", path=label) from error


def _leaves(name: str, array: "pyarrow.Array") -> Iterator[tuple[str, "pyarrow.Array"]]:
    """Yields a column, or the fields of a struct as columns `OUTER/INNER`."""
    from pyarrow import types

    if types.is_struct(array.type):
        for i, inner in enumerate(array.flatten()):
            yield from _leaves(f"{name}/{array.type.field(i).name}", inner)
    else:
        yield name, array


def _values(array: "pyarrow.Array") -> list[Any]:
    """Returns the values of a column; a null is None."""
    from pyarrow import types

    if types.is_timestamp(array.type) or types.is_date(array.type) or types.is_duration(array.type):
        return [None if np.isnat(value) else value for value in array.to_numpy(zero_copy_only=False)]
    if _is_list(array):
        return [_list(value.values) for value in array]
    return array.to_pylist()


def _is_list(array: "pyarrow.Array") -> bool:
    from pyarrow import types

    return types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type)


def _list(values: "pyarrow.Array | None") -> Any:
    """Returns a list as an array, or as a Python list of arrays where the inner lists differ in shape."""
    if values is None:
        return None
    if not _is_list(values):
        return values.to_numpy(zero_copy_only=False)
    inner = [_list(value.values) for value in values]
    shapes = {item.shape if isinstance(item, np.ndarray) else None for item in inner}
    return np.stack(inner) if len(shapes) == 1 and None not in shapes else inner
