"""Sections of a config whose `name` decides which other keys they have."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from mmfusion import optim
from mmfusion.config.checks import check_member
from mmfusion.errors import UserError
from mmfusion.models.build import ENCODER_OPTIONS, module_options
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.objectives import objective_options
from mmfusion.registry import lookup


def choice_keys(path: str, name: str) -> dict[str, Any]:
    """Returns the options, with their defaults, of the choice `name` at one of a config's sections that choose.

    Args:
      path: `model.fusion`, `model.encoders.<modality>`, `objectives`, `optim` or `optim.schedule`.
      name: the strategy, encoder, objective, optimizer or schedule.

    Raises:
      UserError: there is none of that name.
    """
    if path == "model.fusion":
        return module_options(_module_class(FUSIONS, name, path, "declares"))
    if path.startswith("model.encoders."):
        return {**module_options(_module_class(ENCODERS, name, path, "reads")), **ENCODER_OPTIONS}
    if path == "objectives":
        return objective_options(name)
    if path == "optim.schedule":
        check_member(name, optim.SCHEDULES, f"{path}.name")
        return optim.schedule_options(name)
    check_member(name, optim.OPTIMIZERS, f"{path}.name")
    return optim.options(name)


def _module_class(registry: Mapping[str, type[nn.Module]], name: str, path: str, attribute: str) -> type[nn.Module]:
    path = f"config.{path}.name"
    module_class = lookup(registry, name, path)
    if not (issubclass(module_class, nn.Module) and hasattr(module_class, attribute)):
        raise UserError(f"the class is not a flax module with an attribute `{attribute}`", path=path, value=name)
    return module_class


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
