"""What is fitted to the training rows before they are decoded: vocabularies, columns of tables, scales of targets."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmfusion.data import targets
from mmfusion.data.modalities import feature_names, modality_type, raw_value
from mmfusion.data.modality_type import Options
from mmfusion.data.sources import Source


def feature_classes(modalities: Mapping[str, Options], source: Source) -> dict[str, tuple[str, ...]]:
    """Returns the class names of the class features that modalities are read from by name."""
    named = [options for options in modalities.values() if modality_type(options["kind"]).class_names]
    read = {name for options in named for name in feature_names(options)}
    return {name: names for name, names in source.class_names.items() if name in read}


def fit(
    modalities: Mapping[str, Options], tasks: Mapping[str, Options], source: Source, train: np.ndarray
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Returns, as JSON values, the state fitted to the training rows of each modality and the scales of targets."""
    kinds = {m: modality_type(options["kind"]) for m, options in modalities.items()}
    needed = {m: set(_evenly(train, kind.fit_rows)) for m, kind in kinds.items() if kind.fit}
    regressions = {task: options for task, options in tasks.items() if options["kind"] == "regression"}
    labelled = set(_evenly(train, targets.FIT_ROWS)) if regressions else set()
    inputs: dict[str, list[Any]] = {m: [] for m in needed}
    labels: dict[str, list[Any]] = {task: [] for task in regressions}
    for i in sorted(labelled.union(*needed.values())):
        row = source.rows[i]
        for m in needed:
            if i in needed[m]:
                with contextlib.suppress(OSError):  # a file that cannot be read is reported as its row is decoded
                    inputs[m].append(raw_value(row, modalities[m], source.class_names))
        for task, options in regressions.items():
            if i in labelled:
                labels[task].append(row[options["feature"]])
    fitted = {m: kind.fit(inputs[m], modalities[m]) for m, kind in kinds.items() if kind.fit}
    scales = {
        task: dataclasses.asdict(targets.fit_scale(labels[task], options, f"config.data.targets.{task}"))
        for task, options in regressions.items()
    }
    return {m: string for m, string in fitted.items() if string}, scales


def _evenly(ids: np.ndarray, count: int) -> list[int]:
    """Returns at most `count` evenly spaced ids."""
    return ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)].tolist()
