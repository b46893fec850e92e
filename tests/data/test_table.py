import datetime
import json

import numpy as np
import pytest

from mmfusion.data import table
from tests.errors import rejects

TYPE = table.TYPE


def fit(rows, **options):
    options = {**TYPE.options, "feature": "+".join(rows[0]), **options}
    fitted = TYPE.load(TYPE.fit(rows, options))
    return lambda row: TYPE.decode(row, options, fitted), fitted, options


def test_table_keeps_integers_beyond_float32_apart():
    times = [1_700_000_000 + i for i in range(5)]  # seconds; float32 has steps of 128 there
    decode, _, _ = fit([{"time": np.int64(t)} for t in times])
    values = [decode({"time": np.int64(t)})[0][0] for t in times]
    np.testing.assert_allclose(values, (np.arange(5) - 2) / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "3"), (3.0, "3"), ("3.0", "3"), (" 3 ", "3"), (np.float32(3), "3"), (3.5, "3.5"), ("3.50", "3.50"),
        (True, "true"), ("TRUE", "true"), (np.bool_(False), "false"), (b"red", "red"), ("", ""), (None, ""),
        (float("nan"), ""), ("007", "007"), ("0", "0"), ("-2.0", "-2"), ("1e3", "1000"), ("inf", "inf"),
        ("8494_9", "8494_9"),
        (np.array(2), "2"), (2**60, str(2**60)),
    ],
)  # fmt: skip
def test_canonical_gives_one_form_of_each_category(value, expected):
    assert table.canonical(value) == expected


def test_table_reads_categories_in_any_form_and_counts_unknown_ones():
    rows = [{"sold": value, "colour": colour} for value, colour in ((True, "red"), (False, "blue"), (True, "red"))]
    decode, fitted, options = fit(rows, categorical=("sold", "colour"))
    decoded = [decode({"sold": sold, "colour": "red"})[0].tolist() for sold in ("true", "True", True, "1")]
    assert decoded == [[1, 1], [1, 1], [1, 1], [0, 1]]
    inputs, mask = zip(
        *(decode(row) for row in ({"sold": 1, "colour": "red"}, {"sold": True, "colour": None})), strict=True
    )
    counts = TYPE.unknown(np.array(inputs), np.array(mask), options, fitted)
    assert counts == {"sold": (1, 2), "colour": (0, 1)}


def test_table_dates_are_time_and_phases_of_year_week_and_day():
    texts = ["2024-01-01", "2024-01-01T12:00:00", "2024-01-08T00:00:00+00:00"]  # Mondays
    decode, fitted, _ = fit([{"day": text} for text in texts], dates=("day",))
    days = np.array([19723, 19723.5, 19730])  # since 1970
    values = np.array([decode({"day": text})[0] for text in texts])  # [3, 7]
    column = fitted["day"]
    np.testing.assert_allclose(values[:, 0], (days - days.mean()) / days.std(), rtol=1e-5)
    raw = values * column["std"] + column["mean"]
    np.testing.assert_allclose(raw[:, 3:5], [[0, 1], [np.sin(np.pi / 7), np.cos(np.pi / 7)], [0, 1]], atol=1e-5)  # week
    np.testing.assert_allclose(raw[:, 5:7], [[0, 1], [0, -1], [0, 1]], atol=1e-5)  # day
    seconds = datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC).timestamp()
    for same in (seconds, str(seconds), np.datetime64("2024-01-01T12:00"), b"2024-01-01 12:00"):
        np.testing.assert_allclose(decode({"day": same})[0], values[1], atol=1e-5)
    assert decode({"day": ""}) is None
    with pytest.raises(ValueError, match="column 'day': 'soon' is not a date in ISO 8601"):
        decode({"day": "soon"})


def test_table_refuses_text_in_a_numeric_column():
    with rejects("column colour", None, says="got red; if it is a category, add it to categorical"):
        fit([{"colour": "red"}])
    decode, _, _ = fit([{"size": "3"}, {"size": 5}, {"size": ""}])
    assert decode({"size": "4.0"})[0].tolist() == [0]
    with pytest.raises(ValueError, match=r"column 'size': must be a finite number, .* got big"):
        decode({"size": "big"})


def test_table_reads_state_of_runs_without_dates():
    state = json.dumps({"x": {"mean": [1.0], "std": [2.0]}, "c": {"categories": ["1", "0"]}})
    row, mask = TYPE.decode({"x": 5.0, "c": 0}, {**TYPE.options, "feature": "x+c"}, TYPE.load(state))
    assert row.tolist() == [2, 2] and mask.all()


def decode_unscaled(value, width):
    fitted = {"v": {"mean": [0.0] * width, "std": [1.0] * width}}
    return TYPE.decode({"v": value}, {**TYPE.options, "feature": "v"}, fitted)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1.5", [1.5]),
        (" -2e3 ", [-2000]),
        ("", [np.nan]),
        (None, [np.nan]),
        ("nan", [np.nan]),
        (7, [7]),
        (True, [1]),
        ("[0.1, null, 3]", [0.1, np.nan, 3]),
        (b"[1, 2]", [1, 2]),
        ([0.1, None, "", "3"], [0.1, np.nan, np.nan, 3]),
        ([], [np.nan]),
        (np.array([1, 2], np.uint8), [1, 2]),
        (np.array([1, None], object), [1, np.nan]),
        (np.float32(0.5), [0.5]),
    ],
)
def test_table_reads_numbers_and_vectors(value, expected):
    decoded = decode_unscaled(value, len(expected))
    row, mask = (np.zeros(len(expected)), np.zeros(len(expected), bool)) if decoded is None else decoded
    np.testing.assert_array_equal(np.where(mask, row, np.nan), np.float32(expected))


@pytest.mark.parametrize(
    "value",
    ["abc", "1,5", "1_000", "inf", [1, "x"], [1, [2]], [{"a": 1}], "[1 2]", "[1", "[" * 99_999, "[1e999]", 10**400,
     np.datetime64("2020-01-01"), np.array(["1"]), np.array([np.inf]), np.array([np.datetime64("2020-01-01")])],
)  # fmt: skip
def test_table_refuses_values_that_are_no_numbers(value):
    with pytest.raises(ValueError, match=r"^column 'v': must be a finite number, or a list .*, got ") as raised:
        decode_unscaled(value, 1)
    assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)


DAYS = np.array(["2024-01-01", "2024-01-02"], "M8[D]")


@pytest.mark.parametrize("value", [[1.0, 2.0], DAYS, "inf", "1e300"])
def test_table_rejects_dates_that_are_not_one_time(value):
    decode, _, _ = fit([{"day": "2024-01-01"}, {"day": "2024-01-02"}], dates=("day",))
    with pytest.raises(ValueError, match=r"must be one date, got an array \[2\]|is not a date in ISO 8601"):
        decode({"day": value})
    np.testing.assert_array_equal(decode({"day": DAYS[:1]})[0], decode({"day": "2024-01-01"})[0])
