"""Objectives: what a run minimises, and how losses are weighted, batches transformed and gradients modulated."""

from mmfusion.objectives.build import Objectives, build_objectives
from mmfusion.objectives.registry import (
    OBJECTIVES,
    check_objectives,
    group_size,
    make_objectives,
    objective_class,
    objective_options,
)
from mmfusion.objectives.supervised import LOSSES, REGRESSION_LOSSES, TASKS, Task, task_loss, task_weight

__all__ = [
    "LOSSES",
    "OBJECTIVES",
    "REGRESSION_LOSSES",
    "TASKS",
    "Objectives",
    "Task",
    "build_objectives",
    "check_objectives",
    "group_size",
    "make_objectives",
    "objective_class",
    "objective_options",
    "task_loss",
    "task_weight",
]
