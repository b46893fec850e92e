"""Checks a config before anything is built, and tells a wrong one in one line with the nearest right names."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion import optim, parallel
from mmfusion.checks import check_exact, check_member, check_positive, check_type
from mmfusion.config_data import check_data
from mmfusion.errors import UserError, nearest
from mmfusion.metrics import METRICS
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.model import ENCODER_OPTIONS
from mmfusion.models.model import options as module_options
from mmfusion.objectives import MIXES, OBJECTIVES, fewest, objective_options

DTYPES = ("auto", "float32", "bfloat16")
POSITIVE = ("steps", "batch_size", "eval_every", "checkpoint_every", "log_every", "model.width", "recovery.updates")
BELOW_ONE = (
    "valid_fraction",
    "max_bad_fraction",
    "missing",
    "dropout",
    "label_smoothing",
    "drop",
)  # keys, wherever they are
# What may differ when a run is continued: where things are and how fast, never what is computed.
PLACES = ("data.dir", "data.manual_dir", "data.memory_gb", "data.workers", "parallel.devices")
# What a run may do otherwise from where it goes on: what it does about failures.
PATIENCE = ("recovery.updates", "recovery.rollbacks", "recovery.lower", "recovery.failed_saves")
MAY_BE_ZERO = (
    "dense",
    "fuse_from",
    "project",
    "fc",
    "freeze",
    "mask_frames",
    "mask_bands",
    "noise",
    "until",
)  # of the model and of objectives: the first, as the budget allows, none


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
      path: `model.fusion`, `model.encoders.<modality>`, `objectives`, `optim` or `optim.schedule`.
      name: the strategy, encoder, objective, optimizer or schedule.

    Raises:
      UserError: there is none of that name.
    """
    table, own = _choices(path)
    if name not in table:
        where = f"{path}.{name}" if path == "objectives" else f"{path}.name={name!r}"
        raise UserError(f"config.{where} is unknown: {nearest(name, table)}")
    return own(name)


def _choices(path: str) -> tuple[Mapping[str, Any], Any]:
    if path == "model.fusion":
        return FUSIONS, lambda name: module_options(FUSIONS[name])
    if path.startswith("model.encoders."):
        return ENCODERS, lambda name: {**module_options(ENCODERS[name]), **ENCODER_OPTIONS}
    if path == "objectives":
        return dict.fromkeys(OBJECTIVES), objective_options
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
    keeps = OPTIM_FIXED if path == "optim" else ENCODER_OPTIONS if path.startswith("model.encoders.") else ()
    kept = {key: section[key] for key in keeps}
    with config.unlocked():
        for key in list(section.keys()):
            del section[key]
        section.update({**options, **kept, "name": name})


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


def check(config: ConfigDict, reference: ConfigDict, devices: int, hosts: int = 1) -> None:
    """Checks a whole config before anything is built.

    Args:
      config: what is to run.
      reference: `configs/base.py`'s, for the keys that every config has.
      devices: how many devices the machine has, over all hosts.
      hosts: over how many hosts they are.

    Raises:
      UserError: the first thing that is wrong, where it is, and what would be right.
    """
    chosen = {"data.modalities", "data.targets", "model.encoders", "objectives", *sections_that_choose(config)}
    _check_keys(config, reference, "", chosen)
    for path in sections_that_choose(config):
        section = _get(config, path)
        fixed = dict.fromkeys(OPTIM_FIXED) if path == "optim" else {"name": None}
        expected = choice_keys(path, section.get("name", ""))
        typed = {key: reference.optim[key] for key in OPTIM_TYPED} if path == "optim" else {}
        check_exact(section, {**expected, **fixed}, path, {**expected, **typed})
    for name, section in config.objectives.items():
        expected = choice_keys("objectives", name)
        check_exact(section, expected, f"objectives.{name}", expected)
        if fewest(name) > len(config.model.encoders):
            raise UserError(f"config.objectives.{name} is of several modalities, and here is one: leave it out")
    _check_mixing(config)
    _check_balance(config)
    fillers = [name for name, section in config.objectives.items() if section.get("fill")]
    if len(fillers) > 1:
        raise UserError(f"config.objectives: {' and '.join(fillers)} cannot both fill in; set one's fill=False")
    check_data(config)
    _check_numbers(config)
    check_member(config.parallel.mode, parallel.MODES, "parallel.mode")
    check_member(config.model.dtype, DTYPES, "model.dtype")
    check_member(config.select, selectable(config), "select")
    _check_devices(config, devices, hosts)


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
            check_type(config[key], reference[key], where)


