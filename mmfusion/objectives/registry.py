"""The objectives of a config, by name."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from mmfusion.models.build import module_options
from mmfusion.objectives.alignment import CCA, Adversarial, Contrastive
from mmfusion.objectives.auxiliary import Auxiliary
from mmfusion.objectives.gradient_modulation import OGMGE
from mmfusion.objectives.imputation import GAN, MMVAE, MVAE
from mmfusion.objectives.mixing import Mixing
from mmfusion.objectives.weighting import GradientBlending, GradNorm

AUXILIARIES: dict[str, type[Auxiliary]] = {
    "contrastive": Contrastive,
    "cca": CCA,
    "adversarial": Adversarial,
    "mvae": MVAE,
    "mmvae": MMVAE,
    "gan": GAN,
}


@dataclasses.dataclass(frozen=True)
class Objectives:
    """What a run learns beside its tasks.

    Attributes:
      auxiliary: the weight in the loss of each of the model's auxiliary objectives.
      unimodal: the weight of each modality's own loss, where modalities are scored alone.
      ogm_ge: what is done to the encoders' gradients; None: nothing.
      gradnorm: how the tasks' weights are learned; None: they stay.
      blending: how the weights of the joint and each modality's head are measured; None: they stay.
      mixing: how examples are mixed; None: they are not.
      modality_dropout: chance with which a row loses each modality in a step; one always stays.
    """

    auxiliary: Mapping[str, float]
    unimodal: float = 1.0
    ogm_ge: OGMGE | None = None
    gradnorm: GradNorm | None = None
    blending: GradientBlending | None = None
    mixing: Mixing | None = None
    modality_dropout: float = 0.0

    def balance(self, tasks: Iterable[str], modalities: Iterable[str]) -> dict[str, Any]:
        """Returns the numbers that weigh losses before the first step, as a state holds them; empty where none do."""
        return {
            **(self.gradnorm.start(tasks) if self.gradnorm else {}),
            **(self.blending.start(modalities) if self.blending else {}),
        }


NO_OBJECTIVES = Objectives({})


def make_objectives(config: Mapping[str, Any]) -> Objectives:
    """Returns what the section `objectives` of a config describes."""
    mixes = [name for name in MIXES if name in config]
    return Objectives(
        auxiliary={name: options["weight"] for name, options in config.items() if name in AUXILIARIES},
        unimodal=config["unimodal"]["weight"] if "unimodal" in config else 1.0,
        ogm_ge=OGMGE(**config["ogm_ge"]) if "ogm_ge" in config else None,
        gradnorm=GradNorm(**config["gradnorm"]) if "gradnorm" in config else None,
        blending=GradientBlending(**config["gradient_blending"]) if "gradient_blending" in config else None,
        mixing=Mixing(mixes[0], config[mixes[0]]["alpha"], config[mixes[0]].get("where", "input")) if mixes else None,
        modality_dropout=config["modality_dropout"]["rate"] if "modality_dropout" in config else 0.0,
    )


def objective_options(name: str) -> dict[str, Any]:
    """Returns the options of an objective with their defaults; raises KeyError where there is none of that name."""
    if name in AUXILIARIES:
        return {"weight": 1.0, **module_options(AUXILIARIES[name])}
    return dict(OTHERS[name])


def fewest(name: str) -> int:
    """Returns how many modalities an objective takes at least."""
    if name in ("adversarial", "ogm_ge"):  # which of one modality would do nothing
        return 2
    return AUXILIARIES[name].fewest if name in AUXILIARIES else 1


def _fields(made: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(made)}


# Objectives that are no modules: unimodal heads beside any strategy's, task weights learned from uncertainty (Kendall
# et al. 2018), gradients that are modulated, blended or kept of one size, mixing, and losing modalities at random.
OTHERS: dict[str, dict[str, Any]] = {
    "unimodal": {"weight": 1.0},
    "uncertainty": {},
    "ogm_ge": _fields(OGMGE),
    "gradnorm": _fields(GradNorm),
    "gradient_blending": _fields(GradientBlending),
    "mixup": {"alpha": 0.2, "where": "features"},  # or "input"
    "cutmix": {"alpha": 1.0},
    "modality_dropout": {"rate": 0.3},
}
MIXES = ("mixup", "cutmix")
OBJECTIVES = (*AUXILIARIES, *OTHERS)
