"""Multimodal fusion in JAX: encoders, fusion strategies, training, and ablations that end in claims with evidence.

`train` a config, `load` the run, `evaluate` it, `predict` rows, and `ablate` fusion strategies over seeds:

    import mmfusion

    mmfusion.train("configs/quickstart.py", "runs/quickstart")
    model = mmfusion.load("runs/quickstart")
    model.predict([{"image": "shapes.png", "text": "the red circle is left of the blue square"}]).labels

Names are imported on first use, so that `import mmfusion` is fast and does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmfusion.version import __version__

if TYPE_CHECKING:
    from mmfusion.analysis.ablate import AblationResult, ablate
    from mmfusion.config.files import load_file as load_config
    from mmfusion.config.own_data import Dataset
    from mmfusion.data.modalities import MODALITY_TYPES
    from mmfusion.errors import Preempted, UserError
    from mmfusion.inference.predictions import Predictions, TaskPredictions
    from mmfusion.inference.representations import Attention, Features
    from mmfusion.inference.trained_model import TrainedModel, load
    from mmfusion.models.encoders import ENCODERS
    from mmfusion.models.fusion import FUSIONS
    from mmfusion.objectives import OBJECTIVES
    from mmfusion.training.train import train

_MODULES = {  # name -> module, or module:name
    "AblationResult": "mmfusion.analysis.ablate",
    "Attention": "mmfusion.inference.representations",
    "Dataset": "mmfusion.config.own_data",
    "ENCODERS": "mmfusion.models.encoders",
    "FUSIONS": "mmfusion.models.fusion",
    "Features": "mmfusion.inference.representations",
    "MODALITY_TYPES": "mmfusion.data.modalities",
    "OBJECTIVES": "mmfusion.objectives",
    "Predictions": "mmfusion.inference.predictions",
    "Preempted": "mmfusion.errors",
    "TaskPredictions": "mmfusion.inference.predictions",
    "TrainedModel": "mmfusion.inference.trained_model",
    "UserError": "mmfusion.errors",
    "ablate": "mmfusion.analysis.ablate",
    "load": "mmfusion.inference.trained_model",
    "load_config": "mmfusion.config.files:load_file",
    "train": "mmfusion.training.train",
}

__all__ = [
    "ENCODERS",
    "FUSIONS",
    "MODALITY_TYPES",
    "OBJECTIVES",
    "AblationResult",
    "Attention",
    "Dataset",
    "Features",
    "Predictions",
    "Preempted",
    "TaskPredictions",
    "TrainedModel",
    "UserError",
    "__version__",
    "ablate",
    "load",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _MODULES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
