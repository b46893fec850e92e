"""Checks a config before anything is built, and tells a wrong one in one line with the nearest right names."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion import optim, parallel
from mmfusion.data import sources
from mmfusion.data.rows import KINDS, TARGET_OPTIONS
from mmfusion.data.text import TOKENIZERS
from mmfusion.errors import UserError, nearest
from mmfusion.metrics import METRICS
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.model import options as module_options
from mmfusion.objectives import REGRESSION_LOSSES

DTYPES = ("auto", "float32", "bfloat16")
POSITIVE = ("steps", "batch_size", "eval_every", "checkpoint_every", "log_every", "model.width")
BELOW_ONE = ("valid_fraction", "max_bad_fraction", "missing", "dropout", "label_smoothing")  # keys, wherever they are
# What may differ when a run is continued: where things are and how fast, never what is computed.
PLACES = ("data.dir", "data.manual_dir", "data.memory_gb", "data.workers", "parallel.devices")
RESERVED = ("bias", "joint", "learned", "self")  # names that strategies give to what is no modality
MAY_BE_ZERO = ("fuse_from", "project")  # of the model: the first, as wide as the budget allows


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Parses what follows the colon of `configs/X.py:key=value,key=value`, each value by its default's type.

    Raises:
      UserError: a key that this config does not take, or a value of another type.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, value = item.partition("=")
        if not equals or name not in defaults:
            raise UserError(f"config argument {item!r} is not key=value of a known key: {nearest(name, defaults)}")
        values[name] = _typed(value, defaults[name], f"config argument {name}")
    return ConfigDict(values)


def _typed(value: str, default: Any, where: str) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise UserError(f"{where}={value!r} is not of type {kind.__name__}") from None


def choice_keys(path: str, name: str) -> dict[str, Any]:
    """Returns the options, with their defaults, of the choice `name` at one of a config's sections that choose.

    Args:
      path: `model.fusion`, `model.encoders.<modality>`, `optim` or `optim.schedule`.
      name: the strategy, encoder, optimizer or schedule.

    Raises:
      UserError: there is none of that name.
    """
    table, own = _choices(path)
    if name not in table:
        raise UserError(f"config.{path}.name={name!r} is unknown: {nearest(name, table)}")
    return own(name)


def _choices(path: str) -> tuple[Mapping[str, Any], Any]:
    if path == "model.fusion":
        return FUSIONS, lambda name: module_options(FUSIONS[name])
    if path.startswith("model.encoders."):
        return ENCODERS, lambda name: module_options(ENCODERS[name])
    if path == "optim.schedule":
        return optim.SCHEDULES, optim.schedule_options
    return optim.OPTIMIZERS, optim.options


OPTIM_TYPED = ("learning_rate", "clip_norm", "accumulate")
OPTIM_FIXED = ("name", *OPTIM_TYPED, "schedule")


def choose(config: ConfigDict, path: str, name: str) -> None:
    """Sets the choice at `path` to `name`, with that choice's own options at their defaults, in place."""
    options = choice_keys(path, name)
    section = config
    for part in path.split("."):
        section = section[part]
    kept = {key: section[key] for key in (OPTIM_FIXED if path == "optim" else ())}
    with config.unlocked():
        for key in list(section.keys()):
            del section[key]
        section.update({**kept, "name": name, **options})


def sections_that_choose(config: ConfigDict) -> list[str]:
    """Returns the paths of the sections whose `name` decides which other keys they have."""
    return ["model.fusion", "optim", "optim.schedule", *(f"model.encoders.{m}" for m in config.model.encoders)]


def selectable(config: ConfigDict) -> dict[str, bool]:
    """Returns what `config.select` may be, and whether higher is better: `TASK/metric` where there are several."""
    targets = config.data.targets
    metrics = {
        metric if len(targets) == 1 else f"{task}/{metric}": higher
        for task, options in targets.items()
        for metric, higher in METRICS[options.kind].items()
    }
    return {**metrics, "loss": False}


