"""Tables: numeric columns and dates standardised by the training statistics, and categories indexed by frequency.

F columns
"""

import datetime
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.data import numeric
from mmfusion.data.modality_type import Decoded, ModalityType, Options
from mmfusion.data.text import as_string
from mmfusion.errors import UserError

OPTIONS = {
    "categorical": (),  # the features in `feature` that are categorical; the others are numeric
    "dates": (),  # the features in `feature` that are dates: ISO 8601, or seconds since 1970
}
EXPECTED = "a finite number, or a list such as [0.1, 0.2]"
DAY = 86_400.0  # seconds
PERIODS = (365.2425 * DAY, 7 * DAY, DAY)  # year, week, day
MONDAY = 4 * DAY  # 1970-01-05, so that a week starts on Monday


def canonical(value: Any) -> str:
    """Returns the canonical form of a category: `3` for 3, 3.0 and "3.0", `true` for True and "TRUE"; "" if missing."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return ""
    return _canonical_text(as_string(value))


@functools.lru_cache(maxsize=1 << 14)  # categories repeat
def _canonical_text(text: str) -> str:
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    try:
        number = float(text if "_" not in text else "")  # Python reads 8494_9 as a number
    except ValueError:
        return text
    is_integer = number.is_integer() and abs(number) < 2**53 and text.lstrip("+-")[:1].isdigit()
    leading_zero = len(text) > 1 and text[0] == "0" and text[1].isdigit()  # a postal code, say, is not a number
    return str(int(number)) if is_integer and not leading_zero else text


def _numbers(value: Any) -> np.ndarray:
    """Returns a number, or the elements of a vector, as float64 `[n]`, NaN for a missing value.

    Raises:
      ValueError: it is neither a finite number, a list of numbers nor such a list as JSON.
    """
    result = numeric.read(value, EXPECTED)
    if result is None:
        return np.array([np.nan])
    if result.ndim > 1 or np.isinf(result).any():
        raise ValueError(f"must be {EXPECTED}, got {numeric.short(value)}")
    return result.reshape(-1)


def _date(value: Any) -> np.ndarray:
    """Returns the time in days since 1970, and sine and cosine of its phase in the year, the week and the day `[7]`."""
    if isinstance(value, (np.datetime64, np.ndarray)) and np.asarray(value).dtype.kind == "M":
        time = np.asarray(value)
        if time.size != 1:
            raise ValueError(f"must be one date, got an array {list(time.shape)}")
        seconds = np.nan if np.isnat(time).all() else time.astype("datetime64[us]").astype(np.float64).item() / 1e6
    elif isinstance(value, (str, bytes)):
        seconds = _parse_date(as_string(value).strip())
    else:
        numbers = _numbers(value)
        if numbers.size != 1:
            raise ValueError(f"must be one date, got an array {list(numbers.shape)}")
        seconds = numbers.item()
    phases = [2 * np.pi * ((seconds - (MONDAY if period == 7 * DAY else 0)) % period) / period for period in PERIODS]
    return np.array([seconds / DAY, *(f(phase) for phase in phases for f in (np.sin, np.cos))])


def _parse_date(text: str) -> float:
    if not text:
        return np.nan
    try:
        return _numbers(text).item()
    except ValueError:
        pass
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text!r:.80} is not a date in ISO 8601, such as 2024-05-31 or 2024-05-31T14:00") from error
    return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()


def _fit(values: Sequence[Mapping[str, Any]], options: Options) -> str:
    """Returns each column's mean and standard deviation, or its categories, most frequent first, as JSON."""
    columns = {}
    for name in options["feature"].split("+"):
        column = [row[name] for row in values]
        if name in options["categorical"]:
            columns[name] = _fit_categories(column)
        elif name in options["dates"]:
            columns[name] = {**_fit_numbers(name, column, _date), "date": True}
        else:
            columns[name] = _fit_numbers(name, column, _numbers)
    return json.dumps(columns)


