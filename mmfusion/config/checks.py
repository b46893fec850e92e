"""What checks of a config are made of: keys, types, signs and choices, each told in one line."""

from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmfusion.errors import UserError, nearest

NAMES = ("join", "categorical")  # keys that hold names


def check_exact(section: ConfigDict, expected: Mapping[str, Any], path: str, typed: Mapping[str, Any]) -> None:
    """Raises UserError unless a section has exactly the expected keys, those of `typed` of the same type as there."""
    label = section.get("name", section.get("kind", ""))
    for key in section:
        if key not in expected:
            raise UserError(f"config.{path}.{key} is not read by {label!r}: {nearest(key, expected)}")
    for key in expected:
        if key not in section:
            raise UserError(f"config.{path}.{key} is missing; {label!r} reads {', '.join(expected)}")
    for key, default in typed.items():
        if isinstance(default, dict):
            check_exact(section[key], default, f"{path}.{key}", default)
        else:
            check_type(section[key], default, f"{path}.{key}")


def check_type(value: Any, default: Any, path: str) -> None:
    """Raises UserError unless a value is of its default's type; a whole number may stand for any, None for all."""
    if default is None or (isinstance(default, float) and type(value) is int):
        return
    alike = isinstance(value, (tuple, list)) if isinstance(default, (tuple, list)) else type(value) is type(default)
    if alike and isinstance(default, (tuple, list)):
        kinds = (int, float) if not default or type(default[0]) is float else type(default[0])
        kinds = str if path.rpartition(".")[2] in NAMES else kinds
        alike = all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
    if not alike:
        raise UserError(f"config.{path}={value!r} must be of type {type(default).__name__}, like {default!r}")


def check_positive(value: Any, path: str) -> None:
    """Raises UserError unless a number is above 0 and finite."""
    if not 0 < value < float("inf"):
        raise UserError(f"config.{path}={value!r} must be above 0")


def check_member(value: Any, choices: Iterable[str], path: str) -> None:
    """Raises UserError, with the nearest choice, unless a value is one of the choices."""
    if value not in choices:
        raise UserError(f"config.{path}={value!r} is unknown: {nearest(value, choices)}")
