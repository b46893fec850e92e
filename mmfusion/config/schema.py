"""Checks a config before anything is built, and tells a wrong one in one line with the nearest right names."""

from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.config.checks import check_exact, check_member, check_positive, check_type
from mmfusion.config.choices import OPTIM_FIXED, OPTIM_TYPED, choice_keys, sections_that_choose
from mmfusion.config.data_checks import check_data
from mmfusion.config.fields import read
from mmfusion.distributed.mesh import MODES
from mmfusion.errors import UserError, nearest
from mmfusion.metrics import METRICS
from mmfusion.objectives import check_objectives, group_size

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
        expected = choice_keys("objectives", section.get("name", name))
        check_exact(section, expected, f"objectives.{name}", expected)
    check_objectives(read(config))
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
    group = group_size(config)
    parts = asked // mesh.model * config.optim.accumulate * group
    if config.batch_size % parts:
        below, above = config.batch_size // parts * parts, -(-config.batch_size // parts) * parts
        choices = " or ".join(str(size) for size in (below, above) if size)
        pairs = f" of groups of {group} rows" if group > 1 else ""
        raise UserError(
            f"does not divide over {asked // mesh.model} devices x {config.optim.accumulate} micro-batches{pairs}: "
            f"choose {choices}",
            path="config.batch_size",
            value=config.batch_size,
        )
