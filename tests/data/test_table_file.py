import csv
import datetime
import decimal
import gzip
import json
import sys
import tracemalloc

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from mmfusion.data import table_file
from mmfusion.data.table_file import open_table
from tests.errors import rejects


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path):
    """Returns the columns, the values of each row, None for one that cannot be read, and the errors by row number."""
    table = open_table(path)
    found = list(table)
    assert [number for number, _, _ in found] == list(range(len(found)))
    assert all((row is None) == bool(error) for _, row, error in found)
    assert all(list(row) == table.columns for _, row, _ in found if row is not None)
    rows = [None if row is None else list(row.values()) for _, row, _ in found]
    return table.columns, rows, {number: error for number, _, error in found if error}


# --- CSV and TSV ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"id,text\n1,caf\xc3\xa9\n2,\n"),
        ("a.csv", b"id,text\n1,caf\xc3\xa9\n2,"),
        ("a.csv", b"id,text\r\n1,caf\xc3\xa9\r\n2,\r\n\r\n\n"),
        ("a.csv", b"id,text\r1,caf\xc3\xa9\r2,\r"),
        ("a.csv", b"\xef\xbb\xbfid,text\n1,caf\xc3\xa9\n2,\n"),
        ("a.csv", "id,text\n1,café\n2,\n".encode("utf-16")),
        ("a.csv", b"\xfe\xff" + "id,text\n1,café\n2,\n".encode("utf-16-be")),
        ("A.CSV", b"id;text\n1;caf\xc3\xa9\n2;\n"),
        ("a.csv", b'"id";"text"\n1;"caf\xc3\xa9"\n2;\n'),
        ("a.csv", b"id\ttext\n1\tcaf\xc3\xa9\n2\t\n"),
        ("a.tsv", b"id\ttext\n1\tcaf\xc3\xa9\n2\t\n"),
        ("données.tab", b"id\ttext\n1\tcaf\xc3\xa9\n2\t\n"),
        ("a.csv.gz", gzip.compress(b"id,text\n1,caf\xc3\xa9\n2,\n", mtime=0)),
    ],
)
def test_csv_is_read_in_its_encoding_and_separator(name, content, tmp_path):
    assert read(write(tmp_path, name, content)) == (["id", "text"], [["1", "café"], ["2", ""]], {})


def test_csv_cells_keep_quotes_newlines_spaces_and_length(tmp_path):
    cells = ['a "quoted" word', "two\r\nlines\nand\rthree", " a, b; c\t", "x" * 300_000, "1_000", "\u2028\x85"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["a", "b", "c", "d", "e", "f"], cells])
    assert read(tmp_path / "a.csv")[1] == [cells]


def test_csv_commas_separate_where_the_header_has_both(tmp_path):
    assert read(write(tmp_path, "a.csv", "a;b,c\n1;2,3\n"))[:2] == (["a;b", "c"], [["1;2", "3"]])


def test_csv_rows_of_another_length_are_errors_in_their_place(tmp_path):
    content = 'a,b\n1,2\n3\n4,"5\n5",6\n\n7,8\n9,\0\n0\n\n\n'
    _, rows, errors = read(write(tmp_path, "a.csv", content))
    assert rows == [["1", "2"], None, None, None, ["7", "8"], None, None]
    assert errors == {
        1: "line 3 has 1 cells, the header has 2",
        2: "line 4 has 3 cells, the header has 2",
        3: "a blank line",
        5: "column 'b' has a NUL character",
        6: "line 9 has 1 cells, the header has 2",
    }


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "has no columns"),
        (b"\n1,2\n", "has no columns"),
        (b"a,b,a\n1,2,3\n", "has the column 'a' twice"),
        (b",a\n0,1\n", "column 1 has no name"),
        (b"a, \n0,1\n", "column 2 has no name"),
        ("a,b\n1,2\n".encode("utf-16-le"), "NUL characters in its header"),
    ],
)
def test_csv_needs_unique_column_names(content, fact, tmp_path):
    path = write(tmp_path, "a.csv", content)
    with rejects(path, None, says=fact):
        open_table(path)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("a,b\n1,2\n3,café\n".encode("latin-1"), "line 3: byte 0xe9 is not UTF-8"),
        (b"a,b\n1,2\n\xc3", "line 3: byte 0xc3 is not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16") + b"x", "not valid UTF-16; save it as UTF-8"),
        (b'a,b\n1,2\n3,"4\n5,6\n7,8\n', "begins on line 3: a quoted cell is not closed"),
        (b'a,b\n1,2\n"3\n\n4" x,5\n6,7\n', "begins on line 3: ',' expected after '\"'"),
    ],
)
def test_csv_damage_is_refused_with_its_line(content, fact, tmp_path):
    path = write(tmp_path, "a.csv", content)
    with rejects(path, None, says=fact):
        list(open_table(path))


# --- JSON ---

