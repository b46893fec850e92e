"""The arguments of a config file: what follows the colon of `configs/X.py:key=value,key=value`."""

from typing import Any

from ml_collections import ConfigDict

from mmfusion.errors import UserError, nearest


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Parses what follows the colon of `configs/X.py:key=value,key=value`, each value by its default's type.

    Raises:
      UserError: a key that this config does not take, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, value = item.partition("=")
        if not equals or name not in defaults:
            raise UserError(f"config argument {item!r} is not key=value of a known key: {nearest(name, defaults)}")
        values[name] = _typed(value, defaults[name], f"config argument {name}")
    return ConfigDict(values)


def _typed(value: str, default: Any, where: str) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise UserError(f"{where}={value!r} is not of type {kind.__name__}") from None
