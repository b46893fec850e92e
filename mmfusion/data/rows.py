"""Raw rows by index: those of a prepared dataset, of a pair of datasets, and cached in memory."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mmfusion.data.features import Feature, flatten
from mmfusion.errors import UserError, one_line

ROWS = 256  # rows per read; reading records one at a time takes ten times as long
BYTES = 1 << 30  # size limit of `CachedRows`


class Rows(Protocol):
    """Raw rows (feature -> value) by index; an optional `__getitems__` reads several rows at once."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """A prepared split; a corrupt record stops the run, as the dataset can be prepared again."""

    rows: Rows
    folder: str
    features: Mapping[str, Feature] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            return flatten(self.rows[row], self.features)
        except RuntimeError as error:  # ArrayRecord raises it for a missing, truncated or modified file
            raise UserError(
                f"row {row} of the prepared data is corrupt: remove this folder, and the same command prepares it "
                f"again ({one_line(error)})",
                path=self.folder,
            ) from error

    def __getitems__(self, rows: Sequence[int]) -> Sequence[dict[str, Any]]:
        try:
            return [flatten(row, self.features) for row in iterate(self.rows, np.array(rows))]
        except RuntimeError:
            return [self[row] for row in rows]  # raises the error of the corrupt row


@dataclasses.dataclass(frozen=True)
class PairedRows:
    """Row i of `first` joined with row `partner[i]` of `second`.

    Attributes:
      first: rows of the first dataset.
      second: rows of the second dataset.
      partner: for each row of `first`, the index of a row of `second`.
      prefix: features of `second` whose name also occurs in `first` are renamed to `PREFIX/NAME`.
    """

    first: Rows
    second: Rows
    partner: np.ndarray
    prefix: str

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        pairs = zip(iterate(self.first, np.array(rows)), iterate(self.second, self.partner[rows]), strict=True)
        return [
            {**{(f"{self.prefix}/{name}" if name in first else name): value for name, value in second.items()}, **first}
            for first, second in pairs
        ]


class CachedRows(Sequence):
    """Rows read in chunks, which are cached in memory up to `BYTES`.

    Loading a dataset reads its rows up to three times in order; cached rows are read from storage only once.

    Attributes:
      rows: the rows without the cache.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self._chunks: OrderedDict[int, list[Mapping[str, Any]]] = OrderedDict()
        self._bytes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        chunk, offset = divmod(range(len(self))[row], ROWS)
        if chunk not in self._chunks:
            self._read(chunk)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk][offset]

    def _read(self, chunk: int) -> None:
        rows = list(iterate(self.rows, np.arange(chunk * ROWS, min((chunk + 1) * ROWS, len(self)))))
        self._chunks[chunk], self._bytes[chunk] = rows, _byte_count(rows)
        while len(self._chunks) > 1 and sum(self._bytes.values()) > BYTES:
            oldest, _ = self._chunks.popitem(last=False)
            del self._bytes[oldest]


def iterate(rows: Rows, indices: np.ndarray) -> Iterator[Mapping[str, Any]]:
    """Yields the rows at `indices` `[n]`, read in chunks if `rows` has `__getitems__`."""
    read_chunk = getattr(rows, "__getitems__", None)
    for start in range(0, len(indices), ROWS):
        chunk = indices[start : start + ROWS].tolist()
        yield from read_chunk(chunk) if read_chunk else (rows[index] for index in chunk)


def feature_values(rows: Rows, ids: np.ndarray, name: str) -> list[Any]:
    """Returns a feature's values in the rows `ids` `[n]`; a table reads no files for them."""
    read_column = getattr(uncached(rows), "column", None)
    return read_column(name, ids) if read_column else [rows[i][name] for i in ids.tolist()]


def uncached(rows: Rows) -> Rows:
    """Returns the rows without a cache."""
    return rows.rows if isinstance(rows, CachedRows) else rows


def content(value: Any) -> Iterator[bytes]:
    """Yields the content of a raw value as bytes: sorted keys, arrays with dtype and shape, strings."""
    if type(value) is bytes:  # first, as every file is; NumPy has a subclass
        yield value
        return
    if isinstance(value, np.ndarray) and value.dtype == np.dtype(object):
        value = value.ravel().tolist()
    if isinstance(value, Mapping):
        yield f"{len(value)} keys".encode()
        for key in sorted(value):
            yield from (str(key).encode(), *content(value[key]))
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} parts".encode()
        for item in value:
            yield from content(item)
    elif isinstance(value, (np.ndarray, np.generic)):
        yield from (f"{value.dtype}{value.shape}".encode(), value.tobytes())
    elif isinstance(value, bytes):
        yield value
    elif hasattr(value, "__getitem__") and not isinstance(value, str):  # nested TFDS datasets
        yield from content(list(value))
    else:
        yield f"{type(value).__name__} {value!r}".encode()


def _byte_count(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(map(_byte_count, value.values()))
    if isinstance(value, np.ndarray) and value.dtype == np.dtype(object):
        value = value.ravel().tolist()
    if isinstance(value, (list, tuple)):
        return sum(map(_byte_count, value))
    return len(value) if isinstance(value, (bytes, str)) else getattr(value, "nbytes", 0)
