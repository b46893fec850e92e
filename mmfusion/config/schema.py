"""Checks a config before anything is built, and tells a wrong one in one line with the nearest right names."""

from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.config.checks import check_exact, check_member, check_positive, check_type
from mmfusion.config.choices import OPTIM_FIXED, OPTIM_TYPED, choice_keys, sections_that_choose
from mmfusion.config.data_checks import check_data
from mmfusion.distributed.mesh import MODES
from mmfusion.errors import UserError, nearest
from mmfusion.metrics import METRICS
from mmfusion.models.fusion import FUSIONS
from mmfusion.objectives import MIXES, fewest
from mmfusion.registry import lookup

DTYPES = ("auto", "float32", "bfloat16")
POSITIVE = (
    "steps",
    "batch_size",
    "eval_every",
    "checkpoint_every",
    "log_every",
    "model.width",
    "recovery.max_consecutive_bad_steps",
)
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
PATIENCE = ("recovery.max_consecutive_bad_steps", "recovery.rollbacks", "recovery.lr_factor", "recovery.failed_saves")
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


def selectable(config: ConfigDict) -> dict[str, bool]:
    """Returns what `config.select` may be, and whether higher is better: `TASK/metric` where there are several."""
    targets = config.data.targets
    metrics = {
        metric if len(targets) == 1 else f"{task}/{metric}": higher
        for task, options in targets.items()
        for metric, higher in METRICS[options.kind].items()
    }
    return {**metrics, "loss": False}


def check(config: ConfigDict, devices: int | None = None, hosts: int = 1) -> None:
    """Checks a whole config before anything is built.

    Args:
      config: what is to run.
      devices: how many devices there are, over all hosts; None: those that JAX finds here.
      hosts: over how many hosts they are.

    Raises:
      UserError: the first thing that is wrong, where it is, and what would be right.
    """
    reference = defaults.get_config()
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
    check_member(config.parallel.mode, MODES, "parallel.mode")
    check_member(config.model.dtype, DTYPES, "model.dtype")
    check_member(config.select, selectable(config), "select")
    _check_devices(config, jax.device_count() if devices is None else devices, hosts)


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
        level = lookup(FUSIONS, config.model.fusion.name, "config.model.fusion.name").declares.level
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
    if not 0 < config.recovery.lr_factor <= 1:
        raise UserError(f"config.recovery.lr_factor={config.recovery.lr_factor} must be above 0 and at most 1")
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
