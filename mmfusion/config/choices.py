"""Sections whose `name` or `kind` decides which other keys they have: encoders, fusion, optimizer, modalities, ..."""

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from mmfusion import optim
from mmfusion.config.fields import (
    EncoderConfig,
    FusionConfig,
    ModalityConfig,
    OptimConfig,
    ScheduleConfig,
    TargetConfig,
)
from mmfusion.config.keys import Choice, declared_defaults
from mmfusion.data.modalities import modality_type
from mmfusion.data.targets import TARGET_OPTIONS
from mmfusion.errors import UserError
from mmfusion.models.build import module_options
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.objectives import objective_options
from mmfusion.registry import lookup

SECTIONS: dict[str, type[Choice]] = {
    "model.fusion": FusionConfig,
    "optim": OptimConfig,
    "optim.schedule": ScheduleConfig,
}
ENTRIES: dict[str, type[Choice]] = {
    "model.encoders": EncoderConfig,
    "data.modalities": ModalityConfig,
    "data.targets": TargetConfig,
}


def choice_options(path: str, name: str) -> dict[str, Any]:
    """Returns the options, with their defaults, of a choice.

    Args:
      path: the section: `model.fusion`, `model.encoders.<modality>`, `objectives`, `optim`, `optim.schedule`,
        `data.modalities.<modality>` or `data.targets.<task>`.
      name: the strategy, encoder, objective, optimizer, schedule, type of modality or type of target.

    Raises:
      UserError: an unknown name.
    """
    if path == "model.fusion":
        return module_options(_module_class(FUSIONS, name, path, "declares"))
    if path.startswith("model.encoders."):
        return module_options(_module_class(ENCODERS, name, path, "reads"))
    if path == "objectives":
        return objective_options(name)
    if path.startswith("data.modalities."):
        return dict(modality_type(name, f"config.{path}.kind").options)
    if path.startswith("data.targets."):
        _check_known(name, TARGET_OPTIONS, "type of target", f"{path}.kind")
        return dict(TARGET_OPTIONS[name])
    if path == "optim.schedule":
        _check_known(name, optim.SCHEDULES, "schedule", f"{path}.name")
        return optim.schedule_options(name)
    _check_known(name, optim.OPTIMIZERS, "optimizer", f"{path}.name")
    return optim.options(name)


def choice_keys(path: str, name: str) -> dict[str, Any]:
    """Returns every key of a section but `name` or `kind`, with its default: the declared ones and `choice_options`."""
    return {**_declared(path), **choice_options(path, name)}


def choose(config: ConfigDict, path: str, name: str) -> None:
    """Sets the choice at `path` to `name`, in place, and replaces its section's options with that choice's defaults.

    Declared keys of the section, such as `optim.learning_rate`, keep their values.
    """
    options = choice_options(path, name)
    section: Any = config
    for part in path.split("."):
        section = section[part]
    kept = {key: section[key] for key in [*_declared(path), "schedule"] if key in section}
    with config.unlocked():
        for key in list(section.keys()):
            del section[key]
        section.update({**options, **kept, "name": name})


def sections_that_choose(config: ConfigDict) -> list[str]:
    """Returns the paths of the sections whose `name` decides which other keys they have."""
    return [*SECTIONS, *(f"model.encoders.{modality}" for modality in config.model.encoders)]


def _declared(path: str) -> dict[str, Any]:
    cls = SECTIONS.get(path) or ENTRIES.get(path.rpartition(".")[0])
    return (
        {key: default for key, default in declared_defaults(cls).items() if key not in ("name", "kind")} if cls else {}
    )


def _check_known(name: str, known: Collection[str], noun: str, path: str) -> None:
    if name not in known:
        raise UserError(f"unknown {noun}", path=f"config.{path}", value=name, choices=known)


def _module_class(registry: Mapping[str, type[nn.Module]], name: str, path: str, attribute: str) -> type[nn.Module]:
    path = f"config.{path}.name"
    module_class = lookup(registry, name, path)
    if not (issubclass(module_class, nn.Module) and hasattr(module_class, attribute)):
        raise UserError(f"the class is not a flax module with an attribute `{attribute}`", path=path, value=name)
    return module_class
