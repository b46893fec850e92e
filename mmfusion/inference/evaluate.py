"""Metrics of a trained run on a split, with any subset of its modalities."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion.data.trust import name_place
from mmfusion.inference.trained_model import SPLITS, TrainedModel, check_request
from mmfusion.training.restore import open_run, read_config


def evaluate(
    workdir: str | Path,
    split: str = "test",
    modalities: Collection[str] | None = None,
    overrides: Callable[[ConfigDict], None] | None = None,
    *,
    data: str = "",
    data_dir: str | Path = "",
) -> dict[str, Any]:
    """Returns the metrics of a run's best checkpoint on a split of its dataset or of another one.

    Args:
      workdir: the run's directory.
      split, modalities, data: see `TrainedModel.evaluate`.
      overrides: modifies the config in place.
      data_dir: where the dataset is prepared, the run's own or `data`; empty: where the run's own was.

    Raises:
      UserError: no such run, split or modality, or as `TrainedModel.evaluate` does.
    """

    def relocate(config: ConfigDict) -> None:
        if overrides:
            overrides(config)
        if data_dir and not data:
            config.data.dir = str(data_dir)
            name_place(str(data_dir))

    known = read_config(workdir).data.modalities
    check_request(known, split if not data else SPLITS[0], modalities)
    model = TrainedModel(open_run(workdir, [] if data else [split], relocate))
    return model.evaluate(split, modalities, data=data, data_dir=data_dir)