OBJECTS = [
    {"id": 2**60 + 1, "q": {"text": "é\n", "n": {"deep": 1.5}}, "ok": True, "v": [0.1, None, 3]},
    {"id": -1, "more": None, "ok": False, "v": [], "q": {}},
]
FLAT = (
    ["id", "q/text", "q/n/deep", "ok", "v", "more"],
    [[2**60 + 1, "é\n", 1.5, True, [0.1, None, 3], None], [-1, None, None, False, [], None]],
    {},
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_values_keep_their_types(name, encoding, tmp_path):
    lines = [json.dumps(item, ensure_ascii=False) for item in OBJECTS]
    text = json.dumps(OBJECTS) if ".json." in f"{name}." else "\r\n".join([*lines, "", ""])
    content = text.encode(encoding)
    found = read(write(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content))
    assert found == FLAT
    assert [type(value) for value in found[1][0]] == [int, str, float, bool, list, type(None)]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("[1]", "line 2: must be an object, got [1]"),
        ("{'a': 1}", "line 2: not JSON: Expecting property name enclosed in double quotes at character 2"),
        ('{"a": NaN}', "line 2: NaN is no number of JSON; write null"),
        ('{"a": -Infinity}', "line 2: -Infinity is no number of JSON; write null"),
        ('{"a": 1e999}', "line 2: the number 1e999 is too large"),
        ('{"a": 1, "a": 2}', "line 2: the key 'a' occurs twice"),
        ('{"a/b": 1, "a": {"b": 2}}', "line 2: the key 'a/b' occurs twice"),
        ('{"a": "\\ud83d"}', r"line 2: has half of a surrogate pair, such as \ud800"),
        ('{"a": "x\\u0000"}', "column 'a' has a NUL character"),
        ("", "a blank line"),
        ('{"a": 1} {"a": 2}', "line 2: not JSON: Extra data at character 10"),
    ],
)
def test_json_lines_that_are_no_object_are_errors_in_their_place(line, error, tmp_path):
    path = write(tmp_path, "a.jsonl", f'{{"a": "\\ud83d\\ude00"}}\n{line}\n{{"a": null}}\n')
    assert read(path) == (["a"], [["😀"], None, [None]], {1: error})


def test_json_lines_of_deep_lists_are_errors(tmp_path):
    deep = "[" * 100_000
    _, rows, errors = read(write(tmp_path, "a.jsonl", f'{{"a": 1}}\n{{"a": {deep}\n'))
    assert rows == [[1], None] and "recursion" in errors[1]


def test_json_lines_take_their_columns_from_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(table_file, "HEADER_ROWS", 2)
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 2}\n{"c": 3}\n{"a": 4, "b": 5}\n')
    columns, rows, errors = read(path)
    assert (columns, rows) == (["a", "b"], [[1, None], [None, 2], None, [4, 5]])
    assert errors == {2: "the key 'c' is in none of the first 2 rows; write it there, as null"}


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("a.jsonl", "", "has no columns"),
        ("a.jsonl", "a,b\n1,2\n", "has no JSON object in its first 1000 lines; line 1: not JSON"),
        ("a.jsonl", '{"": 1}', "column 1 has no name"),
        ("a.json", "[]", "has no columns"),
        ("a.json", "[1", "not JSON: Expecting ',' delimiter at character 3"),
        ("a.json", '{"a": [1, 2]}', "must be a list of objects"),
        ("a.json", '{"a": 1}\n{"a": 2}', "one object per line needs the extension .jsonl"),
        ("a.json", '[{"a": NaN}]', "NaN is no number of JSON"),
    ],
)
def test_json_of_another_structure_is_refused(name, content, fact, tmp_path):
    path = write(tmp_path, name, content)
    with rejects(path, None, says=fact):
        open_table(path)


def test_json_list_items_that_are_no_object_are_errors_in_their_place(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1}, 2, {"a": "\\u0000"}]')
    assert read(path)[1:] == ([[1], None, None], {1: "must be an object, got 2", 2: "column 'a' has a NUL character"})


# --- Parquet ---