def _check_balance(config: ConfigDict) -> None:
    objectives, targets = config.objectives, config.data.targets
    if "ogm_ge" in objectives and "classification" not in {options.kind for options in targets.values()}:
        raise UserError("config.objectives.ogm_ge needs a target of kind classification, whose right class it scores")
    if "gradnorm" in objectives:
        if len(targets) < 2:
            raise UserError("config.objectives.gradnorm weighs tasks: give data.targets a second one, or leave it out")
        level = FUSIONS[config.model.fusion.name].declares.level
        if level != "feature":
            raise UserError(
                f"config.objectives.gradnorm needs a strategy whose tasks read the same features, and "
                f"{config.model.fusion.name!r} is of {level} level; choose concat"
            )
    for one, other in (("gradnorm", "uncertainty"), ("gradient_blending", "unimodal")):
        if one in objectives and other in objectives:
            raise UserError(f"config.objectives: {one} and {other} cannot both set the weights; leave one out")


def _check_mixing(config: ConfigDict) -> None:
    mixes = [name for name in MIXES if name in config.objectives]
    if len(mixes) > 1:
        raise UserError(f"config.objectives: {' and '.join(mixes)} cannot both mix; leave one out")
    if (rate := config.objectives.get("modality_dropout", {}).get("rate", 0.0)) >= 1:
        raise UserError(f"config.objectives.modality_dropout.rate={rate} must be at least 0 and below 1")
    for name in mixes:
        where = config.objectives[name].get("where", "input")
        check_member(where, ("input", "features"), f"objectives.{name}.where")
        check_positive(config.objectives[name].alpha, f"objectives.{name}.alpha")
        for m, options in config.data.modalities.items():
            if where == "input" and options.kind != "image":
                raise UserError(
                    f"config.objectives.{name} mixes pictures, and {m!r} is {options.kind}, which would stay its own: "
                    "use mixup with where=features"
                )


def _check_numbers(config: ConfigDict) -> None:
    for path in POSITIVE:
        check_positive(_get(config, path), path)
    for path, value in _numbers(config, ""):
        if path == "parallel.mesh.data" and value == -1:
            continue
        if not 0 <= value < float("inf"):
            raise UserError(f"config.{path}={value!r} must be a finite number and not negative")
        if path.rpartition(".")[2] in BELOW_ONE and value >= 1:
            raise UserError(f"config.{path}={value!r} must be at least 0 and below 1")
        size = path.startswith(("model.", "objectives.")) and type(value) is int
        if size and path.rpartition(".")[2] not in MAY_BE_ZERO:
            check_positive(value, path)  # sizes and strides
    if config.seed >= 2**32:
        raise UserError(f"config.seed={config.seed} must be below 2**32")
    check_positive(config.optim.learning_rate, "optim.learning_rate")
    check_positive(config.optim.accumulate, "optim.accumulate")
    if not 0 < config.recovery.lower <= 1:
        raise UserError(f"config.recovery.lower={config.recovery.lower} must be above 0 and at most 1")
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


def _check_devices(config: ConfigDict, devices: int, hosts: int) -> None:
    asked = config.parallel.devices or devices
    if asked > devices:
        raise UserError(f"config.parallel.devices={asked}, but this machine has {devices}")
    if hosts > 1 and asked != devices:
        raise UserError(f"config.parallel.devices={asked}: {hosts} hosts use all of their {devices} devices, set 0")
    mesh = config.parallel.mesh
    for axis in ("fsdp", "model"):
        check_positive(mesh[axis], f"parallel.mesh.{axis}")
    if devices // hosts % mesh.model:
        raise UserError(
            f"config.parallel.mesh.model={mesh.model} must divide the {devices // hosts} devices of each host, whose "
            "examples are its own"
        )
    state_parts = mesh.fsdp * mesh.model
    if state_parts > 1 and config.parallel.mode != "jit":
        raise UserError("config.parallel.mesh divides the state, which takes --config.parallel.mode=jit")
    if asked % state_parts or mesh.data not in (-1, asked // state_parts):
        raise UserError(
            f"config.parallel.mesh: {mesh.data} x {mesh.fsdp} x {mesh.model} are not the {asked} devices: "
            "choose fsdp and model whose product divides them, and data=-1"
        )
    pairs = any(name in config.objectives for name in MIXES)
    parts = asked // mesh.model * config.optim.accumulate * (2 if pairs else 1)
    if config.batch_size % parts:
        below, above = config.batch_size // parts * parts, -(-config.batch_size // parts) * parts
        choices = " or ".join(str(size) for size in (below, above) if size)
        raise UserError(
            f"config.batch_size={config.batch_size} does not divide over {asked // mesh.model} devices x "
            f"{config.optim.accumulate} micro-batches{' of pairs that are mixed' * pairs}: choose {choices}"
        )


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
    return ConfigDict(config).lock()


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
