"""Writes a config as the text of a config file."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.config.choices import choice_keys, choice_options

SCALARS = ("steps", "batch_size", "eval_every", "checkpoint_every", "select")
DATA_SCALARS = ("name", "valid", "group")


def render(config: ConfigDict, docstring: str) -> str:
    """Returns a config file whose `get_config` gives a config that `from_table.propose` has set.

    Args:
      config: the config; of `data.name`, `valid` and `group`, modalities, targets, encoders and the schedule's warm-up,
        and the run's lengths, what differs from the defaults is written.
      docstring: the file's docstring.
    """
    lines = [
        f'"""{docstring}"""', "", "from mmfusion.config import defaults", "", "", 'def get_config(arg: str = ""):',
        f"    config, args = defaults.begin(arg, {_text(config.model.fusion.name)})",
        *(f"    {line}" for line in _lines(config)), "    return defaults.finish(config, args)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _lines(config: ConfigDict) -> Iterator[str]:
    plain = defaults.get_config()
    for name in SCALARS:
        if config[name] != plain[name]:
            yield f"config.{name} = {_text(config[name])}"
    for name in DATA_SCALARS:
        if config.data[name] != plain.data[name]:
            yield f"config.data.{name} = {_text(config.data[name])}"
    for name, section in config.data.modalities.items():
        options = choice_options("data.modalities.", section.kind)
        call = _call("modality", (section.kind, section.feature), section, options)
        yield f"config.data.modalities.{name} = {call}"
    for name, section in config.data.targets.items():
        options = choice_options("data.targets.", section.kind)
        call = _call("target", (section.kind, section.feature), section, options)
        yield f"config.data.targets.{name} = {call}"
    for name, section in config.model.encoders.items():
        options = choice_keys(f"model.encoders.{name}", section.name)
        yield f"config.model.encoders.{name} = {_call('encoder', (name, section.name), section, options)}"
    name, rate = config.optim.name, config.optim.learning_rate
    schedule = {"warmup_steps": config.optim.schedule.warmup_steps}
    yield f"config.optim = defaults.optimizer({_text(name)}, {rate!r}, schedule_options={_text(schedule)})"


def _call(function: str, arguments: tuple[str, ...], section: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    changed = {name: section[name] for name in options if _plain(section[name]) != _plain(options[name])}
    given = [*map(_text, arguments), *(f"{name}={_text(value)}" for name, value in changed.items())]
    return f"defaults.{function}({', '.join(given)})"


def _text(value: Any) -> str:
    """Returns a value as Python source, with double quotes as formatters want them."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_text(key)}: {_text(item)}' for key, item in value.items())}}}"
    return repr(value)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value
