"""The calibration of a run, fitted to its validation split: temperatures and conformal scores, saved with the run.

n examples · C classes
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath, epy

from mmfusion.checkpoints.checksums import CHECKSUM, has_valid_checksum, with_checksum
from mmfusion.files import write_json
from mmfusion.objectives import Task
from mmfusion.training import uncertainty

with epy.lazy_imports():
    from scipy import special

FILE = "calibration.json"
MAX_EXAMPLES = 10_000  # validation examples that it is fitted to at most, evenly spaced


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration of one task.

    Attributes:
      temperature: divides the logits of class tasks; 1 where validation determines none, as where every example is
        right and the likelihood has no maximum.
      scores: conformal scores `[n]` of validation examples, in ascending order. Of a regression task |y - prediction|
        in the units of the loss, of classification 1 - p_y with p of the uncalibrated logits, so that they are
        independent of the temperature, which is fitted to the same examples. Empty for multi-label tasks.
    """

    temperature: float
    scores: np.ndarray


def fit(collected: Mapping[str, Any], tasks: Mapping[str, Task]) -> dict[str, Calibration]:
    """Returns the calibration of each task.

    Args:
      collected: what `evaluation.collect` returned of the validation split.
      tasks: of the run.
    """
    result = {}
    for task, spec in tasks.items():
        logits, targets = collected["logits"][task], collected["targets"][task]
        counts = (collected["loss_weight"][task] > 0) & collected["any_present"]
        labelled = np.flatnonzero(counts & np.isfinite(logits).all(axis=1))
        kept = labelled[np.linspace(0, len(labelled) - 1, min(MAX_EXAMPLES, len(labelled))).round().astype(int)]
        result[task] = _fit_task(np.asarray(logits[kept], np.float64), targets[kept], spec.kind)
    return result


def _fit_task(logits: np.ndarray, targets: np.ndarray, kind: str) -> Calibration:
    if kind == "regression":
        return Calibration(1.0, np.sort(np.abs(logits[:, 0] - targets)))
    temperature = uncertainty.temperature(logits, targets) if len(targets) else 1.0
    if not uncertainty.MIN_TEMPERATURE * 1.01 < temperature < uncertainty.MAX_TEMPERATURE / 1.01:
        temperature = 1.0
    if kind == "multilabel":
        return Calibration(temperature, np.zeros(0))
    return Calibration(temperature, np.sort(1 - special.softmax(logits, axis=1)[np.arange(len(targets)), targets]))


def to_json(calibration: Mapping[str, Calibration], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of `calibration.json`, fitted with the checkpoint that has this metadata."""
    tasks = {
        task: {"temperature": each.temperature, "scores": [float(f"{score:.8g}") for score in each.scores]}
        for task, each in calibration.items()
    }
    return with_checksum({"step": checkpoint["step"], "checkpoint": checkpoint[CHECKSUM], "tasks": tasks})


def write(
    folder: epath.PathLike, collected: Mapping[str, Any], tasks: Mapping[str, Task], checkpoint: Mapping[str, Any]
) -> None:
    """Fits the calibration to the validation split, and writes `calibration.json`; see `fit` and `to_json`."""
    write_json(epath.Path(folder) / FILE, to_json(fit(collected, tasks), checkpoint))


def from_json(content: Mapping[str, Any], checkpoint: str) -> dict[str, Calibration]:
    """Returns the calibration of the content of `calibration.json`.

    Raises:
      ValueError: it is not what was written, or was fitted with another checkpoint.
    """
    if CHECKSUM in content and not (has_valid_checksum(content) and content["checkpoint"] == checkpoint):
        raise ValueError("not what was written with this checkpoint")  # older versions wrote no checksum
    return {
        task: Calibration(float(each["temperature"]), np.array(each["scores"], np.float64))
        for task, each in content["tasks"].items()
    }
