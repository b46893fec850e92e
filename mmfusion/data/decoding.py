"""One raw row -> fixed-shape arrays per modality and target, the same for training, evaluation and prediction."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmfusion.data.batch import Batch
from mmfusion.data.modalities import MODALITY_TYPES, Options, raw_value


class BadRow(ValueError):
    """A row that cannot be read: a corrupt picture or sound, a value of the wrong kind; it is quarantined."""


class BadTarget(ValueError):
    """A target that would train silently wrong (a label outside the classes, a value that is not finite)."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns raw rows into arrays.

    Attributes:
      modalities: per modality its options: `kind`, `feature` and the kind's own (`kinds.py`).
      targets: per task `kind` and `feature`.
      outputs: per task the number of classes, 1 for regression.
      fitted: per modality what training taught: of text a tokenizer, of tables their columns, else None.
      named: per feature that is a class, the classes' names.
    """

    modalities: Mapping[str, Options]
    targets: Mapping[str, Options]
    outputs: Mapping[str, int]
    fitted: Mapping[str, Any]
    named: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype, int]]:
        """Returns per modality the shape of one input, its dtype, and its number of positions."""
        return {m: MODALITY_TYPES[o["kind"]].shape(o, self.fitted.get(m)) for m, o in self.modalities.items()}

    def bytes_per_row(self) -> int:
        """Returns the memory of one row once decoded, in bytes."""
        return sum(int(np.prod(s)) * np.dtype(d).itemsize + n for s, d, n in self.shapes().values())

    def read(self, row: Mapping[str, Any], number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns `{modality: (input, mask) or None where absent}` and `{task: target}`.

        Raises:
          BadRow: the row's data cannot be read.
          BadTarget: a target is outside its classes or not finite.
        """
        values = {}
        for name, options in self.modalities.items():
            try:
                value = raw_value(row, options, self.named)
                values[name] = MODALITY_TYPES[options["kind"]].read(value, options, self.fitted.get(name))
            except (ValueError, OSError) as error:
                raise BadRow(f"row {number}, {name}: {error}") from error
        targets = {}
        for task, options in self.targets.items():
            try:
                targets[task] = TARGETS[options["kind"]](row[options["feature"]], self.outputs[task])
            except ValueError as error:
                raise BadTarget(f"row {number}, target {task!r}: {error}") from error
        return values, targets


def _read_class(value: Any, classes: int) -> np.ndarray:
    label = np.asarray(value)
    if label.ndim or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"a class must be one whole number, got {value!r}")
    if not 0 <= label < classes:
        raise ValueError(f"class {int(label)} is outside 0 to {classes - 1}")
    return label.astype(np.int32)


def _read_classes(value: Any, classes: int) -> np.ndarray:
    labels = np.asarray(value)
    if labels.dtype == bool and labels.shape == (classes,):  # one truth value a class
        return labels.astype(np.float32)
    if labels.size and not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"classes must be whole numbers, or {classes} truth values, got {value!r}")
    labels = labels.reshape(-1).astype(np.int64)
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"classes {labels.tolist()} are outside 0 to {classes - 1}")
    hot = np.zeros(classes, np.float32)
    hot[labels] = 1
    return hot


def _read_number(value: Any, _: int) -> np.ndarray:
    number = np.asarray(value, np.float32)
    if number.ndim or not np.isfinite(number):
        raise ValueError(f"a regression target must be one finite number, got {value!r}")
    return number


CLASS_OPTIONS = {
    "classes": 0,  # 0: as many as the dataset names
    "loss": "cross_entropy",  # or focal; of classes mse, too, and emd, the earth mover's distance of those in order
    "gamma": 2.0,  # of focal: how much less an example counts that is predicted well
    "label_smoothing": 0.0,
    "class_weights": (),  # one weight a class; empty: all 1
    "weight": 1.0,  # of this task's mean loss in the sum over tasks
}
TARGETS = {"classification": _read_class, "multilabel": _read_classes, "regression": _read_number}
TARGET_OPTIONS: dict[str, dict[str, Any]] = {
    "classification": CLASS_OPTIONS,
    "multilabel": CLASS_OPTIONS,
    "regression": {"loss": "mse", "weight": 1.0},  # loss: mse, mae or huber
}


def empty_batch(reader: Reader, size: int) -> Batch:
    """Returns a batch of `size` padding rows, NumPy arrays to be filled."""
    shapes = reader.shapes()
    target_shape = {
        task: (size, reader.outputs[task]) if options["kind"] == "multilabel" else (size,)
        for task, options in reader.targets.items()
    }
    return Batch(
        inputs={m: np.zeros((size, *shape), dtype) for m, (shape, dtype, _) in shapes.items()},
        mask={m: np.zeros((size, positions), bool) for m, (_, _, positions) in shapes.items()},
        present={m: np.zeros(size, bool) for m in shapes},
        targets={
            task: np.zeros(target_shape[task], np.int32 if options["kind"] == "classification" else np.float32)
            for task, options in reader.targets.items()
        },
        weight=np.zeros(size, np.float32),
        id=np.full(size, -1, np.int32),
    )


def fill_row(batch: Batch, place: int, row: Mapping[str, Any], number: int, reader: Reader) -> None:
    """Reads `row` into place `place` of a batch that `empty_batch` made.

    Raises:
      BadRow: the row's data cannot be read; the place is left as padding.
      BadTarget: a target is outside its classes or not finite.
    """
    values, targets = reader.read(row, number)
    for modality, value in values.items():
        if value is not None:
            batch.inputs[modality][place], batch.mask[modality][place] = value
            batch.present[modality][place] = True
    for task, target in targets.items():
        batch.targets[task][place] = target
    batch.weight[place] = 1
    batch.id[place] = number
