"""Which keys of a config are read, and which options of a module or a table nobody uses."""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

import ml_collections.config_dict.config_dict as library
from ml_collections import ConfigDict


def leaves(config: ConfigDict, path: str = "") -> Iterator[str]:
    """Yields the dotted path of every value of a config."""
    for key in config.keys():  # noqa: SIM118 (a ConfigDict iterates in its own order)
        value = config[key]
        yield from leaves(value, f"{path}{key}.") if isinstance(value, ConfigDict) else [f"{path}{key}"]


def sections(config: ConfigDict, path: str = "") -> Iterator[tuple[int, str]]:
    """Yields the identity and the dotted path, with a dot at its end, of a config and of every section in it."""
    yield id(config), path
    for key in config.keys():  # noqa: SIM118
        if isinstance(config[key], ConfigDict):
            yield from sections(config[key], f"{path}{key}.")


@contextmanager
def noted_reads(config: ConfigDict) -> Iterator[set[str]]:
    """Gives a set that gets the path of every key that is read by name; copying a section whole reads none of it."""
    paths, read = dict(sections(config)), set()
    item, attribute = ConfigDict.__getitem__, ConfigDict.__getattr__

    def note(section: ConfigDict, key: Any, caller: FrameType) -> None:
        if caller.f_code.co_filename == library.__file__:
            if caller.f_code.co_name != "get":
                return
            caller = caller.f_back
        if id(section) in paths:
            read.add(f"{paths[id(section)]}{key}")

    def noted_item(self: ConfigDict, key: Any) -> Any:
        note(self, key, sys._getframe(1))
        return item(self, key)

    def noted_attribute(self: ConfigDict, key: str) -> Any:
        note(self, key, sys._getframe(1))
        return attribute(self, key)

    with (
        mock.patch.object(ConfigDict, "__getitem__", noted_item),
        mock.patch.object(ConfigDict, "__getattr__", noted_attribute),
    ):
        yield read


def unused_fields(module: type, fields: Iterable[str]) -> set[str]:
    """Returns the fields that no method of a class, or of one it inherits from, uses as `self.field`."""
    used = set()
    for one in module.__mro__:
        if dataclasses.is_dataclass(one) and one.__module__.split(".")[0] in ("mmfusion", "tests"):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(one)))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    used.add(node.attr)
    return set(fields) - used


def names_read(*modules: ModuleType) -> set[str]:
    """Returns every name that some code of the modules reads as `x["name"]`, `x.get("name")` or `options.name`."""
    names = set()
    for node in (node for module in modules for node in ast.walk(ast.parse(inspect.getsource(module)))):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.add(node.slice.value)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("o", "options"):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get" and node.args:
            names.add(getattr(node.args[0], "value", None))
    return names
