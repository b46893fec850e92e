"""Random tables are read back exactly, and random bytes are rows, errors of rows, or one UserError."""

import csv
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st

from mmfusion.data.table_file import FORMATS, open_table
from mmfusion.errors import UserError
from tests.data.damage import few_and_many

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
NAMES = st.lists(TEXT.filter(str.strip), min_size=2, max_size=4, unique=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def read(path: Path):
    table = open_table(path)
    rows = list(table)
    assert all(not error for _, _, error in rows)
    return table.columns, [row for _, row, _ in rows]


def check_csv(folder, data, names, encoding, separator):
    extension, delimiter = separator
    rows = data.draw(st.lists(st.lists(TEXT, min_size=len(names), max_size=len(names)), max_size=5))
    with (folder / f"a{extension}").open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([names, *rows])
    if delimiter == "," or "," not in "".join(names):
        assert read(folder / f"a{extension}") == (names, [dict(zip(names, row, strict=True)) for row in rows])


def check_json(folder, data, names, encoding, extension):
    values = SCALARS | st.lists(SCALARS, max_size=3)
    cells = data.draw(st.lists(st.lists(values, min_size=len(names), max_size=len(names)), min_size=1, max_size=5))
    rows = [dict(zip(names, row, strict=True)) for row in cells]
    text = json.dumps(rows) if extension == ".json" else "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / f"a{extension}").write_text(text, encoding=encoding, newline="")
    columns, found = read(folder / f"a{extension}")
    assert columns == names
    assert list(map(repr, found)) == list(map(repr, rows))  # 1, 1.0 and True are equal


FRAGMENTS = st.sampled_from(
    [b'"', b",", b";", b"\t", b"\n", b"\r", b"\0", b"a", b"{", b"}", b"[", b"]", b":", b'{"a": ', b"1", b"PAR1", b"\\u",
     b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"NaN", b"\x1f\x8b\x08"]
)  # fmt: skip


def check_bytes(folder, content, extension):
    (folder / f"b{extension}").write_bytes(content)
    try:
        table = open_table(folder / f"b{extension}")
        rows = list(table)
    except UserError as error:
        assert "\n" not in str(error) and error.path == str(folder / f"b{extension}")
        return
    assert [number for number, _, _ in rows] == list(range(len(rows)))
    for _, row, error in rows:
        assert (row is None) == bool(error) and (row is None or list(row) == table.columns)


def check_parquet(folder, content, position):
    import pyarrow
    from pyarrow import parquet

    path = folder / "c.parquet"
    columns = {"a": ["x", "y"] * 50, "v": [[1.0, 2.0]] * 100, "d": pyarrow.array([0] * 100, pyarrow.timestamp("us"))}
    parquet.write_table(pyarrow.table(columns), path)
    start = position % os.path.getsize(path)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(content)
    try:
        rows = list(open_table(path))
    except UserError:
        return
    assert all((row is None) == bool(error) for _, row, error in rows)


EXTENSIONS = st.sampled_from([*FORMATS, ".csv.gz", ".jsonl.gz"])
CSV = st.sampled_from([(".csv", ","), (".tsv", "\t")])
JSON = st.sampled_from([".jsonl", ".json"])
CONTENTS = st.lists(FRAGMENTS | st.binary(max_size=4), max_size=30).map(b"".join)
test_random_csv_is_read_back_exactly, many_csv = few_and_many(check_csv, st.data(), NAMES, ENCODINGS, CSV)
test_random_json_is_read_back_exactly, many_json = few_and_many(check_json, st.data(), NAMES, ENCODINGS, JSON)
test_random_bytes_are_rows_or_errors, many_bytes = few_and_many(check_bytes, CONTENTS, EXTENSIONS)
test_random_damage_of_parquet_is_rows_or_errors, many_parquet = few_and_many(
    check_parquet, st.binary(max_size=200), st.integers(0, 10_000)
)


@pytest.mark.thorough
@pytest.mark.parametrize("check", [many_csv, many_json, many_bytes, many_parquet])
def test_1000_random_tables_are_read_back_or_refused(folder, check):
    check(folder)
