"""Metrics of a trained run on a split, with any subset of its modalities."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion.inference.trained_model import TrainedModel, check_request
from mmfusion.training.restore import open_run, read_config


def evaluate(
    workdir: str | Path,
    split: str = "test",
    modalities: Collection[str] | None = None,
    overrides: Callable[[ConfigDict], None] | None = None,
) -> dict[str, Any]:
    """Returns the metrics of a run's best checkpoint on a split.

    Args:
      workdir: the run's directory.
      split: `train`, `valid` or `test`.
      modalities: modalities to keep; the others count as absent. None keeps all.
      overrides: modifies the config in place, such as `data.dir`.

    Raises:
      UserError: no such run, split or modality.
    """
    check_request(read_config(workdir).data.modalities, split, modalities)
    return TrainedModel(open_run(workdir, [split], overrides)).evaluate(split, modalities)
