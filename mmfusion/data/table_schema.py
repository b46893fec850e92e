"""What the columns of a table hold: files, text, numbers, categories, dates, vectors, labels."""

import dataclasses
import datetime
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.data.table import canonical

FILE_SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".pgm", ".ppm"),
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif", ".au"),
    "video": (".gif", ".apng"),
}
IDENTIFIER = re.compile(r"(.*[_ /])?(id|key|row|index|no|number|filename|file)", re.IGNORECASE)
DATE = re.compile(r"\d{4}-\d\d-\d\d([T ].*)?")
EXACT = 0.995  # share of rows whose label a column gives away, from which it is left out of the inputs
WORDS = 2.5  # mean number of words from which strings are text
CLASSES = 30  # distinct integers up to which an integer label is a class


@dataclasses.dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
      name: its name.
      kind: `image`, `audio`, `video`, `images`, `text`, `number`, `category`, `date`, `vector`, `sequence`, `labels` (a
        list of strings), `identifier`, `constant` or `empty`.
      missing: the number of rows without a value.
      distinct: the number of distinct values.
      about: one line about its values, such as their range.
      problem: why it should not be read as it is; empty: nothing found.
    """

    name: str
    kind: str
    missing: int
    distinct: int
    about: str
    problem: str = ""


def is_missing(value: Any) -> bool:
    """Returns whether a raw value stands for none: None, NaN, an empty string or list."""
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return True
    if isinstance(value, (str, bytes)):
        return not value.strip()
    return isinstance(value, (list, tuple, np.ndarray)) and np.size(value) == 0


def describe(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], folder: Path) -> dict[str, Column]:
    """Returns what each column holds.

    Args:
      rows: the table's rows.
      columns: their columns.
      folder: the folder that paths of files are relative to.
    """
    return {name: _describe(name, [row[name] for row in rows], folder) for name in columns}


def _describe(name: str, values: Sequence[Any], folder: Path) -> Column:
    present = [value for value in values if not is_missing(value)]
    missing = len(values) - len(present)
    if not present:
        return Column(name, "empty", missing, 0, "no value")
    if all(isinstance(value, np.ndarray) and value.ndim > 1 for value in present):
        return _describe_arrays(name, present, missing)
    parsed = [parse_list(value) for value in present]
    if all(isinstance(value, list) for value in parsed):
        return _describe_lists(name, parsed, missing, folder)
    forms = [canonical(value) for value in present]
    distinct = len(set(forms))
    for kind in ("image", "audio", "video"):
        if all(form.lower().endswith(FILE_SUFFIXES[kind]) for form in forms):
            absent = sum(not (folder / form).is_file() for form in forms)
            problem = f"{absent:,} of {len(forms):,} files do not exist under {folder}" if absent else ""
            return Column(name, kind, missing, distinct, f"{len(forms):,} files", problem)
    if distinct == 1 and len(present) > 1:
        return Column(name, "constant", missing, 1, f"always {forms[0][:40]!r}")
    if all(DATE.fullmatch(form) and _is_date(form) for form in forms):
        return Column(name, "date", missing, distinct, f"{min(forms)} to {max(forms)}")
    numbers = [_number(form) for form in forms]
    if all(number is not None for number in numbers) and not set(forms) <= {"true", "false"}:
        return _describe_numbers(name, [n for n in numbers if n is not None], missing, distinct)
    return _describe_strings(name, forms, missing, distinct)


def _describe_arrays(name: str, arrays: Sequence[np.ndarray], missing: int) -> Column:
    shapes = sorted({array.shape for array in arrays})
    first = arrays[0]
    about = f"arrays {first.dtype} {list(shapes[0])}" + (f" to {list(shapes[-1])}" if len(shapes) > 1 else "")
    if first.ndim == 2:
        kind = "image" if first.dtype == np.uint8 else "sequence"
    else:
        kind = "image" if first.ndim == 3 else "images"
    return Column(name, kind, missing, len(arrays), about)


def parse_list(value: Any) -> Any:
    """Returns a list for a list, an array with axes, or a JSON list in a string; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, np.ndarray) and value.ndim:
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _describe_lists(name: str, values: list[list[Any]], missing: int, folder: Path) -> Column:
    lengths = sorted({len(value) for value in values})
    span = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    items = [item for value in values for item in value]
    if all(isinstance(item, str) for item in items):
        if all(item.lower().endswith(FILE_SUFFIXES["image"]) and (folder / item).is_file() for item in items):
            return Column(name, "images", missing, len(values), f"lists of {span} image files")
        return Column(name, "labels", missing, len(set(items)), f"lists of {span} of {len(set(items))} labels")
    nested = any(isinstance(item, list) for item in items)
    kind = "sequence" if nested or len(lengths) > 1 else "vector"
    return Column(name, kind, missing, len(values), f"{span} {'steps' if kind == 'sequence' else 'numbers'}")


