"""Configs as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmfusion.config.renamed import rename_keys
from mmfusion.errors import UserError
from mmfusion.models.build import module_options
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as JSON values."""
    return json.loads(json.dumps(config.to_dict(), sort_keys=True))


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """Returns the locked config that `to_json` gave; lists become tuples again.

    An option that an encoder or a strategy did not have when it was written is at its default.
    """
    config = _tuples(values)
    model = config.get("model", {})
    parts = [(ENCODERS, section) for section in model.get("encoders", {}).values()]
    for known, section in [*parts, (FUSIONS, model.get("fusion", {}))]:
        if section.get("name") in known:
            section |= {**module_options(known[section["name"]]), **section}
    result = ConfigDict(config)
    rename_keys(result, warn=False)
    return result.lock()


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
    """Returns a JSON file's object; raises UserError where it is torn or not JSON."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {values!r}, not an object")
        return values
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
