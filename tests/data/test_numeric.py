"""Numbers read from arrays, lists and JSON, and their statistics."""

from decimal import Decimal

import numpy as np
import pytest

from mmfusion.data import numeric


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2.5], [1, 2.5]),
        ((1, None, "3", b"4", "", Decimal("0.5"), True), [1, np.nan, 3, 4, np.nan, 0.5, 1]),
        ("[[1, 2], [null, NaN]]", [[1, 2], [np.nan, np.nan]]),
        (b" [-Infinity, 1e3] ", [-np.inf, 1000]),
        ("0.25", 0.25),
        (np.float16([1, 2]), [1, 2]),
        (np.uint8([[255]]), [[255]]),
        (np.array([np.array([1, 2]), np.array([3, 4])], object), [[1, 2], [3, 4]]),
        ([np.array([1.0, 2.0]), [3, 4]], [[1, 2], [3, 4]]),
        ([2**53 + 2, -(2**53)], [2.0**53 + 2, -(2.0**53)]),
    ],
)
def test_read_takes_numbers_in_any_container(value, expected):
    found = numeric.read(value, "numbers")
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [None, "", "  ", b"", [], "[]", np.zeros((0, 3))])
def test_read_of_no_value_is_none(value):
    assert numeric.read(value, "numbers") is None


@pytest.mark.parametrize(
    "value",
    [
        "a", "[1, 2", "[1 2]", "1_000", {"a": 1}, [{"a": 1}], [[1, 2], [3]], [1, [2]], 1e39, [10**400], 1j, b"\xff",
        np.datetime64("2020-01-01"), np.array(["1"]), "[" * 99_999, object(),
    ],
)  # fmt: skip
def test_read_refuses_other_values_in_one_line(value):
    with pytest.raises(ValueError, match=r"^must be numbers, got ") as raised:
        numeric.read(value, "numbers")
    assert len(str(raised.value)) < 140 and "\n" not in str(raised.value)


def test_statistics_are_those_of_the_finite_values():
    random = np.random.default_rng(0)
    arrays = [random.normal(1e8, [1, 2, 1e-3], (n, 3)) for n in (1, 7, 30)]
    arrays[1][2, 1], arrays[2][:, 0] = -np.inf, np.nan
    mean, std = numeric.statistics(arrays)
    together = np.where(np.isfinite(table := np.concatenate(arrays)), table, np.nan)
    np.testing.assert_allclose(mean, np.nanmean(together, axis=0), rtol=1e-14)
    np.testing.assert_allclose(std, np.nanstd(together, axis=0), rtol=1e-5)


def test_statistics_of_constant_and_missing_dimensions():
    mean, std = numeric.statistics([np.array([[0.1, np.nan]])] * 3)
    np.testing.assert_allclose(mean, [0.1, 0])
    np.testing.assert_array_equal(std, [1, 1])
