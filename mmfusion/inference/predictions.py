"""Turns logits into labels, probabilities and values, with their uncertainty and contributions on request.

n rows · C classes
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, softmax

from mmfusion.data.targets import Scale
from mmfusion.errors import UserError
from mmfusion.inference.contributions import Subset, contributions
from mmfusion.objectives import Task
from mmfusion.training.calibration import Calibration
from mmfusion.training.uncertainty import conformal_quantile, examples_needed

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
      intervals: of a regression task, the lower and upper end `[n, 2]` of each row's interval, NaN for a row with an
        error; None unless requested.
      sets: of a classification task, each row's conformal set of class names, in order of probability, None for a row
        with an error; None unless requested.
      contributions: per modality `[n]`, NaN for a row with an error; None unless requested.
    """

    type: str
    classes: tuple[str, ...]
    labels: list[Any]
    probabilities: np.ndarray | None
    values: np.ndarray | None
    intervals: np.ndarray | None = None
    sets: list[tuple[str, ...] | None] | None = None
    contributions: dict[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions for rows, in row order.

    Attributes:
      tasks: predictions by task.
      errors: per row the reason why it could not be predicted, "" for a predicted row.
      unknown: (modality, `words` or a column) -> how many values training did not have, and of how many.
    """

    tasks: dict[str, TaskPredictions]
    errors: list[str]
    unknown: dict[tuple[str, str], tuple[int, int]] = dataclasses.field(default_factory=dict)

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


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """What is added to the predictions of a task.

    Attributes:
      temperature: divides the logits of classes.
      quantile: of the conformal scores; NaN: no interval and no set.
    """

    temperature: float = 1.0
    quantile: float = float("nan")


def uncertainties(
    tasks: Mapping[str, Task],
    calibration: Mapping[str, Calibration],
    *,
    calibrated: bool = True,
    intervals: float | None = None,
    sets: float | None = None,
) -> dict[str, Uncertainty]:
    """Returns the uncertainty of each task.

    Args:
      tasks: of the run.
      calibration: of each task; it may be empty if nothing is requested that needs it.
      calibrated: whether probabilities are calibrated.
      intervals: coverage of the intervals of regression tasks; None: there are none.
      sets: coverage of the sets of classification tasks; None: there are none.

    Raises:
      UserError: a coverage is not in (0, 1), no task has intervals or sets, or there are too few validation examples.
    """
    requested = {"regression": ("intervals", intervals), "classification": ("sets", sets)}
    for kind, (name, coverage) in requested.items():
        if coverage is not None and not 0 < coverage < 1:
            raise UserError("is the coverage, which must be above 0 and below 1", path=name, value=coverage)
        if coverage is not None and all(spec.kind != kind for spec in tasks.values()):
            kinds = ", ".join(f"{task} is {spec.kind}" for task, spec in tasks.items())
            raise UserError(f"needs a {kind} task ({kinds})", path=name, value=coverage)
    result = {}
    for task, spec in tasks.items():
        temperature = calibration[task].temperature if calibrated else 1.0
        name, coverage = requested.get(spec.kind, ("", None))
        quantile = float("nan")
        if coverage is not None:
            scores = calibration[task].scores
            quantile = conformal_quantile(scores, coverage)
            if not np.isfinite(quantile):
                needed = examples_needed(coverage)
                message = f"needs at least {needed} validation examples of {task}, the run has {len(scores)}"
                raise UserError(message, path=name, value=coverage)
        result[task] = Uncertainty(temperature, quantile)
    return result


def predictions(
    logits: Mapping[Subset, Mapping[str, np.ndarray]],
    tasks: Mapping[str, Task],
    class_names: Mapping[str, tuple[str, ...]],
    errors: Sequence[str],
    uncertainty: Mapping[str, Uncertainty],
) -> Predictions:
    """Returns predictions from logits; a row with logits that are not finite gets an error.

    Args:
      logits: per subset of the modalities, of which the largest is predicted, per task `[n, C]`, for regression
        `[n, 1]` in the units of the loss. With several subsets, contributions are computed.
      tasks: of the run.
      class_names: per task its class names.
      errors: per row its error, or "".
      uncertainty: of each task.
    """
    finite = np.logical_and.reduce([np.isfinite(x).all(axis=1) for each in logits.values() for x in each.values()])
    errors = [error or ("" if ok else NOT_FINITE) for error, ok in zip(errors, finite, strict=True)]
    bad = np.array([bool(error) for error in errors], bool)  # [n]
    found = {}
    for task, names in class_names.items():
        clean = {kept: np.where(bad[:, None], 0, each[task].astype(np.float64)) for kept, each in logits.items()}
        with np.errstate(over="ignore", invalid="ignore"):
            found[task] = _task_predictions(clean, tasks[task], names, bad, uncertainty[task])
    finite = np.logical_and.reduce([_finite(task) for task in found.values()]) | bad
    if not finite.all():  # finite logits whose probabilities or values overflow
        errors = [error or ("" if ok else NOT_FINITE) for error, ok in zip(errors, finite, strict=True)]
        return predictions(logits, tasks, class_names, errors, uncertainty)
    return Predictions(found, errors)


def _finite(task: TaskPredictions) -> np.ndarray:
    """Returns the mask `[n]` of the rows whose probabilities or values are finite."""
    if task.probabilities is not None:
        return np.asarray(np.isfinite(task.probabilities).all(axis=1))
    assert task.values is not None
    return np.asarray(np.isfinite(task.values))


def _task_predictions(
    logits: Mapping[Subset, np.ndarray], task: Task, names: tuple[str, ...], bad: np.ndarray, uncertainty: Uncertainty
) -> TaskPredictions:
    everything = max(logits, key=len)
    result = (
        _regression(logits[everything][:, 0], task.scale, bad, uncertainty)
        if task.kind == "regression"
        else _classes(logits[everything] / uncertainty.temperature, logits[everything], task, names, bad, uncertainty)
    )
    if len(logits) > 1:
        value = {kept: _explained(x, logits[everything], task, uncertainty) for kept, x in logits.items()}
        shares = {m: np.where(bad, np.nan, share) for m, share in contributions(value).items()}
        return dataclasses.replace(result, contributions=shares)
    return result


def _regression(scaled: np.ndarray, scale: Scale, bad: np.ndarray, uncertainty: Uncertainty) -> TaskPredictions:
    values, intervals = np.where(bad, np.nan, scale.invert(scaled)), None
    if not np.isnan(uncertainty.quantile):
        ends = np.stack([scale.invert(scaled - uncertainty.quantile), scale.invert(scaled + uncertainty.quantile)], 1)
        intervals = np.where(bad[:, None], np.nan, ends)
    return TaskPredictions("regression", (), [], None, values, intervals)


def _classes(
    logits: np.ndarray,
    uncalibrated: np.ndarray,
    task: Task,
    names: tuple[str, ...],
    bad: np.ndarray,
    uncertainty: Uncertainty,
) -> TaskPredictions:
    labels: list[Any]
    sets = None
    if task.kind == "classification":
        probabilities = softmax(logits, axis=1)  # [n, C]
        labels = [names[i] for i in logits.argmax(axis=1)]
        if not np.isnan(uncertainty.quantile):
            sets = _conformal_sets(softmax(uncalibrated, axis=1), names, uncertainty.quantile)
            sets = [None if failed else each for failed, each in zip(bad, sets, strict=True)]
    else:
        probabilities = expit(logits)
        labels = [
            tuple(name for name, p in zip(names, row, strict=True) if p >= THRESHOLD) for row in probabilities.tolist()
        ]
    labels = [None if failed else label for failed, label in zip(bad, labels, strict=True)]
    probabilities = np.where(bad[:, None], np.nan, probabilities)
    return TaskPredictions(task.kind, names, labels, probabilities, None, sets=sets)


def _conformal_sets(probabilities: np.ndarray, names: tuple[str, ...], quantile: float) -> list[tuple[str, ...]]:
    """Returns each row's classes of score 1 - p up to the quantile, and always the most probable one."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    counts = np.maximum((1 - probabilities <= quantile).sum(axis=1), 1)
    return [tuple(names[i] for i in row[:count]) for row, count in zip(order, counts, strict=True)]


def _explained(logits: np.ndarray, full: np.ndarray, task: Task, uncertainty: Uncertainty) -> np.ndarray:
    """Returns the value `[n]` that contributions divide up, of the logits with some modalities.

    It is the probability of the class predicted with all modalities, the mean over labels of the probability of each
    label as it is predicted, or the value of a regression task in the units of the data.
    """
    if task.kind == "regression":
        return task.scale.invert(logits[:, 0])
    scaled = logits / uncertainty.temperature
    if task.kind == "classification":
        return softmax(scaled, axis=1)[np.arange(len(full)), full.argmax(axis=1)]
    return expit(np.where(full >= 0, scaled, -scaled)).mean(axis=1)
