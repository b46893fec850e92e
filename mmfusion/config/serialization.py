"""Configs as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmfusion.config.checks import check_section
from mmfusion.config.choices import SECTIONS, choice_keys, choice_options, sections_that_choose
from mmfusion.config.defaults import get_config
from mmfusion.config.fields import RunConfig
from mmfusion.config.renamed import rename_keys
from mmfusion.errors import UserError, one_line

MAX_JSON_BYTES = 64 << 20  # of a file; a config has kilobytes, and the results of many classes megabytes


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as JSON values."""
    return json.loads(json.dumps(config.to_dict(), sort_keys=True))


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """Returns the locked config that `to_json` gave; lists become tuples again.

    Keys and options that the saved config does not have, since they are newer, are at their defaults.

    Raises:
      UserError: the values are not those of a config.
    """
    try:
        config = _restore(values)
        check_section(config, RunConfig)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:  # sections that are none
        raise UserError(f"is not the config of a run: {one_line(error)}", path="config.json") from error
    return config.lock()


def _restore(values: Mapping[str, Any]) -> ConfigDict:
    if not values.get("data") or not values.get("model"):
        raise UserError("is not the config of a run: it has no data or no model", path="config.json")
    config = ConfigDict(_tuples(values))
    rename_keys(config, warn=False)
    for path in sections_that_choose(config):
        section: Any = config
        for part in path.split("."):
            section = section[part]
        _add_missing(section, choice_keys(path, section.name))
    for entries in ("data.modalities", "data.targets"):
        for name, section in config.data[entries.removeprefix("data.")].items():
            _add_missing(section, choice_options(f"{entries}.{name}", section.kind))
    for name, section in config.get("objectives", {}).items():
        _add_missing(section, choice_options("objectives", section.get("name", name)))
    _fill(config, get_config())
    return config


def _add_missing(section: ConfigDict, defaults: Mapping[str, Any]) -> None:
    """Adds options that are missing, in place, also in sections within."""
    for key, default in defaults.items():
        if key not in section:
            section[key] = default
        elif isinstance(default, Mapping):
            _add_missing(section[key], default)


def _fill(config: ConfigDict, defaults: ConfigDict, path: str = "") -> None:
    """Adds declared keys that are missing, outside of sections that choose, in place."""
    for key, default in defaults.items():
        if key not in config:
            config[key] = default
        elif isinstance(default, ConfigDict) and f"{path}{key}" not in SECTIONS:
            _fill(config[key], default, f"{path}{key}.")


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Returns nested JSON values by dotted path; an empty section is a value."""
    if not isinstance(values, dict) or not values:
        return {path: values}
    return {k: v for key, inner in values.items() for k, v in flat(inner, f"{path}.{key}" if path else key).items()}


def read_json(path: Path | epath.Path) -> dict[str, Any]:
    """Returns the object of a JSON file; raises UserError where the file is damaged or holds no object."""
    try:
        if not path.is_file():  # a pipe or a device may never end
            raise UserError("is not a regular file", path=str(path))
        if epath.Path(path).stat().length > MAX_JSON_BYTES:
            raise UserError(f"has more than {MAX_JSON_BYTES >> 20} MiB", path=str(path))
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError("cannot be read as JSON: it is nested too deeply", path=str(path)) from error
    except (ValueError, OSError) as error:
        raise UserError(f"cannot be read as JSON: {one_line(error)}", path=str(path)) from error
    if not isinstance(values, dict):
        message = f"cannot be read as JSON: it holds a {type(values).__name__}, not an object"
        raise UserError(message, path=str(path))
    return values
