"""Turns logits into labels, probabilities and values.

n rows · C classes
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from mmfusion.errors import UserError

NOT_FINITE = "the model's output is not finite"
THRESHOLD = 0.5  # minimum probability of a predicted class in multi-label tasks


@dataclasses.dataclass(frozen=True)
class TaskPredictions:
    """The predictions of one task.

    Attributes:
      type: `classification`, `multilabel` or `regression`.
      classes: names of the classes; empty for regression.
      labels: per row the name of the most probable class, or for multi-label tasks a tuple of the names of all classes
        with probability 0.5 or more; None for a row with an error. Empty for regression.
      probabilities: class probabilities `[n, C]` float64, NaN for a row with an error; None for regression.
      values: predicted values `[n]` float64, NaN for a row with an error; None for classes.
    """

    type: str
    classes: tuple[str, ...]
    labels: list[Any]
    probabilities: np.ndarray | None
    values: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions for rows, in row order.

    Attributes:
      tasks: predictions by task.
      errors: per row the reason why it could not be predicted, "" for a predicted row.
    """

    tasks: dict[str, TaskPredictions]
    errors: list[str]

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def labels(self) -> list[Any]:
        """The labels of the only task; see `TaskPredictions`."""
        return self._only_task.labels

    @property
    def probabilities(self) -> np.ndarray | None:
        """The probabilities of the only task; see `TaskPredictions`."""
        return self._only_task.probabilities

    @property
    def values(self) -> np.ndarray | None:
        """The values of the only task; see `TaskPredictions`."""
        return self._only_task.values

    @property
    def _only_task(self) -> TaskPredictions:
        if len(self.tasks) > 1:
            raise UserError(f"the model has several tasks; use predictions.tasks[NAME] of {', '.join(self.tasks)}")
        (task,) = self.tasks.values()
        return task


def predictions(
    logits: Mapping[str, np.ndarray],
    types: Mapping[str, str],
    class_names: Mapping[str, tuple[str, ...]],
    errors: Sequence[str],
) -> Predictions:
    """Returns predictions from logits; a row with logits that are not finite gets an error.

    Args:
      logits: per task `[n, C]`, `[n, 1]` for regression.
      types: per task its type.
      class_names: per task its class names.
      errors: per row its error, or "".
    """
    finite = np.logical_and.reduce([np.isfinite(logits[task]).all(axis=1) for task in class_names])  # [n]
    errors = [error or ("" if ok else NOT_FINITE) for error, ok in zip(errors, finite, strict=True)]
    bad = np.array([bool(error) for error in errors], bool)  # [n]
    tasks = {}
    for task, names in class_names.items():
        clean = np.where(bad[:, None], 0, logits[task].astype(np.float64))
        tasks[task] = _task_predictions(clean, types[task], names, bad)
    return Predictions(tasks, errors)


def _task_predictions(logits: np.ndarray, task_type: str, names: tuple[str, ...], bad: np.ndarray) -> TaskPredictions:
    if task_type == "regression":
        values = np.where(bad, np.nan, logits[:, 0])
        return TaskPredictions(task_type, (), [], None, values)
    labels: list[Any]
    if task_type == "classification":
        probabilities = softmax(logits, axis=1)  # [n, C]
        labels = [names[i] for i in probabilities.argmax(axis=1)]
    else:
        probabilities = expit(logits)
        labels = [
            tuple(name for name, p in zip(names, row, strict=True) if p >= THRESHOLD) for row in probabilities.tolist()
        ]
    labels = [None if failed else label for failed, label in zip(bad, labels, strict=True)]
    return TaskPredictions(task_type, names, labels, np.where(bad[:, None], np.nan, probabilities), None)
