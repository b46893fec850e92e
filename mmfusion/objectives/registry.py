"""The objectives by the name that a config gives them, their options and the checks of a config."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import flax.linen as nn

from mmfusion.errors import UserError
from mmfusion.models.build import module_options
from mmfusion.models.fusion import FUSIONS
from mmfusion.objectives.alignment import CCA, Adversarial, Contrastive
from mmfusion.objectives.base import Objective
from mmfusion.objectives.gradient_modulation import OGMGE
from mmfusion.objectives.imputation import GAN, MMVAE, MVAE
from mmfusion.objectives.mixing import CutMix, MixUp
from mmfusion.objectives.modality_dropout import ModalityDropout
from mmfusion.objectives.of_strategy import strategy_group
from mmfusion.objectives.pareto import MMPareto
from mmfusion.objectives.unimodal import Unimodal
from mmfusion.objectives.weighting import GradientBlending, GradNorm, Uncertainty
from mmfusion.registry import lookup

if TYPE_CHECKING:
    from mmfusion.config import RunConfig

# Batch transforms apply in this order.
OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "cca": CCA,
    "adversarial": Adversarial,
    "mvae": MVAE,
    "mmvae": MMVAE,
    "gan": GAN,
    "unimodal": Unimodal,
    "uncertainty": Uncertainty,
    "ogm_ge": OGMGE,
    "mmpareto": MMPareto,
    "gradnorm": GradNorm,
    "gradient_blending": GradientBlending,
    "modality_dropout": ModalityDropout,
    "mixup": MixUp,
    "cutmix": CutMix,
}


def objective_class(key: str, section: Mapping[str, Any] = MappingProxyType({})) -> type[Objective]:
    """Returns the class of the objective at a key of `config.objectives`.

    It is the key's entry in the registry, or where the section has a `name`, the class `package.module:Class`.

    Raises:
      UserError: there is none of that name.
    """
    name = section.get("name", key)
    objective = lookup(OBJECTIVES, name, f"config.objectives.{key}")
    if not issubclass(objective, Objective):
        raise UserError(
            "is no subclass of mmfusion.objectives.base.Objective", path=f"config.objectives.{key}", value=name
        )
    return objective


def objective_options(name: str) -> dict[str, Any]:
    """Returns the options of an objective with their defaults; those of `package.module:Class` have its `name`, too."""
    objective = objective_class(name)
    named = {} if name in OBJECTIVES else {"name": name}
    if issubclass(objective, nn.Module):
        return named | module_options(objective)
    return named | {field.name: field.default for field in dataclasses.fields(cast(Any, objective))}


def make_objectives(config: Mapping[str, Any], supplied: Mapping[str, Any]) -> dict[str, Objective]:
    """Returns the objectives that the section `objectives` of a config describes, in the registry's order.

    Those that are not in the registry come last.

    Args:
      config: options by objective.
      supplied: `width`, `dtype`, `axis_name` and `modalities`, for modules that have such fields.
    """
    objectives, order = {}, list(OBJECTIVES)
    for name in sorted(config, key=lambda name: order.index(name) if name in order else len(order)):
        kind = objective_class(name, config[name])
        own = {key: value for key, value in config[name].items() if key != "name"}
        if issubclass(kind, nn.Module):
            fields = {field.name for field in dataclasses.fields(kind)}
            own |= {key: value for key, value in supplied.items() if key in fields}
        objectives[name] = kind(**own)
    return objectives


def check_objectives(config: "RunConfig") -> None:
    """Raises UserError where the config lacks what one of its objectives requires."""
    modalities, targets = len(config.model.encoders), config.data.targets
    for name, options in config.objectives.items():
        path, requires = f"config.objectives.{name}", objective_class(name, options).requires
        if modalities < requires.modalities:
            raise UserError(f"needs {requires.modalities} modalities, the config has {modalities}", path=path)
        if len(targets) < requires.tasks:
            raise UserError(f"needs {requires.tasks} tasks, config.data.targets has {len(targets)}", path=path)
        if requires.target_kind and requires.target_kind not in {target.kind for target in targets.values()}:
            raise UserError(f"needs a target of kind {requires.target_kind}", path=path)
        fusion = config.model.fusion.name
        strategy: Any = lookup(FUSIONS, fusion, "config.model.fusion.name")
        level = strategy.declares.level
        if requires.level not in ("", level):
            raise UserError(
                f"needs a fusion strategy of {requires.level} level, and {fusion!r} is of {level} level", path=path
            )
        for other in requires.excludes:
            if other in config.objectives:
                raise UserError(f"cannot be combined with {other}; leave one out", path=path)
        objective_class(name, options).validate(path, options, config)


def group_size(config: "RunConfig") -> int:
    """Returns how many rows in sequence must stay in one micro-batch."""
    groups = [objective_class(*item).requires.group for item in config.objectives.items()]
    return max(*groups, strategy_group(config.model.fusion.to_dict()), 1)
