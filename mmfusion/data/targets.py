"""Target types: raw labels and values decoded into arrays, and regression targets scaled to unit variance.

C classes
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mmfusion.data.features import Feature
from mmfusion.data.modality_type import Options
from mmfusion.errors import UserError

FIT_ROWS = 100_000  # training rows that scales are fitted to at most
ENCODINGS = ("auto", "multi_hot", "classes")
SCALES = ("standard", "log", "none")
BALANCED = "balanced"  # the value of class_weights, and of config.data.sampler
CLASS_OPTIONS = {
    "classes": 0,  # number of classes; 0: that of the dataset's class names
    "loss": "cross_entropy",  # or focal; mse or emd (earth mover's distance of ordered classes) for classification
    "gamma": 2.0,  # focal loss only: exponent of the down-weighting of well-classified examples
    "label_smoothing": 0.0,
    # One weight per class; empty: all 1; "balanced", for classification only: see `balanced_weights`.
    "class_weights": (),
    "weight": 1.0,  # weight of this task's mean loss in the sum over tasks
}
TARGET_OPTIONS: dict[str, dict[str, Any]] = {
    "classification": CLASS_OPTIONS,
    "multilabel": {
        **CLASS_OPTIONS,
        "encoding": "auto",  # multi_hot: C numbers in [0, 1]; classes: a list of class numbers; auto: by the feature
    },
    "regression": {
        "loss": "mse",  # or mae, huber
        "scale": "standard",  # standardise on the training rows; log: their logarithm; none. Metrics are in data units
        "metrics": (),  # further metrics: sentiment, accuracies of targets in [-3, 3], see `metrics.sentiment`
        "weight": 1.0,
    },
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """A map of a regression target to the units of the loss and back: (y - mean) / std, of log(y) if `log`."""

    mean: float = 0.0
    std: float = 1.0
    log: bool = False

    def apply(self, values: Any) -> np.ndarray:
        """Returns values in the units of the loss, float64."""
        values = np.asarray(values, np.float64)
        return ((np.log(values) if self.log else values) - self.mean) / self.std

    def invert(self, scaled: Any) -> np.ndarray:
        """Returns values in the units of the data, float64."""
        values = np.asarray(scaled, np.float64) * self.std + self.mean
        return np.exp(values) if self.log else values


UNSCALED = Scale()


def is_balanced(options: Options) -> bool:
    """Returns whether a target's class weights follow from its training rows; a flag gives the word as a tuple."""
    return options.get("class_weights") in (BALANCED, (BALANCED,))


