"""What the chosen checkpoint gives for every row of validation and test, kept with the run for analyses by example."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mmfusion.files import write_bytes
from mmfusion.objectives import Task

FILE = "outputs.npz"


def write(folder: epath.PathLike, rows: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task]) -> None:
    """Writes `outputs.npz`: `SPLIT/id` `[n]`, and of each task `SPLIT/TASK/output`, `target` and `weight`.

    Outputs are logits `[n, C]`, or of a regression values `[n]` in its own units, float32. Rows are in the order of
    their ids, without those that have no modality, which do not count in a score.

    Args:
      folder: of the run.
      rows: split -> what `evaluation.collect` returned.
      tasks: of the run.
    """
    arrays = {}
    for split, collected in rows.items():
        kept = np.flatnonzero(collected["any_present"])
        kept = kept[np.argsort(collected["id"][kept], kind="stable")]
        arrays[f"{split}/id"] = collected["id"][kept]
        for task, spec in tasks.items():
            output, target = collected["logits"][task][kept], collected["targets"][task][kept]
            if spec.kind == "regression":
                output, target = spec.scale.invert(output[:, 0]), spec.scale.invert(target)
            weight = collected["metric_weight"][task][kept]
            for name, array in (("output", output.astype(np.float32)), ("target", target), ("weight", weight)):
                arrays[f"{split}/{task}/{name}"] = array
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(epath.Path(folder) / FILE, content.getvalue())


def read(folder: epath.PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays of a run's `outputs.npz`; empty if it has none, as runs of earlier versions."""
    path = epath.Path(folder) / FILE
    if not path.exists():
        return {}
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