def check(config: ConfigDict, reference: ConfigDict, devices: int) -> None:
    """Checks a whole config before anything is built.

    Args:
      config: what is to run.
      reference: `configs/base.py`'s, for the keys that every config has.
      devices: how many devices the machine has, over all hosts.

    Raises:
      UserError: the first thing that is wrong, where it is, and what would be right.
    """
    chosen = {"data.modalities", "data.targets", "model.encoders", *sections_that_choose(config)}
    _check_keys(config, reference, "", chosen)
    for path in sections_that_choose(config):
        section = _get(config, path)
        fixed = dict.fromkeys(OPTIM_FIXED) if path == "optim" else {"name": None}
        expected = choice_keys(path, section.get("name", ""))
        typed = {key: reference.optim[key] for key in OPTIM_TYPED} if path == "optim" else {}
        _check_exact(section, {**expected, **fixed}, path, {**expected, **typed})
    _check_data(config)
    _check_numbers(config)
    _check_member(config.parallel.mode, parallel.MODES, "parallel.mode")
    _check_member(config.model.dtype, DTYPES, "model.dtype")
    _check_member(config.select, selectable(config), "select")
    _check_devices(config, devices)


def _get(config: ConfigDict, path: str) -> Any:
    for part in path.split("."):
        config = config[part]
    return config


def _check_keys(config: ConfigDict, reference: ConfigDict, path: str, chosen: set[str]) -> None:
    for key in config:
        if key not in reference:
            raise UserError(f"config.{path}{key} is no key of a config: {nearest(key, reference.keys())}")
    for key in reference:
        where = f"{path}{key}"
        if key not in config:
            raise UserError(f"config.{where} is missing")
        if where in chosen:
            continue
        if isinstance(reference[key], ConfigDict):
            _check_keys(config[key], reference[key], f"{where}.", chosen)
        else:
            _check_type(config[key], reference[key], where)


def _check_exact(section: ConfigDict, expected: Mapping[str, Any], path: str, typed: Mapping[str, Any]) -> None:
    label = section.get("name", section.get("kind", ""))
    for key in section:
        if key not in expected:
            raise UserError(f"config.{path}.{key} is not read by {label!r}: {nearest(key, expected)}")
    for key in expected:
        if key not in section:
            raise UserError(f"config.{path}.{key} is missing; {label!r} reads {', '.join(expected)}")
    for key, default in typed.items():
        if isinstance(default, dict):
            _check_exact(section[key], default, f"{path}.{key}", default)
        else:
            _check_type(section[key], default, f"{path}.{key}")


def _check_type(value: Any, default: Any, path: str) -> None:
    if default is None or (isinstance(default, float) and type(value) is int):
        return
    alike = isinstance(value, (tuple, list)) if isinstance(default, (tuple, list)) else type(value) is type(default)
    if alike and isinstance(default, (tuple, list)):
        kinds = (int, float) if not default or type(default[0]) is float else type(default[0])
        alike = all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
    if not alike:
        raise UserError(f"config.{path}={value!r} must be of type {type(default).__name__}, like {default!r}")


