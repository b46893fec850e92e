"""Which keys of a config are read, and which options of a module or a table nobody uses."""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

import ml_collections.config_dict.config_dict as library
from ml_collections import ConfigDict

from mmfusion.config import fields, keys


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


class NotedDict(dict):
    """A section's options as a plain dict that notes which are read by name; copying it whole reads none."""

    def __init__(self, values: Any, path: str = "", read: set[str] | None = None):
        self.path, self.read = path, set() if read is None else read  # a copy notes for itself
        for key, value in dict(values).items():
            self[key] = NotedDict(value, f"{path}{key}.", self.read) if isinstance(value, dict) else value

    def __getitem__(self, key: str) -> Any:
        self.read.add(f"{self.path}{key}")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(f"{self.path}{key}")
        return super().get(key, default)


def typed_sections(cls: type = fields.RunConfig, path: str = "") -> dict[type, str]:
    """Returns the dataclass of each section that a config has once, and its dotted path with a dot at its end."""
    result = {cls: path}
    for field in dataclasses.fields(cls):
        if inner := keys.section_of(field):
            result |= typed_sections(inner, f"{path}{field.name}.")
    return result


@contextmanager
def noted_reads(config: ConfigDict) -> Iterator[set[str]]:
    """Gives a set that gets the path of every key that is read by name; copying a section whole reads none of it.

    A key may be read from the ConfigDict or from the typed config that `read` makes of it. Reads by `mmfusion.config`
    itself, to check or convert, do not count.
    """
    paths, read = dict(sections(config)), set()
    item, attribute = ConfigDict.__getitem__, ConfigDict.__getattr__
    make_options, flatten = fields._options, keys.Choice.to_dict

    def counts(caller: FrameType) -> bool:
        name = caller.f_code.co_filename
        return Path(name).parent != Path(fields.__file__).parent and name not in (dataclasses.__file__, "<string>")

    def note(section: ConfigDict, key: Any, caller: FrameType | None) -> None:
        if caller.f_code.co_filename == library.__file__:
            if caller.f_code.co_name != "get":
                return
            caller = caller.f_back
        if id(section) in paths and counts(caller):
            read.add(f"{paths[id(section)]}{key}")

    def noted_item(self: ConfigDict, key: Any) -> Any:
        note(self, key, sys._getframe(1))
        return item(self, key)

    def noted_attribute(self: ConfigDict, key: str) -> Any:
        note(self, key, sys._getframe(1))
        return attribute(self, key)

    def noted_field(path: str, names: Collection[str]) -> Any:
        def get(self: Any, name: str) -> Any:
            if name in names and counts(sys._getframe(1)):
                read.add(f"{path}{name}")
            return object.__getattribute__(self, name)

        return get

    def noted_options(source: ConfigDict, names: Collection[str]) -> NotedDict:
        return NotedDict(make_options(source, names), paths.get(id(source), "?."), read)

    def noted_flat(self: keys.Choice) -> dict[str, Any]:
        return NotedDict(flatten(self), self.options.path, read)

    typed = typed_sections()
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(ConfigDict, "__getitem__", noted_item))
        patches.enter_context(mock.patch.object(ConfigDict, "__getattr__", noted_attribute))
        patches.enter_context(mock.patch.object(fields, "_options", noted_options))
        patches.enter_context(mock.patch.object(keys.Choice, "to_dict", noted_flat))
        for cls, path in typed.items():
            names = {field.name for field in dataclasses.fields(cls)}
            patches.enter_context(mock.patch.object(cls, "__getattribute__", noted_field(path, names)))
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
