"""Classes by name: an entry of one of our registries, or `package.module:Class` from anywhere on the Python path."""

import importlib
from collections.abc import Mapping
from typing import TypeVar, cast

from mmfusion.errors import UserError

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, path: str, *, expected: type = type) -> T:
    """Returns the class (or the object of the type `expected`) that a name stands for.

    Args:
      registry: name -> class.
      name: a name of the registry, or `package.module:Class`, which is imported.
      path: the config key or flag that gives the name, for messages.
      expected: the type of the registry's values.

    Raises:
      UserError: the registry has no such name, the module cannot be imported, or it has nothing of that name and type.
    """
    if name in registry:
        return registry[name]
    module_name, colon, class_name = str(name).partition(":")
    if not colon:
        raise UserError("unknown name", path=path, value=name, choices=registry)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing a module runs it, and it may raise anything
        raise UserError(
            f"cannot import {module_name} ({type(error).__name__}: {error})", path=path, value=name
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, expected):
        kind = "class" if expected is type else expected.__name__
        choices = [f"{module_name}:{key}" for key, value in vars(module).items() if isinstance(value, expected)]
        raise UserError(f"the module has no such {kind}", path=path, value=name, choices=choices)
    return cast(T, found)
