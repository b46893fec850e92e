"""Classes by name: an entry of one of our registries, or `package.module:Class` from anywhere on the Python path."""

import importlib
from collections.abc import Mapping

from mmfusion.errors import UserError


def lookup(registry: Mapping[str, type], name: str, path: str) -> type:
    """Returns the class that a name stands for.

    Args:
      registry: name -> class.
      name: a name of the registry, or `package.module:Class`, which is imported.
      path: the config key or flag that gives the name, for messages.

    Raises:
      UserError: the registry has no such name, the module cannot be imported, or it has no such class.
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
    if not isinstance(found, type):
        classes = [f"{module_name}:{key}" for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError("the module has no such class", path=path, value=name, choices=classes)
    return found