def balanced_weights(labels: np.ndarray, classes: int) -> tuple[float, ...]:
    """Returns the weight of each class, n / (C n_c) for n rows, n_c of them of the class, and C classes with rows.

    It is scikit-learn's `class_weight="balanced"`; a class without rows has the weight 0.

    Args:
      labels: the class `[n]` of each row.
      classes: the number of classes.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    return tuple(np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 0.0).tolist())


def is_missing(value: Any) -> bool:
    """Returns whether a label stands for none in a table: None, NaN or only NaN, an empty text; [] is no class."""
    if value is None or isinstance(value, (str, bytes)):
        return not value or not value.strip()
    numbers = np.asarray(value) if isinstance(value, (float, np.floating, np.ndarray)) else np.zeros(0)
    return bool(numbers.size and numbers.dtype.kind == "f" and np.isnan(numbers).all())


def is_unlabelled(value: Any, unknown: int | None = None) -> bool:
    """Returns whether a raw value of a dataset is no label: None, or the number of an unknown class."""
    return value is None or (unknown is not None and np.ndim(value) == 0 and value == unknown)


def is_placeholder(value: Any, kind: str) -> bool:
    """Returns whether a raw value stands for no label where every row of a split has it, as also a class -1 does."""
    return is_missing(value) or (kind == "classification" and np.ndim(value) == 0 and value == -1)


def read_labels(
    values: Iterable[Any], options: Options, classes: int, path: str, unknown: int | None = None
) -> np.ndarray:
    """Returns the classes `[n]` of the raw values of a classification target, -1 for a missing label.

    Args:
      values: the raw values.
      options: the target's options.
      classes: the number of classes.
      path: the target's config key, for error messages.
      unknown: see `is_unlabelled`.

    Raises:
      UserError: a value is not one of the classes.
    """
    try:
        return np.array([
            -1 if is_unlabelled(value, unknown) else _class(value, options, classes, None) for value in values
        ], np.int64)  # fmt: skip
    except ValueError as error:
        raise UserError(f"{error}; correct the data or the target", path=path) from error


def fit_scale(values: Iterable[Any], options: Options, path: str) -> Scale:
    """Returns the scale of a regression target.

    Args:
      values: the training rows' values; those that are not finite numbers are refused when they are read, not here.
      options: the target's options.
      path: the target's config key, for error messages.

    Raises:
      UserError: `scale` is `log` and a value is not above 0.
    """
    if options["scale"] == "none":
        return Scale()
    numbers = np.array([number for value in values if math.isfinite(number := _number_or_nan(value))], np.float64)
    log = options["scale"] == "log"
    if log and numbers.size and numbers.min() <= 0:
        raise UserError(f"needs targets above 0, and one is {numbers.min():g}", path=f"{path}.scale", value="log")
    numbers = np.log(numbers) if log else numbers
    std = float(numbers.std()) if numbers.size else 0.0
    return Scale(float(numbers.mean()) if numbers.size else 0.0, std if std > 0 else 1.0, log)


def _number_or_nan(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def encoding(feature: Feature | None, options: Options, classes: int, path: str) -> str:
    """Returns how a multi-label target is stored: `multi_hot`, `classes`, or `auto` if it can only be told by value.

    Args:
      feature: what the target's feature holds; None: unknown.
      options: the target's options.
      classes: C.
      path: the target's config key, for error messages.

    Raises:
      UserError: an array of a size other than C.
    """
    if options["encoding"] != "auto" or feature is None or feature.form == "other":
        return options["encoding"]
    if feature.form == "classes":
        return "classes"
    if not feature.form.startswith("array"):
        message = f"holds {feature}; a multilabel target is a list of class numbers or {classes} numbers in [0, 1]"
        raise UserError(message, path=f"{path}.feature", value=options["feature"])
    if feature.is_sequence:
        return "auto"
    if feature.shape != (classes,):
        message = (
            f"holds {feature}, which is not one number for each of the {classes} classes; if it holds class numbers, "
            f"set {path}.encoding=classes"
        )
        raise UserError(message, path=f"{path}.feature", value=options["feature"])
    return "multi_hot"


def decode(value: Any, options: Options, outputs: int, scale: Scale | None) -> np.ndarray:
    """Returns a target: class [] int32, multi-label `[C]` float32, or regression [] float32 in the units of the loss.

    Args:
      value: the raw value.
      options: the target's options.
      outputs: C, 1 for regression.
      scale: of a regression target; None: not scaled.

    Raises:
      ValueError: the value is not one of the classes, or not finite.
    """
    return DECODERS[options["kind"]](value, options, outputs, scale)


def _class(value: Any, options: Options, classes: int, scale: Scale | None) -> np.ndarray:
    label = np.asarray(value)
    if isinstance(value, str):  # of a table
        raise ValueError(f"{value!r} is none of the {classes} classes of the training rows")
    if label.ndim or label.dtype.kind not in "biu":
        raise ValueError(f"a class must be one integer, got {value!r}")
    if label == -1:
        raise ValueError(f"class -1 is outside 0 to {classes - 1}; it stands for no label only where all rows have it")
    if not 0 <= label < classes:
        raise ValueError(f"class {int(label)} is outside 0 to {classes - 1}")
    return label.astype(np.int32)


def _labels(value: Any, options: Options, classes: int, scale: Scale | None) -> np.ndarray:
    labels = np.asarray(value)
    if labels.size and labels.dtype.kind not in "biuf":
        raise ValueError(f"classes must be integers, or {classes} numbers in [0, 1], got {value!r}")
    form = options["encoding"]
    one_each = labels.shape == (classes,) and bool(((labels >= 0) & (labels <= 1)).all())
    if form == "auto":
        form = _guess(labels, classes, one_each)
    if form == "multi_hot":
        if not one_each:
            raise ValueError(f"must be {classes} numbers in [0, 1], one for each class, got {labels.tolist()}")
        return labels.astype(np.float32)
    labels = labels.reshape(-1)
    if labels.size and labels.dtype.kind not in "iu":
        raise ValueError(f"classes must be integers, or {classes} numbers in [0, 1], got {labels.tolist()}")
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"classes {labels.tolist()} are outside 0 to {classes - 1}")
    multi_hot = np.zeros(classes, np.float32)
    multi_hot[labels.astype(np.int64)] = 1
    return multi_hot


def _guess(labels: np.ndarray, classes: int, one_each: bool) -> str:
    """Returns the encoding that a value itself tells; integers may be class numbers as well as one number per class."""
    if labels.size == 0:
        return "classes"
    if labels.dtype.kind in "bf":
        return "multi_hot"
    distinct = len(np.unique(labels)) == labels.size
    if one_each and distinct:
        raise ValueError(
            f"{labels.tolist()} may be class numbers or one number per class; set its encoding to classes or multi_hot"
        )
    return "multi_hot" if one_each else "classes"


def _number(value: Any, options: Options, _: int, scale: Scale | None) -> np.ndarray:
    number = np.asarray(_number_or_nan(value) if np.ndim(value) == 0 else value)
    if number.ndim or not np.isfinite(number):
        raise ValueError(f"a regression target must be one finite number, got {value!r}")
    if "sentiment" in options.get("metrics", ()) and abs(number) > 3:
        raise ValueError(f"must be in [-3, 3] for metrics=sentiment, got {value!r}")
    if scale is None:
        return number.astype(np.float32)
    if scale.log and number <= 0:
        raise ValueError(f"must be above 0 for scale=log, got {value!r}")
    return scale.apply(number).astype(np.float32)


DECODERS: dict[str, Callable[[Any, Mapping[str, Any], int, Scale | None], np.ndarray]] = {
    "classification": _class,
    "multilabel": _labels,
    "regression": _number,
}