def _fit_categories(values: Sequence[Any]) -> dict[str, Any]:
    counts = Counter(canonical(value) for value in values)
    return {"categories": sorted(set(counts) - {""}, key=lambda category: (-counts[category], category))}


def _fit_numbers(name: str, values: Sequence[Any], read: Callable[[Any], np.ndarray]) -> dict[str, Any]:
    rows, errors = [], []
    for value in values:
        try:
            rows.append(read(value))
        except ValueError as error:  # one of few is the error of its row, which is not read then
            errors.append(error)
    if len(errors) > len(rows):
        message = f"{errors[0]}; if it is a category, add it to categorical"
        raise UserError(message, path=f"column {name}") from errors[0]
    widths = {row.size for row in rows} - {1} or {1}
    if len(widths) > 1:
        message = f"has {sorted(widths)} values in different rows; all rows must have the same number"
        raise UserError(message, path=f"column {name}")
    width = widths.pop()
    table = np.array([row if row.size == width else np.full(width, np.nan) for row in rows])  # [n, width]
    real = np.isfinite(table)
    count = np.maximum(real.sum(axis=0), 1)
    mean = np.where(real, table, 0).sum(axis=0) / count
    std = np.sqrt((np.where(real, table - mean, 0) ** 2).sum(axis=0) / count)
    return {"mean": mean.tolist(), "std": np.where(std > 1e-8, std, 1.0).tolist()}


def category_counts(fitted: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the number of categories of each column, including the unknown category; 0 for numeric columns."""
    sizes: list[int] = []
    for column in fitted.values():
        sizes += [len(column["categories"]) + 1] if "categories" in column else [0] * len(column["mean"])
    return tuple(sizes)


def _shape(options: Options, fitted: Mapping[str, Any]) -> tuple[tuple[int, ...], Any, int]:
    count = len(category_counts(fitted))
    return (count,), np.float32, count


def _decode(value: Mapping[str, Any], options: Options, fitted: Mapping[str, Any]) -> Decoded:
    """Standardises numeric columns; category indices start at 1, and 0 is the unknown category."""
    columns = []
    for name, column in fitted.items():
        if "categories" in column:
            category = canonical(value[name])
            index = column["categories"].index(category) + 1 if category in column["categories"] else 0
            columns.append(np.array([index if category else np.nan]))
        else:
            columns.append(_standardised(name, value[name], column))
    row = np.concatenate(columns).astype(np.float32)  # [F]
    mask = np.isfinite(row)
    return (np.where(mask, row, 0), mask) if mask.any() else None


def _standardised(name: str, value: Any, column: Mapping[str, Any]) -> np.ndarray:
    try:
        values = _date(value) if "date" in column else _numbers(value)
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from error
    width = len(column["mean"])
    if values.size == 1 and np.isnan(values[0]):
        values = np.full(width, np.nan)
    if values.size != width:
        raise ValueError(f"column {name!r} has {values.size} values, not {width}")
    return (values - column["mean"]) / column["std"]


def _unknown(
    inputs: np.ndarray, mask: np.ndarray, options: Options, fitted: Mapping[str, Any]
) -> dict[str, tuple[int, int]]:
    """Returns per categorical column the number of unknown categories, and of values."""
    names = [name for name, column in fitted.items() for _ in column.get("mean", (0,))]
    return {
        name: (int((mask[:, i] & (inputs[:, i] == 0)).sum()), int(mask[:, i].sum()))
        for i, name in enumerate(names)
        if "categories" in fitted[name]
    }


def _encoder_kwargs(options: Options, fitted: Mapping[str, Any]) -> dict[str, Any]:
    return {"categories": category_counts(fitted)}


TYPE = ModalityType(
    OPTIONS,
    _shape,
    _decode,
    fit=_fit,
    load=json.loads,
    encoder_kwargs=_encoder_kwargs,
    unknown=_unknown,
    takes=("number", "class", "text", "bytes", "array[1]"),
    several_features=True,
    class_names=True,
)
