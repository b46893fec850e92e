"""Checks of single sections and values: which keys there are, their types and ranges, from what is declared."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mmfusion.config.choices import choice_options
from mmfusion.config.keys import key_of, section_of
from mmfusion.errors import UserError

# Options that are declared by modules, without a range:
NAMES = ("categorical", "dates", "metrics")  # tuples that are empty by default and hold names
FRACTIONS = ("dropout", "drop", "label_smoothing")  # must be below 1
MAY_BE_NEGATIVE = ("range",)
WORDS = {"class_weights": ("balanced",)}  # strings that an option of another type may be
MAY_BE_ZERO = ("noise",)  # sizes that are not 0 by default, but may be


def check_section(section: Mapping[str, Any], cls: type, path: str = "") -> None:
    """Checks a section, and every section in it, against the declarations of the dataclass `cls`.

    Raises:
      UserError: an unknown or missing key, an unknown choice, a value of another type or outside its range.
    """
    declared = {field.name: field for field in dataclasses.fields(cls) if not field.metadata.get("options")}
    options = {}
    if len(declared) < len(dataclasses.fields(cls)):
        selector = "kind" if "kind" in declared else "name"
        options = choice_options(path.rstrip("."), section.get(selector, ""))
        _check_keys(section, {**declared, **options}, path, owner=section[selector])
    else:
        _check_keys(section, declared, path)
    for name, field in declared.items():
        value, where = section[name], f"{path}{name}"
        if key_of(field):
            _check_declared(value, field, where)
        elif inner := section_of(field):
            check_section(value, inner, f"{where}.")
        else:
            for entry in value:
                _check_entry(value[entry], field, where, entry)
    _check_options({name: section[name] for name in options}, options, path)


def check_member(value: Any, choices: Collection[str], path: str, noun: str) -> None:
    """Raises UserError unless a value is one of the choices, each of which is a `noun`."""
    if value not in choices:
        raise UserError(f"unknown {noun}", path=f"config.{path}", value=value, choices=choices)


def check_positive(value: Any, path: str) -> None:
    """Raises UserError unless a number is above 0 and finite."""
    if not 0 < value < math.inf:
        raise UserError("must be above 0", path=f"config.{path}", value=value)


def _check_keys(section: Mapping[str, Any], expected: Mapping[str, Any], path: str, owner: str = "") -> None:
    for key in section:
        if key not in expected:
            message = f"not read by {owner!r}" if owner else "no such key"
            raise UserError(message, path=f"config.{path}{key}", choices=expected)
    for key in expected:
        if key not in section:
            message = f"is missing; {owner!r} reads {', '.join(expected)}" if owner else "is missing"
            raise UserError(message, path=f"config.{path}{key}")


def _check_declared(value: Any, field: dataclasses.Field, path: str) -> None:
    key = key_of(field)
    assert key
    _check_type(value, field.default, path, item=str)
    if key.choices:
        check_member(value, key.choices, path, "value")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError("must be a finite number", path=f"config.{path}", value=value)
        if not key.allows(value):
            raise UserError(f"must be {key.allowed()}", path=f"config.{path}", value=value)


def _check_entry(entry: Any, field: dataclasses.Field, path: str, name: str) -> None:
    if cls := field.metadata["entries"]:
        check_section(entry, cls, f"{path}.{name}.")
    else:
        options, where = choice_options(path, entry.get("name", name)), f"{path}.{name}."
        _check_keys(entry, options, where, owner=name)
        _check_options(entry, options, where)


def _check_options(values: Mapping[str, Any], defaults: Mapping[str, Any], path: str) -> None:
    """Checks options by their defaults: the type is the default's, and a number is not negative.

    A whole number of a model or objective is a size, and is at least 1 where its default is not 0.
    """
    for name, default in defaults.items():
        value, where = values[name], f"{path}{name}"
        if isinstance(default, Mapping):
            _check_keys(value, default, f"{where}.", owner=name)
            _check_options(value, default, f"{where}.")
            continue
        if any(value in (word, (word,)) for word in WORDS.get(name, ())):
            continue
        _check_type(value, default, where, item=str if name in NAMES else None)
        for number in _numbers(value):
            if name in MAY_BE_NEGATIVE and math.isfinite(number):
                continue
            if not 0 <= number < math.inf:
                raise UserError("must be a finite number and not negative", path=f"config.{where}", value=value)
            if name in FRACTIONS and number >= 1:
                raise UserError("must be at least 0 and below 1", path=f"config.{where}", value=value)
            is_size = path.startswith(("model.", "objectives.")) and type(number) is int
            if is_size and number == 0 and default != 0 and name not in MAY_BE_ZERO:
                raise UserError("must be above 0", path=f"config.{where}", value=value)


def _check_type(value: Any, default: Any, path: str, item: type | None = None) -> None:
    """Raises UserError unless a value is of its default's type; a whole number may stand for a float, None for any.

    The items of a tuple are of type `item`; None: of the type of the default's first item, or numbers.
    """
    if default is None or (isinstance(default, float) and type(value) is int):
        return
    if isinstance(default, (tuple, list)):
        first = type(default[0]) if default else float
        items = item or ((int, float) if first is float else first)
        fits = isinstance(value, (tuple, list)) and all(
            isinstance(each, items) and not isinstance(each, bool) for each in value
        )
    else:
        fits = type(value) is type(default)
    if not fits:
        given = ", not None" if value is None else ""
        message = f"must be of type {type(default).__name__}, like {default!r}{given}"
        raise UserError(message, path=f"config.{path}", value=value)


def _numbers(value: Any) -> Iterator[float]:
    for each in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(each, (int, float)) and not isinstance(each, bool):
            yield each
