"""Which rows of a dataset have labels: rows without any are left out, and a split may have none."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from mmfusion.data import rows as row_sequences
from mmfusion.data import targets
from mmfusion.data.modality_type import Options
from mmfusion.data.rows import Rows
from mmfusion.data.sources import Source
from mmfusion.data.split import Split
from mmfusion.errors import UserError

UNKNOWN = -1  # the value of TFDS's class features for an unknown class


def unknown_classes(tasks: Mapping[str, Options], source: Source) -> dict[str, int]:
    """Returns per classification task the class that stands for a missing label, of those read from class features."""
    return {
        task: UNKNOWN
        for task, options in tasks.items()
        if options["kind"] == "classification"
        and options["feature"] in source.features
        and source.features[options["feature"]].form == "class"
    }


def unlabelled_tasks(tasks: Mapping[str, Options], rows: Rows, ids: np.ndarray, split: str) -> frozenset[str]:
    """Returns the tasks that no row of a split has a label of; rows are read until there is one of each.

    Raises:
      UserError: a task has none in the training rows, or no task has any in the validation rows.
    """
    missing = dict(tasks)
    for row in row_sequences.iterate(rows, ids):
        for task, options in list(missing.items()):
            if not targets.is_placeholder(row[options["feature"]], options["kind"]):
                del missing[task]
        if not missing:
            break
    if missing and (split == "train" or (split == "valid" and len(missing) == len(tasks))):
        task, options = next(iter(missing.items()))
        message = f"has no label in any row of split {split!r}; give rows that have one, or another feature"
        raise UserError(message, path=f"config.data.targets.{task}.feature", value=options["feature"])
    return frozenset(missing)


def class_labels(task: str, options: Options, source: Source, ids: np.ndarray, classes: int) -> np.ndarray:
    """Returns the class `[n]` of the rows `ids` `[n]`, also of those that cannot be read; -1 without a label."""
    values = (row[options["feature"]] for row in row_sequences.iterate(source.rows, ids))
    unknown = unknown_classes({task: options}, source).get(task)
    return targets.read_labels(values, options, classes, f"config.data.targets.{task}", unknown)


def drop_unlabelled(split: Split, digests: dict[str, np.ndarray]) -> tuple[Split, dict[str, np.ndarray]]:
    """Returns a decoded split and the digests of its rows without the padding in place of rows without a label."""
    assert split.arrays is not None
    kept = np.asarray(split.arrays.id >= 0)
    if kept.all():
        return split, digests
    arrays, digests = jax.tree.map(lambda x: x[kept], (split.arrays, digests))
    return dataclasses.replace(split, ids=split.ids[kept], arrays=arrays), digests


def notes(splits: Mapping[str, Split], sizes: Mapping[str, int]) -> Iterator[str]:
    """Yields lines about missing labels; of a streamed split, whether it has any.

    Args:
      splits: the splits.
      sizes: their numbers of rows, those without a label included.
    """
    for name, split in splits.items():
        if not split.has_labels:
            yield f"{name}: no row has a label; it can be predicted, not evaluated"
            continue
        if dropped := sizes[name] - len(split):
            yield f"{name}: {dropped:,} of {sizes[name]:,} rows have no label and are left out"
        if split.arrays is None:
            continue
        for task, labelled in split.arrays.labelled.items():
            missing = int(np.sum((split.arrays.weight > 0) & ~labelled))
            if missing:
                yield f"{name}: {missing:,} of {len(split):,} rows have no label of {task!r}"
