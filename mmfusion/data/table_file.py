"""Reads tables from files: CSV, TSV, JSON Lines, JSON, Parquet and NPZ, as rows of raw values.

Rows are streamed in constant memory, except those of a JSON list and of NumPy arrays. A row that cannot be read has an
error in its place; a file that cannot be read row by row is refused.
"""

import codecs
import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from mmfusion.data.array_file import open_npz
from mmfusion.data.parquet_file import open_parquet
from mmfusion.errors import UserError, one_line

CELL_CHARACTERS = 1 << 28  # limit of a cell of CSV, and of a line; the csv module's default is 128 KiB
JSON_CHARACTERS = 1 << 30  # limit of a JSON list, which is read whole
HEADER_ROWS = 1000  # rows of JSON Lines whose keys are the columns
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Values = dict[str, Any]
TableRow = tuple[int, Values | None, str]
Record = Values | str | None  # a row, the reason why it cannot be read, or None for a blank line
Opened = tuple[list[str], Callable[[], Iterator[Record]]]  # the columns, and a function that yields the records


@dataclasses.dataclass(frozen=True)
class Table:
    """A table in a file; each iteration reads it from the start.

    It yields `(number, row, error)`: the number of the row from 0, without the header; a dict of all columns and "", or
    None and the reason why the row cannot be read. Iterating raises UserError where the file is damaged.

    Attributes:
      path: the file.
      columns: the names of its columns, in order.
    """

    path: Path
    columns: list[str]
    _read: Callable[[], Iterator[Record]]

    def __iter__(self) -> Iterator[TableRow]:
        numbers, blank = itertools.count(), 0
        for record in self._read():
            if record is None:
                blank += 1
                continue
            for _ in range(blank):  # blank lines at the end of a file are no rows
                yield next(numbers), None, "a blank line"
            blank = 0
            error = record if isinstance(record, str) else _nul_error(record)
            yield next(numbers), None if isinstance(record, str) or error else record, error


def open_table(path: str | os.PathLike, label: str = "") -> Table:
    """Opens a table, whose format is that of its extension.

    - `.csv`: separated by commas, or by semicolons or tabs if the first line has no comma; `.tsv`, `.tab`: by tabs.
      Cells are strings. UTF-8, or UTF-16 with a byte order mark.
    - `.jsonl`, `.ndjson`: a JSON object per line; `.json`: a list of objects. Values keep their types, nested objects
      become columns `OUTER/INNER`, and a missing key is None. The columns are the keys of the first 1000 rows.
    - `.parquet`: values keep their types, lists are NumPy arrays, dates and times are datetime64 (UTC), and structs
      become columns `OUTER/INNER`.
    - `.npz`: a NumPy array per column, with the row on axis 0.

    All but Parquet and NPZ may be compressed by gzip (`.csv.gz`).

    Args:
      path: the file.
      label: what errors call the file, such as its flag; empty: its path.

    Raises:
      UserError: no such file, another extension, or columns without unique names.
    """
    path = Path(path)
    label = label or str(path)
    extension = Path(path.name.lower().removesuffix(".gz")).suffix
    if extension not in FORMATS or (extension in (".parquet", ".npz") and path.suffix.lower() == ".gz"):
        raise UserError("no such format of a table", path=label, choices=FORMATS)
    with _read_errors(label):
        regular = stat.S_ISREG(os.stat(path).st_mode)  # reading a pipe would wait
    if not regular:
        raise UserError("must be a file", path=label)
    columns, read = FORMATS[extension](path, label)
    _check_columns(columns, label)
    return Table(path, columns, read)


def _check_columns(columns: Sequence[str], label: str) -> None:
    if not columns:
        raise UserError("has no columns: it is empty, or its first line is", path=label)
    for position, name in enumerate(columns, start=1):
        if "\0" in name:
            raise UserError("has NUL characters in its header; save it as UTF-8", path=label)
        if not name.strip():
            raise UserError(f"column {position} has no name (pandas: to_csv(index=False))", path=label)
    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"has the column {repeated[0]!r} twice", path=label)


def _nul_error(row: Values) -> str:
    for name, value in row.items():
        if isinstance(value, str) and "\0" in value:
            return f"column {name!r} has a NUL character"
    return ""


@contextlib.contextmanager
def _read_errors(label: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a path with a NUL character
        raise UserError(f"cannot be read: {getattr(error, 'strerror', '') or one_line(error)}", path=label) from error


# --- Text files ---


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


@contextlib.contextmanager
def _open_text(path: Path, label: str, newline: str) -> Iterator[IO[str]]:
    with _read_errors(label):
        with _open(path) as file:
            utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if utf16 else "utf-8-sig"
        with _open(path) as binary, io.TextIOWrapper(binary, encoding, newline=newline) as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                where = "it is not valid UTF-16" if utf16 else _first_bad_byte(path)
                raise UserError(f"{where}; save it as UTF-8", path=label) from error


def _lines(file: IO[str], label: str) -> Iterator[str]:
    """Yields the lines of a file; raises UserError for one beyond the limit, such as gigabytes that were compressed."""
    number = 0
    while line := file.readline(CELL_CHARACTERS):
        number += 1
        if len(line) == CELL_CHARACTERS:
            raise UserError(f"line {number} is longer than {CELL_CHARACTERS:,} characters", path=label)
        yield line


def _first_bad_byte(path: Path) -> str:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}: byte 0x{line[error.start]:02x} is not UTF-8"
    return "it is not UTF-8"


