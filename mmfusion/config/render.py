"""Writes a config as the text of a config file."""

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
        f'    config, args = defaults.begin(arg, "{config.model.fusion.name}")',
        *(f"    {line}" for line in _lines(config)), "    return defaults.finish(config, args)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _lines(config: ConfigDict) -> Iterator[str]:
    plain = defaults.get_config()
    for name in SCALARS:
        if config[name] != plain[name]:
            yield f"config.{name} = {config[name]!r}"
    for name in DATA_SCALARS:
        if config.data[name] != plain.data[name]:
            yield f"config.data.{name} = {config.data[name]!r}"
    for name, section in config.data.modalities.items():
        call = _call(
            "modality", (section.kind, section.feature), section, choice_options("data.modalities.", section.kind)
        )
        yield f"config.data.modalities.{name} = {call}"
    for name, section in config.data.targets.items():
        call = _call("target", (section.kind, section.feature), section, choice_options("data.targets.", section.kind))
        yield f"config.data.targets.{name} = {call}"
    for name, section in config.model.encoders.items():
        options = choice_keys(f"model.encoders.{name}", section.name)
        yield f"config.model.encoders.{name} = {_call('encoder', (name, section.name), section, options)}"
    warmup = config.optim.schedule.warmup_steps
    rate = config.optim.learning_rate
    yield f'config.optim = defaults.optimizer("{config.optim.name}", {rate!r}, schedule_options={{"warmup_steps": {warmup}}})'


def _call(function: str, arguments: tuple[str, ...], section: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    given = [repr(argument) for argument in arguments]
    given += [
        f"{name}={section[name]!r}" for name, default in options.items() if _plain(section[name]) != _plain(default)
    ]
    return f"defaults.{function}({', '.join(given)})"


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value
