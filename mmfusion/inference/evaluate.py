"""Metrics of a trained run on a split, with any subset of its modalities."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion.errors import UserError, nearest
from mmfusion.training.evaluation import collect, score
from mmfusion.training.restore import open_run, read_config


def evaluate(
    workdir: str | Path,
    split: str = "test",
    modalities: Collection[str] | None = None,
    overrides: Callable[[ConfigDict], None] | None = None,
) -> dict[str, Any]:
    """Returns the metrics of a run's best checkpoint on a split, with only `modalities` present (None: all).

    Raises:
      UserError: no such run, split or modality.
    """
    if split not in ("train", "valid", "test"):
        raise UserError(f"split {split!r}: {nearest(split, ('train', 'valid', 'test'))}")
    known = read_config(workdir).data.modalities
    for m in modalities or ():
        if m not in known:
            raise UserError(f"modality {m!r} is not in this run: {nearest(m, known)}")
    run = open_run(workdir, [split], overrides)
    rows = collect(
        run.parts.eval_step(),
        run.state,
        run.dataset.splits[split],
        run.parts,
        batch_size=run.config.batch_size,
        workers=run.config.data.workers,
        modalities=modalities,
        max_bad_fraction=run.config.data.max_bad_fraction,
    )
    return {
        "split": split,
        "modalities": sorted(modalities or known),
        "step": run.step,
        **score(rows, run.parts.tasks),
    }
