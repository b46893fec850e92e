"""Tables: numeric columns standardised by the training statistics, and categories indexed by frequency.

F columns
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.data.modality_type import Decoded, ModalityType, Options
from mmfusion.data.text import as_string
from mmfusion.errors import UserError

OPTIONS = {"categorical": ()}  # the features in `feature` that are categorical; the others are numeric


def _numbers(value: Any) -> np.ndarray:
    """Returns a feature's values `[n]` float32, NaN for a missing value."""
    if value is None or (isinstance(value, (str, bytes)) and not value.strip()):
        return np.array([np.nan], np.float32)
    return np.asarray(value, np.float32).reshape(-1)


def _fit(values: Sequence[Mapping[str, Any]], options: Options) -> str:
    """Returns each column's mean and standard deviation, or its categories, most frequent first, as JSON."""
    columns = {}
    for name in options["feature"].split("+"):
        column = [row[name] for row in values]
        columns[name] = _fit_categories(column) if name in options["categorical"] else _fit_numbers(name, column)
    return json.dumps(columns)


def _fit_categories(values: Sequence[Any]) -> dict[str, Any]:
    counts = Counter(as_string(value) for value in values)
    return {"categories": sorted(set(counts) - {""}, key=lambda category: (-counts[category], category))}


def _fit_numbers(name: str, values: Sequence[Any]) -> dict[str, Any]:
    rows = [_numbers(value) for value in values]
    widths = {row.size for row in rows} - {1} or {1}
    if len(widths) > 1:
        message = f"has {sorted(widths)} values in different rows; all rows must have the same number"
        raise UserError(message, path=f"column {name}")
    width = widths.pop()
    rows = np.array([row if row.size == width else np.full(width, np.nan) for row in rows], np.float64)
    real = np.isfinite(rows)
    count = np.maximum(real.sum(axis=0), 1)
    mean = np.where(real, rows, 0).sum(axis=0) / count
    std = np.sqrt((np.where(real, rows - mean, 0) ** 2).sum(axis=0) / count)
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
            category = as_string(value[name])
            index = column["categories"].index(category) + 1 if category in column["categories"] else 0
            columns.append(np.array([index if category else np.nan]))
        else:
            numbers = _numbers(value[name])
            if numbers.size == 1 and np.isnan(numbers[0]):
                numbers = np.full(len(column["mean"]), np.nan)
            if numbers.size != len(column["mean"]):
                raise ValueError(f"column {name!r} has {numbers.size} values, not {len(column['mean'])}")
            columns.append((numbers - column["mean"]) / column["std"])
    row = np.concatenate(columns).astype(np.float32)  # [F]
    mask = np.isfinite(row)
    return (np.where(mask, row, 0), mask) if mask.any() else None


def _encoder_kwargs(options: Options, fitted: Mapping[str, Any]) -> dict[str, Any]:
    return {"categories": category_counts(fitted)}


TYPE = ModalityType(
    OPTIONS, _shape, _decode, fit=_fit, load=json.loads, encoder_kwargs=_encoder_kwargs, several_features=True
)