def _check_data(config: ConfigDict) -> None:
    data = config.data
    sources.check_name(data.name, data.dir)
    if not data.modalities:
        raise UserError("config.data.modalities is empty: a model needs at least one modality")
    if not data.targets:
        raise UserError("config.data.targets is empty: a model needs at least one target")
    if set(data.modalities) != set(config.model.encoders):
        raise UserError(
            f"config.data.modalities has {', '.join(sorted(data.modalities))}, "
            f"config.model.encoders has {', '.join(sorted(config.model.encoders))}: they must be the same"
        )
    for section, table in (("modalities", {k: v.options for k, v in KINDS.items()}), ("targets", TARGET_OPTIONS)):
        for name, options in data[section].items():
            path = f"data.{section}.{name}"
            _check_member(options.get("kind", ""), table, f"{path}.kind")
            expected = table[options.kind]
            _check_exact(options, {"kind": "", "feature": "", **expected}, path, expected)
    for name, options in data.modalities.items():
        path = f"data.modalities.{name}"
        if not re.fullmatch("[a-z][a-z0-9]*", name) or name in RESERVED:
            raise UserError(
                f"config.{path}: a modality's name is small letters and digits, none of {', '.join(RESERVED)}"
            )
        # encoders are in one file a kind of modality
        fitting = [e for e, module in ENCODERS.items() if module.__module__.endswith(f".{options.kind}")]
        if config.model.encoders[name].name not in fitting:
            raise UserError(
                f"config.model.encoders.{name}.name={config.model.encoders[name].name!r} does not read "
                f"{options.kind}: choose one of {', '.join(fitting)}"
            )
        if options.kind == "text":
            _check_member(options.tokenizer, TOKENIZERS, f"{path}.tokenizer")
            smallest = TOKENIZERS[options.tokenizer][1]
            if options.vocabulary_size < smallest:
                raise UserError(f"config.{path}.vocabulary_size must be at least {smallest}")
            _check_positive(options.length, f"{path}.length")
        if options.kind == "audio":
            _check_positive(options.rate, f"{path}.rate")
            _check_positive(options.seconds, f"{path}.seconds")
        if options.kind == "image":
            if len(options.size) != 2 or min(options.size) < 1 or options.channels not in (1, 2, 3, 4):
                raise UserError(f"config.{path} must have size=(H, W) in pixels and 1 to 4 channels")
            if len(options.mean) not in (1, options.channels) or len(options.std) not in (1, options.channels):
                raise UserError(f"config.{path}.mean and .std must have 1 or {options.channels} numbers")
            if min(options.std) <= 0:
                raise UserError(f"config.{path}.std must be above 0, got {tuple(options.std)}")
    for name, options in data.targets.items():
        if options.kind != "classification" and FUSIONS[config.model.fusion.name].declares.classes_only:
            raise UserError(
                f"config.model.fusion.name={config.model.fusion.name!r} is for classes that exclude each other, and "
                f"data.targets.{name} is {options.kind}; choose late_mean"
            )
        if options.kind == "regression":
            _check_member(options.loss, REGRESSION_LOSSES, f"data.targets.{name}.loss")


def _check_numbers(config: ConfigDict) -> None:
    for path in POSITIVE:
        _check_positive(_get(config, path), path)
    for path, value in _numbers(config, ""):
        if not 0 <= value < float("inf"):
            raise UserError(f"config.{path}={value!r} must be a finite number and not negative")
        if path.rpartition(".")[2] in BELOW_ONE and value >= 1:
            raise UserError(f"config.{path}={value!r} must be at least 0 and below 1")
        if path.startswith("model.") and type(value) is int and path.rpartition(".")[2] not in MAY_BE_ZERO:
            _check_positive(value, path)  # sizes and strides
    if config.seed >= 2**32:
        raise UserError(f"config.seed={config.seed} must be below 2**32")
    _check_positive(config.optim.learning_rate, "optim.learning_rate")
    _check_positive(config.optim.accumulate, "optim.accumulate")
    if not config.data.valid and not config.data.valid_fraction:
        raise UserError("config.data.valid_fraction must be above 0, or config.data.valid must name a split")


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yields the path and value of every number in a config."""
    if isinstance(value, ConfigDict):
        for key in value:
            yield from _numbers(value[key], f"{path}.{key}" if path else key)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item, path)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def _check_positive(value: Any, path: str) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"config.{path}={value!r} must be above 0")


def _check_member(value: Any, choices: Iterable[str], path: str) -> None:
    if value not in choices:
        raise UserError(f"config.{path}={value!r} is unknown: {nearest(value, choices)}")


def _check_devices(config: ConfigDict, devices: int) -> None:
    asked = config.parallel.devices or devices
    if asked > devices:
        raise UserError(f"config.parallel.devices={asked}, but this machine has {devices}")
    parts = asked * config.optim.accumulate
    if config.batch_size % parts:
        below, above = config.batch_size // parts * parts, -(-config.batch_size // parts) * parts
        choices = " or ".join(str(size) for size in (below, above) if size)
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide over {asked} devices x "
            f"{config.optim.accumulate} micro-batches: choose {choices}"
        )


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as JSON values."""
    return json.loads(json.dumps(config.to_dict(), sort_keys=True))


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """Returns the locked config that `to_json` gave; lists become tuples again."""
    return ConfigDict(_tuples(values)).lock()


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Returns nested JSON values by dotted path; an empty section is a value."""
    if not isinstance(values, dict) or not values:
        return {path: values}
    return {k: v for key, inner in values.items() for k, v in flat(inner, f"{path}.{key}" if path else key).items()}


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON file's object; raises UserError where it is torn or not JSON."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {values!r}, not an object")
        return values
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
