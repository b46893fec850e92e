"""Optimizers, learning-rate schedules and what is frozen."""

from mmfusion.optim.layer_decay import layerwise_lr_decay
from mmfusion.optim.optimizers import OPTIMIZERS, make, options
from mmfusion.optim.schedules import SCHEDULES, learning_rate, plateau_start, plateau_update, schedule_options

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "layerwise_lr_decay",
    "learning_rate",
    "make",
    "options",
    "plateau_start",
    "plateau_update",
    "schedule_options",
]
