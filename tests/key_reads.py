"""The config keys that are read, and the options of a module or table that are unused."""

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
    """Yields the id and the dotted path, with a final dot, of a config and of each of its sections."""
    yield id(config), path
    for key in config.keys():  # noqa: SIM118
        if isinstance(config[key], ConfigDict):
            yield from sections(config[key], f"{path}{key}.")


class RecordingDict(dict):
    """A section's options as a dict that records the keys read by name; a copy of the dict reads none."""

    def __init__(self, values: Any, path: str = "", read: set[str] | None = None):
        self.path, self.read = path, set() if read is None else read  # a copy records separately
        for key, value in dict(values).items():
            self[key] = RecordingDict(value, f"{path}{key}.", self.read) if isinstance(value, dict) else value

    def __getitem__(self, key: str) -> Any:
        self.read.add(f"{self.path}{key}")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(f"{self.path}{key}")
        return super().get(key, default)


def typed_sections(cls: type = fields.RunConfig, path: str = "") -> dict[type, str]:
    """Returns the dataclass of each section that a config has once, and its dotted path with a final dot."""
    result = {cls: path}
    for field in dataclasses.fields(cls):
        if inner := keys.section_of(field):
            result |= typed_sections(inner, f"{path}{field.name}.")
    return result


@contextmanager
def recorded_reads(config: ConfigDict) -> Iterator[set[str]]:
    """Yields a set to which the path of every key read by name is added; copying a section reads none of its keys.

    A key may be read from the ConfigDict or from the typed config that `read` returns. Reads by `mmfusion.config`
    itself, to check or convert, are not recorded.
    """
    paths, read = dict(sections(config)), set()
    item, attribute = ConfigDict.__getitem__, ConfigDict.__getattr__
    make_options, flatten = fields._options, keys.Choice.to_dict

    def is_recorded(caller: FrameType) -> bool:
        name = caller.f_code.co_filename
        return Path(name).parent != Path(fields.__file__).parent and name not in (dataclasses.__file__, "<string>")

    def record(section: ConfigDict, key: Any, caller: FrameType | None) -> None:
        if caller.f_code.co_filename == library.__file__:
            if caller.f_code.co_name != "get":
                return
            caller = caller.f_back
        if id(section) in paths and is_recorded(caller):
            read.add(f"{paths[id(section)]}{key}")

    def recording_item(self: ConfigDict, key: Any) -> Any:
        record(self, key, sys._getframe(1))
        return item(self, key)

    def recording_attribute(self: ConfigDict, key: str) -> Any:
        record(self, key, sys._getframe(1))
        return attribute(self, key)

    def recording_field(path: str, names: Collection[str]) -> Any:
        def get(self: Any, name: str) -> Any:
            if name in names and is_recorded(sys._getframe(1)):
                read.add(f"{path}{name}")
            return object.__getattribute__(self, name)

        return get

    def recording_options(source: ConfigDict, names: Collection[str]) -> RecordingDict:
        return RecordingDict(make_options(source, names), paths.get(id(source), "?."), read)

    def recording_to_dict(self: keys.Choice) -> dict[str, Any]:
        return RecordingDict(flatten(self), self.options.path, read)

    typed = typed_sections()
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(ConfigDict, "__getitem__", recording_item))
        patches.enter_context(mock.patch.object(ConfigDict, "__getattr__", recording_attribute))
        patches.enter_context(mock.patch.object(fields, "_options", recording_options))
        patches.enter_context(mock.patch.object(keys.Choice, "to_dict", recording_to_dict))
        for cls, path in typed.items():
            names = {field.name for field in dataclasses.fields(cls)}
            patches.enter_context(mock.patch.object(cls, "__getattribute__", recording_field(path, names)))
        yield read


def unused_fields(module: type, fields: Iterable[str]) -> set[str]:
    """Returns the fields that no method of a class or its bases uses as `self.field`."""
    used = set()
    for base in module.__mro__:
        if dataclasses.is_dataclass(base) and base.__module__.split(".")[0] in ("mmfusion", "tests"):
            for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    used.add(node.attr)
    return set(fields) - used


def names_read(*modules: ModuleType) -> set[str]:
    """Returns every name that the modules read as `x["name"]`, `x.get("name")` or `options.name`."""
    names = set()
    for node in (node for module in modules for node in ast.walk(ast.parse(inspect.getsource(module)))):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.add(node.slice.value)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("o", "options"):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get" and node.args:
            names.add(getattr(node.args[0], "value", None))
    return names
