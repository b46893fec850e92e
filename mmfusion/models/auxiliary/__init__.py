"""Auxiliary objectives, by the name a config gives them: losses beside the tasks', of what the encoders make."""

from mmfusion.models.auxiliary.alignment import CCA, Adversarial, Contrastive
from mmfusion.models.auxiliary.contract import Auxiliary
from mmfusion.models.auxiliary.imputing import GAN, MMVAE, MVAE

AUXILIARIES: dict[str, type[Auxiliary]] = {
    "contrastive": Contrastive,
    "cca": CCA,
    "adversarial": Adversarial,
    "mvae": MVAE,
    "mmvae": MMVAE,
    "gan": GAN,
}
