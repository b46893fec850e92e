"""Rows read many at a time: a record read by itself takes ten times as long as one of many."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

ROWS = 256  # read at a time
BYTES = 1 << 30  # of chunks that are kept


class Chunks(Sequence):
    """The rows of a source, a chunk read where one of it is asked for, and kept while there is room.

    A load passes over its rows up to three times in order: what fits is read once.

    Attributes:
      rows: of the source, by themselves.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = rows
        self._chunks: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._bytes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        chunk, place = divmod(range(len(self))[row], ROWS)
        if chunk not in self._chunks:
            self._read(chunk)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk][place]

    def _read(self, chunk: int) -> None:
        rows = list(each(self.rows, np.arange(chunk * ROWS, min((chunk + 1) * ROWS, len(self)))))
        self._chunks[chunk], self._bytes[chunk] = rows, _bytes(rows)
        while len(self._chunks) > 1 and sum(self._bytes.values()) > BYTES:
            del self._bytes[self._chunks.popitem(last=False)[0]]


def each(rows: Sequence[dict[str, Any]], numbers: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields the rows of these numbers `[n]`, read many at a time where the source has `__getitems__`."""
    for start in range(0, len(numbers), ROWS):
        some = numbers[start : start + ROWS].tolist()
        yield from rows.__getitems__(some) if hasattr(rows, "__getitems__") else (rows[number] for number in some)


def leaves(value: Any) -> Iterator[bytes]:
    """Yields what a value of rows is, as bytes: keys, sorted, arrays with their types and shapes, strings."""
    if isinstance(value, np.ndarray) and value.dtype == np.dtype(object):
        value = value.ravel().tolist()
    if isinstance(value, Mapping):
        yield f"{len(value)} keys".encode()
        for key in sorted(value):
            yield from (str(key).encode(), *leaves(value[key]))
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} parts".encode()
        for one in value:
            yield from leaves(one)
    elif isinstance(value, (np.ndarray, np.generic)):
        yield from (f"{value.dtype}{value.shape}".encode(), value.tobytes())
    elif isinstance(value, bytes):
        yield value
    elif hasattr(value, "__getitem__") and not isinstance(value, str):  # TFDS's datasets within a row
        yield from leaves(list(value))
    else:
        yield f"{type(value).__name__} {value!r}".encode()


def _bytes(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, np.ndarray) and value.dtype == np.dtype(object):
        value = value.ravel().tolist()
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return len(value) if isinstance(value, (bytes, str)) else getattr(value, "nbytes", 0)
