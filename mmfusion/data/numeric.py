"""Arrays of numbers: read from arrays, nested lists and JSON, and the statistics of their dimensions.

t positions · D dimensions
"""

import json
import math
import numbers
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import numpy as np

LIMIT = float(np.finfo(np.float32).max)  # of finite numbers, as inputs are float32


def read(value: Any, expected: str) -> np.ndarray | None:
    """Returns numbers as a float64 array of any shape, NaN where one is missing; None for no value or an empty one.

    Args:
      value: a number, an array, a list (nested to any depth), or a number or list as JSON.
      expected: what the value must be, for the error message.

    Raises:
      ValueError: it is something else, lists at the same depth differ in length, or a number is beyond float32.
    """
    try:
        array = _as_array(value)
        result = array.astype(np.float64)
        if (np.abs(result[np.isfinite(result)]) > LIMIT).any():
            raise ValueError("beyond float32")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"must be {expected}, got {short(value)}") from error
    return result if result.size else None


def short(value: Any) -> str:
    """Returns a value's text on one line, of at most 100 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


def _as_array(value: Any) -> np.ndarray:
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        text = value.strip()
        value = json.loads(text) if text[:1] == "[" else text or None
    if value is None:
        return np.zeros(0)
    array = np.asarray(value)
    if isinstance(value, np.ndarray) and array.ndim and array.dtype.kind in "SU":
        raise TypeError("an array of strings")  # of fixed width, which may have truncated numbers
    if array.dtype == object:
        array = np.asarray(array.tolist())  # an array of arrays
    if array.dtype.kind in "OUS":
        return np.array([_number(item) for item in array.reshape(-1).tolist()], np.float64).reshape(array.shape)
    if array.dtype.kind not in "biuf":
        raise TypeError(str(array.dtype))
    return array


def _number(item: Any) -> float:
    if isinstance(item, bytes):
        item = item.decode()
    if item is None or (isinstance(item, str) and not item.strip()):
        return math.nan
    if not isinstance(item, str | numbers.Real | Decimal) or (isinstance(item, str) and "_" in item):
        raise TypeError(type(item).__name__)  # float takes 1_000, and dates as nanoseconds
    return float(item)


def statistics(arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the standard deviation `[D]` of the finite values of arrays `[t, D]`, in one pass.

    The deviation of a dimension without variance is 1, and the mean of one without a finite value is 0. Statistics of
    parts are combined as by Chan et al. 1979 (STAN-CS-79-773), since sums of squares lose precision.
    """
    count, mean, squares = np.zeros(1), np.zeros(1), np.zeros(1)
    for array in arrays:
        finite = np.isfinite(array)
        n = finite.sum(axis=0)
        own_mean = np.where(finite, array, 0).sum(axis=0) / np.maximum(n, 1)
        deviations = np.where(finite, array - own_mean, 0)
        total, delta = np.maximum(count + n, 1), own_mean - mean
        squares = squares + np.square(deviations).sum(axis=0) + np.square(delta) * count * n / total
        mean, count = mean + delta * n / total, count + n
    std = np.sqrt(squares / np.maximum(count, 1))
    return mean, np.where(std > 1e-13 * np.abs(mean), std, 1.0)
