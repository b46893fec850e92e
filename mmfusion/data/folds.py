"""Divides rows into folds, of equal size or by a feature, and by time; pure functions of the rows' values."""

import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmfusion.data.table import canonical
from mmfusion.data.table_schema import is_missing
from mmfusion.data.text import as_string
from mmfusion.errors import UserError

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def hash_order(name: str) -> int:
    """Returns a hash that orders names alike on every platform."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def strata(names: Sequence[str], classes: Sequence[Any] | None) -> dict[Any, list[str]]:
    """Returns the distinct groups of each class in the order of their hash; a group has its most frequent class.

    Args:
      names: the group of each row.
      classes: the class of each row; None: all the same.
    """
    members: dict[str, Counter] = {}
    for name, label in zip(names, [0] * len(names) if classes is None else classes, strict=True):
        members.setdefault(name, Counter())[label] += 1
    result: dict[Any, list[str]] = {}
    for name in sorted(members, key=hash_order):
        result.setdefault(min(members[name].items(), key=lambda item: (-item[1], str(item[0])))[0], []).append(name)
    return result


def equal_folds(groups: Iterable[Any], count: int, classes: Sequence[Any] | None = None) -> np.ndarray:
    """Returns the fold `[n]` of each row, from 0 on: stratified by class, with the rows of a group in one fold.

    The groups of each class go, the largest first, to the fold that has the fewest rows of that class. Neither the
    order of the rows nor the platform matters.

    Args:
      groups: the group of each row.
      count: the number of folds.
      classes: the class of each row, of which a group has the most frequent; None: all the same.

    Raises:
      UserError: there are fewer groups than folds.
    """
    names = [str(group) for group in groups]
    sizes = Counter(names)
    if len(sizes) < count:
        raise UserError(f"must be at most {len(sizes)}, the number of groups", path="config.data.folds", value=count)
    fold: dict[str, int] = {}
    totals = [0] * count
    for stratum in strata(names, classes).values():
        own = [0] * count
        for name in sorted(stratum, key=lambda name: -sizes[name]):  # a stable sort keeps the order of the hash
            fold[name] = min(range(count), key=lambda i: (own[i], totals[i], i))
            own[fold[name]] += sizes[name]
            totals[fold[name]] += sizes[name]
    return np.array([fold[name] for name in names], np.int64)


def given_folds(values: Sequence[Any], ids: Sequence[int], feature: str) -> tuple[np.ndarray, dict[int, str]]:
    """Returns the fold `[n]` of each row by its value of a feature, and the value of each fold.

    A fold's number is its value where all values are whole numbers; otherwise values are numbered from 0, sorted.

    Args:
      values: the feature of each row.
      ids: the rows' ids, for error messages.
      feature: the feature's name.

    Raises:
      UserError: a value is missing or a negative number, or there is only one.
    """
    where = {"path": "config.data.fold_by", "value": feature}
    for row, value in zip(ids, values, strict=True):
        if is_missing(value):
            raise UserError(f"row {row} has no value", **where)
    names = [canonical(value) for value in values]
    distinct = sorted(set(names))
    if len(distinct) < 2:
        raise UserError(f"must have at least two values, and all rows have {distinct[0]!r}", **where)
    negative = [name for name in distinct if re.fullmatch(r"-\d+", name)]
    if negative:
        raise UserError(f"must not be negative, and a row has {negative[0]}", **where)
    numbers = {name: int(name) for name in distinct if name.isascii() and name.isdecimal()}
    if len(set(numbers.values())) < len(distinct):
        numbers = {name: number for number, name in enumerate(distinct)}
    return np.array([numbers[name] for name in names]), dict(sorted((number, name) for name, number in numbers.items()))


def times(values: Sequence[Any], ids: Sequence[int], feature: str) -> list[int | float]:
    """Returns a number for each row by which rows are ordered in time.

    Args:
      values: dates (ISO 8601; UTC where they have no time zone), or numbers.
      ids: the rows' ids, for error messages.
      feature: the feature's name.

    Raises:
      UserError: a value is missing or of neither form, or the values are of both.
    """
    where = {"path": "config.data.time", "value": feature}
    result, first = [], None
    for row, value in zip(ids, values, strict=True):
        text = as_string(value).strip()
        if is_missing(value) or text == "NaT":
            raise UserError(f"row {row} has no value; give its time, or leave the row out", **where)
        number = _number(text)
        time = number if number is not None else _microseconds(text)
        if time is None:
            raise UserError(f"row {row} has {text[:40]!r}, neither a number nor a date such as 2024-05-31", **where)
        first = first or (row, number is None)
        if first[1] != (number is None):
            names = [f"a {'date' if is_date else 'number'} in row {i}" for i, is_date in (first, (row, number is None))]
            raise UserError(f"must be dates or numbers throughout, and has {' and '.join(names)}", **where)
        result.append(time)
    return result


def _number(text: str) -> int | float | None:
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)  # exact above 2^53
    try:
        number = float(text if "_" not in text else "")
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _microseconds(text: str) -> int | None:
    try:
        date = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return ((date if date.tzinfo else date.replace(tzinfo=datetime.UTC)) - EPOCH) // datetime.timedelta(microseconds=1)


def latest(ordered: Sequence[int | float], fraction: float, kept: int) -> np.ndarray:
    """Returns the mask `[n]` of the latest rows, nearest to `fraction` of all; rows of one time are on one side.

    Args:
      ordered: the time of each row.
      fraction: from 0 to 1.
      kept: the number of distinct times, at least 1, that at least remain on the earlier side.

    Raises:
      UserError: there are not more than `kept` distinct times.
    """
    counts = Counter(ordered)
    distinct = sorted(counts)
    if len(distinct) <= kept:
        message = f"must have at least three different values to divide by, and has {len(distinct)}"
        raise UserError(message, path="config.data.time")
    later = dict(zip(distinct[::-1], np.cumsum([counts[time] for time in distinct[::-1]]).tolist(), strict=True))
    cut = min(distinct[kept:], key=lambda time: abs(later[time] - fraction * len(ordered)))
    return np.array([time >= cut for time in ordered], bool)