# --- CSV and TSV ---


def _open_csv(path: Path, label: str) -> Opened:
    with _open_text(path, label, newline="") as file:
        first = next(_lines(file, label), "")
    delimiter = next((d for d in (",", ";", "\t") if d in first), ",")
    return _open_delimited(path, label, delimiter)


def _open_delimited(path: Path, label: str, delimiter: str) -> Opened:
    columns = next((cells for _, cells in _cells(path, label, delimiter)), [])
    return columns, functools.partial(_delimited_records, path, label, delimiter, columns)


def _delimited_records(path: Path, label: str, delimiter: str, columns: Sequence[str]) -> Iterator[Record]:
    for line, cells in itertools.islice(_cells(path, label, delimiter), 1, None):
        if not cells:
            yield None
        elif len(cells) != len(columns):
            yield f"line {line} has {len(cells)} cells, the header has {len(columns)}"
        else:
            yield dict(zip(columns, cells, strict=True))


def _cells(path: Path, label: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the cells of each row, the header included, and the line on which the row begins."""
    csv.field_size_limit(CELL_CHARACTERS)
    line = 1
    with _open_text(path, label, newline="") as file:
        reader = csv.reader(_lines(file, label), delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:  # where the next row begins is unknown
            unclosed = "unexpected end" in str(error)
            reason = "a quoted cell is not closed" if unclosed else f"{error}; quotes in a quoted cell are doubled"
            raise UserError(f"in the row that begins on line {line}: {reason}", path=label) from error


# --- JSON ---


def _open_json_lines(path: Path, label: str) -> Opened:
    read = functools.partial(_json_lines, path, label)
    first = list(itertools.islice(read(), HEADER_ROWS))
    columns = _keys(first)
    if errors := [record for record in first if isinstance(record, str)] if not columns else []:
        raise UserError(f"has no JSON object in its first {HEADER_ROWS} lines; {errors[0]}", path=label)
    return columns, lambda: _with_columns(read(), columns)


def _json_lines(path: Path, label: str) -> Iterator[Record]:
    with _open_text(path, label, newline="\n") as file:
        for number, line in enumerate(_lines(file, label), start=1):
            try:
                yield _flatten(_parse(line)) if line.strip() else None
            except (ValueError, RecursionError) as error:
                yield f"line {number}: {_json_reason(error)}"


def _open_json(path: Path, label: str) -> Opened:
    with _open_text(path, label, newline="") as file:
        text = file.read(JSON_CHARACTERS + 1)
    if len(text) > JSON_CHARACTERS:
        raise UserError(f"is longer than {JSON_CHARACTERS:,} characters; save it as JSON Lines (.jsonl)", path=label)
    try:
        items = _parse(text)
    except (ValueError, RecursionError) as error:
        hint = "; one object per line needs the extension .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{_json_reason(error)}{hint}", path=label) from error
    if not isinstance(items, list):
        raise UserError('must be a list of objects (pandas: to_json(orient="records"))', path=label)
    records = [_json_record(item) for item in items]
    columns = _keys(records)
    return columns, lambda: _with_columns(records, columns)


def _json_record(item: Any) -> Record:
    try:
        return _flatten(item)
    except ValueError as error:
        return str(error)


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    return one_line(error)


def _parse(text: str) -> Any:
    value = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique)
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(r"has half of a surrogate pair, such as \ud800") from error
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON; write null")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _unique(pairs: Iterable[tuple[str, Any]]) -> Values:
    result: Values = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} occurs twice")
        result[key] = value
    return result


def _flatten(item: Any) -> Values:
    """Returns an object with keys `OUTER/INNER` in place of nested objects."""
    if not isinstance(item, dict):
        raise ValueError(f"must be an object, got {json.dumps(item)[:40]}")
    return _unique(_leaves(item, ""))


def _leaves(item: Values, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in item.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _keys(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(key for record in records if isinstance(record, dict) for key in record))


def _with_columns(records: Iterable[Record], columns: Sequence[str]) -> Iterator[Record]:
    """Yields records with a value, or None, in every column."""
    known = set(columns)
    for record in records:
        if not isinstance(record, dict):
            yield record
        elif unknown := record.keys() - known:
            yield f"the key {min(unknown)!r} is in none of the first {HEADER_ROWS} rows; write it there, as null"
        else:
            yield {name: record.get(name) for name in columns}


FORMATS: dict[str, Callable[[Path, str], Opened]] = {
    ".csv": _open_csv,
    ".tsv": functools.partial(_open_delimited, delimiter="\t"),
    ".tab": functools.partial(_open_delimited, delimiter="\t"),
    ".jsonl": _open_json_lines,
    ".ndjson": _open_json_lines,
    ".json": _open_json,
    ".parquet": open_parquet,
    ".npz": open_npz,
}
