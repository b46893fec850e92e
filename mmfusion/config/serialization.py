"""Configs as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmfusion.config.choices import SECTIONS, choice_keys, choice_options, sections_that_choose
from mmfusion.config.defaults import get_config
from mmfusion.config.renamed import rename_keys
from mmfusion.errors import UserError


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as JSON values."""
    return json.loads(json.dumps(config.to_dict(), sort_keys=True))


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """Returns the locked config that `to_json` gave; lists become tuples again.

    Keys and options that the saved config does not have, since they are newer, are at their defaults.
    """
    config = ConfigDict(_tuples(values))
    rename_keys(config, warn=False)
    for path in sections_that_choose(config):
        section: Any = config
        for part in path.split("."):
            section = section[part]
        for key, default in choice_keys(path, section.name).items():
            if key not in section:
                section[key] = default
    for task, section in config.data.targets.items():
        for key, default in choice_options(f"data.targets.{task}", section.kind).items():
            if key not in section:
                section[key] = default
    _fill(config, get_config())
    return config.lock()


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
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"cannot be read as JSON: {error}", path=str(path)) from error
    if not isinstance(values, dict):
        raise UserError(f"cannot be read as JSON: it holds {values!r}, not an object", path=str(path))
    return values
