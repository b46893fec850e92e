"""Decodes raw rows into arrays of fixed shape, for training, evaluation and prediction alike."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmfusion.data.batch import Batch
from mmfusion.data.modalities import modality_type, raw_value
from mmfusion.data.modality_type import Options
from mmfusion.data.targets import Scale, is_unlabelled
from mmfusion.data.targets import decode as decode_target
from mmfusion.errors import UserError


class BadRow(ValueError):
    """An unreadable row, such as a corrupt image or a value of the wrong type; it gets weight 0."""


class BadTarget(ValueError):
    """A target that is not one of its classes or not finite; it is an error, as training on it would be wrong."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Decodes raw rows into arrays.

    Attributes:
      modalities: per modality its options: `kind`, `feature` and those of its type (`modality_type.py`).
      targets: per task its options, of which `kind` and `feature` are used.
      outputs: per task the number of classes, 1 for regression.
      fitted: per modality its state fitted to the training rows: a tokenizer, or the columns of a table.
      class_names: per class feature, the names of its classes.
      scales: per regression task its scale.
      weight_feature: the feature with each row's weight in the tasks' losses; empty: all weigh the same.
      unknown_class: per task the class that stands for a missing label, -1 of TFDS's class features.
      unlabelled: tasks that no row has a label of, whose targets are not read.
    """

    modalities: Mapping[str, Options]
    targets: Mapping[str, Options]
    outputs: Mapping[str, int]
    fitted: Mapping[str, Any]
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    scales: Mapping[str, Scale] = dataclasses.field(default_factory=dict)
    weight_feature: str = ""
    unknown_class: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unlabelled: frozenset[str] = frozenset()

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype, int]]:
        """Returns per modality the shape of one input, its dtype, and its number of positions."""
        return {
            modality: modality_type(options["kind"]).shape(options, self.fitted.get(modality))
            for modality, options in self.modalities.items()
        }

    def bytes_per_row(self) -> int:
        """Returns the size of one decoded row, in bytes."""
        return sum(
            int(np.prod(shape)) * np.dtype(dtype).itemsize + positions
            for shape, dtype, positions in self.shapes().values()
        )

    def row_weight(self, row: Mapping[str, Any], row_id: int) -> float:
        """Returns the row's weight in the tasks' losses; raises BadRow unless it is finite and at least 0."""
        value = row[self.weight_feature]
        try:
            weight = float(value)
        except (TypeError, ValueError):
            weight = math.nan
        if not 0 <= weight < math.inf:
            message = f"must be a finite number and at least 0, got {value!r}"
            raise BadRow(f"row {row_id}, weight {self.weight_feature!r}: {message}")
        return weight

    def read(self, row: Mapping[str, Any], row_id: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns `{modality: (input, mask), or None if absent}` and `{task: target, or None without a label}`.

        Raises:
          BadRow: the row cannot be read.
          BadTarget: a target is not one of its classes, or not finite.
        """
        values = {}
        for name, options in self.modalities.items():
            try:
                value = raw_value(row, options, self.class_names)
                values[name] = modality_type(options["kind"]).decode(value, options, self.fitted.get(name))
            except (ValueError, OSError, UserError) as error:
                raise BadRow(f"row {row_id}, {name}: {error}") from error
        targets = {}
        for task, options in self.targets.items():
            if task in self.unlabelled:
                continue
            value = row[options["feature"]]
            if is_unlabelled(value, self.unknown_class.get(task)):
                targets[task] = None
                continue
            try:
                targets[task] = decode_target(value, options, self.outputs[task], self.scales.get(task))
            except ValueError as error:
                raise BadTarget(f"row {row_id}, target {task!r}: {error}") from error
        return values, targets


def empty_batch(reader: Reader, size: int) -> Batch:
    """Returns a batch of `size` padding rows as NumPy arrays, to be filled by `fill_row`."""
    shapes = reader.shapes()
    target_shape = {
        task: (size, reader.outputs[task]) if options["kind"] == "multilabel" else (size,)
        for task, options in reader.targets.items()
    }
    arrays: dict[str, Any] = {  # Any, as Batch's fields are annotated as JAX arrays
        "inputs": {m: np.zeros((size, *shape), dtype) for m, (shape, dtype, _) in shapes.items()},
        "mask": {m: np.zeros((size, positions), bool) for m, (_, _, positions) in shapes.items()},
        "present": {m: np.zeros(size, bool) for m in shapes},
        "targets": {
            task: np.zeros(target_shape[task], np.int32 if options["kind"] == "classification" else np.float32)
            for task, options in reader.targets.items()
        },
        "weight": np.zeros(size, np.float32),
        "id": np.full(size, -1, np.int32),
        "labelled": {task: np.zeros(size, bool) for task in reader.targets},
        "row_weight": np.zeros(size, np.float32) if reader.weight_feature else None,
    }
    return Batch(**arrays)


def fill_row(batch: Batch, position: int, row: Mapping[str, Any], row_id: int, reader: Reader) -> None:
    """Decodes `row` into a position of a batch of `empty_batch`, in place; without any label it remains padding.

    Raises:
      BadRow: the row cannot be read; the position remains padding.
      BadTarget: a target is not one of its classes, or not finite.
    """
    values, targets = reader.read(row, row_id)
    if targets and all(target is None for target in targets.values()):
        return
    row_weight = reader.row_weight(row, row_id) if reader.weight_feature else 1.0
    for modality, value in values.items():
        if value is not None:
            batch.inputs[modality][position], batch.mask[modality][position] = value
            batch.present[modality][position] = True
    for task, target in targets.items():
        if target is not None:
            batch.targets[task][position] = target
            batch.labelled[task][position] = True
    batch.weight[position] = 1
    if batch.row_weight is not None:
        batch.row_weight[position] = row_weight
    batch.id[position] = row_id
