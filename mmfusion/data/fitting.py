"""What is fitted to the training rows before they are decoded: vocabularies, columns of tables, scales of targets."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.data import labels, targets
from mmfusion.data.cache import Cache, digest
from mmfusion.data.modalities import feature_names, modality_type, raw_value
from mmfusion.data.modality_type import Options
from mmfusion.data.sources import Source
from mmfusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a run takes from its training rows.

    Attributes:
      class_names: per task; empty for regression.
      feature_classes: per class feature that modalities are read from, the names of its classes.
      states: per modality its state as a string: a tokenizer, or the columns of a table.
      scales: per regression task its scale.
      class_weights: per task with `class_weights="balanced"` the weight of each class.
    """

    class_names: dict[str, tuple[str, ...]]
    feature_classes: dict[str, tuple[str, ...]]
    states: dict[str, str]
    scales: dict[str, targets.Scale]
    class_weights: dict[str, tuple[float, ...]]


def restore(saved: Mapping[str, Any]) -> Fitted:
    """Returns what an existing run saved, see `Dataset.saved`."""
    return Fitted(
        class_names={task: tuple(names) for task, names in saved["class_names"].items()},
        feature_classes={name: tuple(names) for name, names in saved.get("feature_classes", {}).items()},
        states=dict(saved["learned"]),
        scales={task: targets.Scale(**scale) for task, scale in saved.get("scales", {}).items()},
        class_weights={task: tuple(weights) for task, weights in saved.get("class_weights", {}).items()},
    )


def fit(
    modalities: Mapping[str, Options],
    tasks: Mapping[str, Options],
    source: Source,
    train: np.ndarray,
    cache: Cache,
    row_key: Any,
) -> Fitted:
    """Fits to the training rows.

    Args:
      modalities: per modality its options.
      tasks: per task the options of its target.
      source: the source of the training rows.
      train: their ids `[n]`.
      cache: keeps what takes long.
      row_key: what stands for the source's rows in the cache, see `cache.source_key`.

    Raises:
      UserError: the classes are not known, or a label cannot be read.
    """
    lists = {name: each.class_names for name, each in source.features.items() if each.class_names}  # of classes, too
    class_names = _class_names(tasks, {**lists, **source.class_names})
    key = ["fitted", row_key, digest(train.tolist()), modalities, tasks]
    states, scales = cache.remember(key, lambda: _states_and_scales(modalities, tasks, source, train))
    class_weights = {}
    for task, options in tasks.items():
        if targets.is_balanced(options):
            classes = class_labels(task, options, source, train, class_names[task], cache, row_key)
            class_weights[task] = targets.balanced_weights(classes[classes >= 0], len(class_names[task]))
    scales = {task: targets.Scale(**scale) for task, scale in scales.items()}
    return Fitted(class_names, _feature_classes(modalities, source), states, scales, class_weights)


def class_labels(
    task: str,
    options: Options,
    source: Source,
    rows: np.ndarray,
    class_names: Sequence[str],
    cache: Cache,
    row_key: Any,
) -> np.ndarray:
    """Returns what `labels.class_labels` does, from the cache if it is there."""
    key = ["labels", row_key, digest(rows.tolist()), options, class_names]
    found = cache.remember(key, lambda: labels.class_labels(task, options, source, rows, len(class_names)).tolist())
    return np.array(found)


def _feature_classes(modalities: Mapping[str, Options], source: Source) -> dict[str, tuple[str, ...]]:
    """Returns the class names of the class features that modalities are read from by name."""
    named = [options for options in modalities.values() if modality_type(options["kind"]).class_names]
    read = {name for options in named for name in feature_names(options)}
    return {name: names for name, names in source.class_names.items() if name in read}


def _states_and_scales(
    modalities: Mapping[str, Options], tasks: Mapping[str, Options], source: Source, train: np.ndarray
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Returns, as JSON values, the state fitted to the training rows of each modality and the scales of targets."""
    kinds = {m: modality_type(options["kind"]) for m, options in modalities.items()}
    needed = {m: set(_evenly(train, kind.fit_rows)) for m, kind in kinds.items() if kind.fit}
    regressions = {task: options for task, options in tasks.items() if options["kind"] == "regression"}
    labelled = set(_evenly(train, targets.FIT_ROWS)) if regressions else set()
    inputs: dict[str, list[Any]] = {m: [] for m in needed}
    values: dict[str, list[Any]] = {task: [] for task in regressions}
    for i in sorted(labelled.union(*needed.values())):
        row = source.rows[i]
        for m in needed:
            if i in needed[m]:
                with contextlib.suppress(OSError):  # a file that cannot be read is reported as its row is decoded
                    inputs[m].append(raw_value(row, modalities[m], source.class_names))
        for task, options in regressions.items():
            if i in labelled:
                values[task].append(row[options["feature"]])
    fitted = {m: kind.fit(inputs[m], modalities[m]) for m, kind in kinds.items() if kind.fit}
    scales = {
        task: dataclasses.asdict(targets.fit_scale(values[task], options, f"config.data.targets.{task}"))
        for task, options in regressions.items()
    }
    return {m: string for m, string in fitted.items() if string}, scales


def _evenly(ids: np.ndarray, count: int) -> list[int]:
    """Returns at most `count` evenly spaced ids."""
    return ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)].tolist()


def _class_names(
    tasks: Mapping[str, Options], feature_class_names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    class_names: dict[str, tuple[str, ...]] = {}
    for task, options in tasks.items():
        names, count = feature_class_names.get(options["feature"], ()), options.get("classes", 0)
        if options["kind"] == "regression":
            names = ()
        elif count and names and len(names) != count:
            raise UserError(
                f"must be 0 or {len(names)}, the number of the dataset's classes",
                path=f"config.data.targets.{task}.classes",
                value=count,
            )
        elif not (names or count):
            raise UserError(
                "must be the number of classes, as the dataset does not define it",
                path=f"config.data.targets.{task}.classes",
                value=count,
            )
        else:
            names = names or tuple(str(i) for i in range(count))
        class_names[task] = names
    return class_names