def _describe_numbers(name: str, numbers: list[float], missing: int, distinct: int) -> Column:
    whole = all(number.is_integer() for number in numbers)
    about = f"{min(numbers):g} to {max(numbers):g}, mean {statistics.fmean(numbers):g}"
    unique = distinct == len(numbers) > 1 and whole
    kind = "identifier" if unique and IDENTIFIER.fullmatch(name) else "number"
    return Column(name, kind, missing, distinct, f"{'integers' if whole else 'numbers'} {about}")


def _describe_strings(name: str, forms: list[str], missing: int, distinct: int) -> Column:
    words = statistics.fmean(len(form.split()) for form in forms)
    unspaced = statistics.fmean(len(form) for form in forms) > 20 and words < 1.5
    if distinct > 0.9 * len(forms) > 1 and words < 1.5 and IDENTIFIER.fullmatch(name):
        return Column(name, "identifier", missing, distinct, f"such as {forms[0][:40]!r}")
    if words >= WORDS or (unspaced and distinct > len(forms) / 2):
        lengths = sorted(len(form.split()) for form in forms)
        about = f"texts of {words:.0f} words, 95 % up to {lengths[int(0.95 * (len(lengths) - 1))]}"
        return Column(name, "text", missing, distinct, about)
    common = ", ".join(f"{form[:20]} {count:,}" for form, count in Counter(forms).most_common(3))
    return Column(name, "category", missing, distinct, f"{distinct:,} categories: {common}")


def _is_date(text: str) -> bool:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _number(form: str) -> float | None:
    try:
        number = float(form if "_" not in form else "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def target_kind(column: Column, values: Sequence[Any]) -> str:
    """Returns the type of target that suits a label column: `classification`, `multilabel` or `regression`.

    Integers are classes if few, or if they are numbered without a gap and about equally frequent.
    """
    if column.kind in ("labels", "vector"):
        return "multilabel"
    if column.kind != "number":
        return "classification"
    numbers = [float(canonical(value)) for value in values if not is_missing(value)]
    if not all(number.is_integer() for number in numbers):
        return "regression"
    counts = Counter(numbers)
    numbered = min(counts) in (0, 1) and max(counts) - min(counts) + 1 == len(counts) <= len(numbers) / 3
    even = max(counts.values()) <= 2 * min(counts.values())
    few = len(counts) <= max(CLASSES, len(numbers) // 100)
    return "classification" if few or (numbered and even) else "regression"


def gives_away(rows: Sequence[Mapping[str, Any]], column: Column, label: str) -> bool:
    """Returns whether a column with repeated values tells the label of nearly every row."""
    if column.kind not in ("category", "number") or column.distinct > len(rows) / 2:
        return False
    by_value: dict[str, Counter] = {}
    for row in rows:
        if not is_missing(row[label]):
            by_value.setdefault(canonical(row[column.name]), Counter())[canonical(row[label])] += 1
    labels = {label for counts in by_value.values() for label in counts}
    correct = sum(max(counts.values()) for counts in by_value.values())
    return len(labels) > 1 and correct >= EXACT * sum(counts.total() for counts in by_value.values())
