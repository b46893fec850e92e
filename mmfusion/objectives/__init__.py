"""Objectives: task losses, and what a run learns beside its tasks."""

from mmfusion.objectives.registry import (
    AUXILIARIES,
    MIXES,
    NO_OBJECTIVES,
    OBJECTIVES,
    OTHERS,
    Objectives,
    fewest,
    make_objectives,
    objective_options,
)
from mmfusion.objectives.supervised import LOSSES, REGRESSION_LOSSES, TASKS, Task, task_loss, task_weight

__all__ = [
    "AUXILIARIES",
    "LOSSES",
    "MIXES",
    "NO_OBJECTIVES",
    "OBJECTIVES",
    "OTHERS",
    "REGRESSION_LOSSES",
    "TASKS",
    "Objectives",
    "Task",
    "fewest",
    "make_objectives",
    "objective_options",
    "task_loss",
    "task_weight",
]