def test_parquet_values_keep_their_types(tmp_path):
    day = datetime.date(2020, 1, 31)
    time = datetime.datetime(2020, 1, 31, 12, 30, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    columns = {
        "id": pyarrow.array([2**62 + 1, None]),
        "text": pyarrow.array(["é", None]),
        "category": pyarrow.array(["b", None]).dictionary_encode(),
        "bytes": pyarrow.array([b"\x00\xff", None]),
        "ok": pyarrow.array([True, None]),
        "x": pyarrow.array([0.1, None], pyarrow.float32()),
        "price": pyarrow.array([decimal.Decimal("1.10"), None]),
        "day": pyarrow.array([day, None]),
        "time": pyarrow.array([time, None], pyarrow.timestamp("us", tz="Europe/Berlin")),
        "q": pyarrow.array([{"text": "a", "n": {"deep": 1}}, None]),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    names, rows, errors = read(tmp_path / "a.parquet")
    assert (names, errors) == ([*list(columns)[:-1], "q/text", "q/n/deep"], {})
    expected = [
        2**62 + 1, "é", "b", b"\x00\xff", True, float(np.float32(0.1)), decimal.Decimal("1.10"),
        np.datetime64("2020-01-31"), np.datetime64("2020-01-31T10:30:00.000000"), "a", 1,
    ]  # fmt: skip
    assert rows == [expected, [None] * len(expected)]
    assert [type(value) for value in rows[0]] == [type(value) for value in expected]
    assert [rows[0][i].dtype for i in (7, 8)] == ["datetime64[D]", "datetime64[us]"]


def test_parquet_lists_are_arrays(tmp_path):
    def matrix(dtype):
        return pyarrow.list_(pyarrow.large_list(dtype))

    columns = {
        "list": pyarrow.array([[1, 2], [], None], pyarrow.list_(pyarrow.int16())),
        "vector": pyarrow.array([[0.5, 1], [2, None], None], pyarrow.list_(pyarrow.float32(), 2)),
        "image": pyarrow.array([[[1, 2], [3, 4]], [[5, 6]], None], matrix(pyarrow.uint8())),
        "ragged": pyarrow.array(
            [[[1], [2, 3]], [None, [4]], [None]], pyarrow.large_list(pyarrow.list_(pyarrow.int8()))
        ),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    _, rows, _ = read(tmp_path / "a.parquet")
    for values, dtype, expected in zip(
        zip(*rows, strict=True),
        ("int16", "float32", "uint8"),
        ([[1, 2], []], [[0.5, 1], [2, np.nan]], [[[1, 2], [3, 4]], [[5, 6]]]),
        strict=False,
    ):
        assert [value.dtype for value in values[:2]] == [dtype, dtype] and values[2] is None
        for value, known in zip(values, expected, strict=False):
            np.testing.assert_array_equal(value, known)
    ragged = [row[3] for row in rows]
    assert [[item.tolist() for item in ragged[0]], ragged[1][0], ragged[1][1].tolist()] == [[[1], [2, 3]], None, [4]]
    assert isinstance(ragged[2], list) and ragged[2] == [None]


def test_parquet_is_read_in_several_batches_and_row_groups(tmp_path):
    parquet.write_table(pyarrow.table({"a": list(range(1000))}), tmp_path / "a.parquet", row_group_size=300)
    assert read(tmp_path / "a.parquet")[1] == [[i] for i in range(1000)]


def test_parquet_damage_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"a": ["text"] * 1000}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", b"PAR1", b"a,b\n1,2\n", content[:-20], content[:40] + content[60:]):
        path = write(tmp_path, "b.parquet", damaged)
        with rejects(path, None, says="cannot be read as Parquet"):
            list(open_table(path))


def test_parquet_strings_that_are_not_utf8_are_refused(tmp_path):
    column = pyarrow.array([b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"a": column}), tmp_path / "a.parquet")
    with rejects(tmp_path / "a.parquet", None, says="cannot be read as Parquet"):
        list(open_table(tmp_path / "a.parquet"))


def test_parquet_columns_have_unique_names(tmp_path):
    column = pyarrow.array([{"b": 1}])
    parquet.write_table(pyarrow.table([column, pyarrow.array([2])], ["a", "a/b"]), tmp_path / "a.parquet")
    with rejects(tmp_path / "a.parquet", None, says="has the column 'a/b' twice"):
        open_table(tmp_path / "a.parquet")


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path, "a.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with rejects(path, None, says="pip install '.[parquet]'"):
        open_table(path)


# --- Any table ---


@pytest.mark.parametrize(
    ("name", "fact"),
    [("none.csv", "No such file"), ("folder.csv", "must be a file"), ("a\0.csv", "null"), ("cut.csv.gz", "ended")],
)
def test_a_table_that_cannot_be_opened_is_refused(name, fact, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    write(tmp_path, "cut.csv.gz", gzip.compress(b"a,b\n" + np.random.default_rng(0).bytes(99).hex().encode())[:60])
    with rejects("--input=T", None, says=fact):
        list(open_table(tmp_path / name, "--input=T"))


@pytest.mark.parametrize(("name", "suggested"), [("a.cvs", ".csv"), ("a.parquet.gz", ".parquet"), ("a", ".json")])
def test_another_extension_is_refused_with_the_known_ones(name, suggested, tmp_path):
    path = write(tmp_path, name, "a,b\n1,2\n")
    with rejects(path, None, suggests=suggested):
        open_table(path)


def test_a_table_is_read_from_the_start_by_each_iteration(tmp_path):
    table = open_table(write(tmp_path, "a.csv", "a\n1\n2\n"))
    first, second = iter(table), iter(table)
    assert next(first) == next(second) == (0, {"a": "1"}, "")
    assert len(list(table)) == 2


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_a_table_is_read_in_constant_memory(name, tmp_path):
    def peak(rows):
        values = [f"{i:0500}" for i in range(rows)]
        if name == "a.parquet":
            parquet.write_table(pyarrow.table({"a": values}), tmp_path / name, row_group_size=500)
        else:
            lines = values if name == "a.csv" else [json.dumps({"a": value}) for value in values]
            write(tmp_path, name, "\n".join(["a"] * (name == "a.csv") + lines))
        tracemalloc.start()
        assert sum(1 for _ in open_table(tmp_path / name)) == rows
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(10)  # imports
    assert peak(20_000) < peak(2_000) + 200_000
