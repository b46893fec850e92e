"""Sections of a config whose `name` decides which other keys they have."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mmfusion import optim
from mmfusion.errors import UserError, nearest
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.model import ENCODER_OPTIONS
from mmfusion.models.model import options as module_options
from mmfusion.objectives import OBJECTIVES, objective_options


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
