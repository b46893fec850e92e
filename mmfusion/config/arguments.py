"""The arguments of a config file: what follows the colon of `configs/X.py:key=value,key=value`."""

from typing import Any

from ml_collections import ConfigDict

from mmfusion.errors import UserError

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Returns the values of `key=value,key=value`, each of the type of its default.

    Args:
      arg: what follows the colon of `configs/X.py:key=value,key=value`.
      **defaults: the arguments that the config takes, and their defaults.

    Raises:
      UserError: an argument that the config does not take, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError("must be key=value", path="config argument", value=item)
        if name not in defaults:
            raise UserError("unknown argument", path="config argument", value=name, choices=defaults)
        values[name] = _typed(value, defaults[name], name)
    return ConfigDict(values)


def _typed(text: str, default: Any, name: str) -> Any:
    kind = type(default)
    try:
        return BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise UserError(f"not of type {kind.__name__}", path=f"config argument {name}", value=text) from None
