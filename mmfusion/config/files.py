"""Reads a config file from any folder, and sets its values by dotted path."""

import importlib.util
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion.config.choices import choose, sections_that_choose
from mmfusion.config.renamed import rename_key, rename_keys
from mmfusion.errors import UserError


def load_file(source: str | Path) -> ConfigDict:
    """Returns the config of a config file, not checked yet.

    Args:
      source: `FILE[:key=value,...]`: a Python file in any folder that defines `get_config(arg)`, and its arguments. A
        `configs/NAME.py` that is not in the working directory is that of the installed package.

    Raises:
      UserError: no such file, no `get_config` in it, or a wrong argument.
    """
    path, _, arg = str(source).partition(":")
    file = _find(path)
    if not file.is_file():
        found = (*Path("configs").glob("*.py"), *Path(path).parent.glob("*.py"))
        names = {file.as_posix() for file in found if file.stem != "__init__"}
        raise UserError("no such config file", path="--config", value=path, choices=names)
    get_config = runpy.run_path(str(file)).get("get_config")
    if get_config is None:
        raise UserError("the file defines no get_config(arg)", path="--config", value=path)
    config = get_config(arg)
    rename_keys(config)
    return config


def _find(path: str) -> Path:
    own = Path(path)
    if own.is_file() or own.parts[:1] != ("configs",):
        return own
    package = importlib.util.find_spec("configs")
    folders = package.submodule_search_locations if package else None
    return Path(folders[0], *own.parts[1:]) if folders else own


def set_values(config: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Sets values of a config by dotted path, in place; `check` checks their types.

    A changed `name` replaces its section's options with the new choice's defaults; the other values are set after it.

    Args:
      config: the config.
      changes: path -> value, such as `{"steps": 100, "optim.name": "sgd"}`.

    Raises:
      UserError: a path that the config does not have, or an unknown name.
    """
    for path in sorted(changes, key=lambda path: not path.endswith(".name")):
        key, value = rename_key(path), changes[path]
        check_path(config, key, is_section=isinstance(value, Mapping))
        section, _, last = key.rpartition(".")
        if last == "name" and section in sections_that_choose(config):
            choose(config, section, value)
            continue
        node = config
        for part in filter(None, section.split(".")):
            node = node[part]
        with config.unlocked(), config.ignore_type():
            node[last] = value


def check_path(config: ConfigDict, path: str, *, is_section: bool = False) -> None:
    """Checks that a config has a value at a dotted path.

    Args:
      config: the config.
      path: the path, without `config.`.
      is_section: whether a section may stand there.

    Raises:
      UserError: no such key, or a section where a value is expected.
    """
    section, walked = config, "config"
    for part in path.split("."):
        if not isinstance(section, ConfigDict):
            raise UserError(f"no such key: {walked} is a value", path=f"{walked}.{part}")
        if part not in section:
            raise UserError("no such key", path=f"{walked}.{part}", choices=section.keys())
        section, walked = section[part], f"{walked}.{part}"
    if isinstance(section, ConfigDict) and not is_section:
        raise UserError(f"is a section: set one of its keys, {', '.join(section.keys())}", path=walked)
