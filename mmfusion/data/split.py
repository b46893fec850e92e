"""A split: rows decoded in advance where they fit in memory, or as they are read."""

import dataclasses
from collections.abc import Collection

import jax
import numpy as np

from mmfusion.data import rows as row_sequences
from mmfusion.data.batch import Batch
from mmfusion.data.decoding import BadRow, BadTarget, Reader, empty_batch, fill_row
from mmfusion.data.missing import drop_modalities
from mmfusion.data.rows import Rows
from mmfusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class Classes:
    """The rows of each class that has any, for a balanced sampler.

    Attributes:
      positions: the positions `[n]` of a split's rows, sorted by class.
      first: per class the index `[C]` of its first row in `positions`.
      counts: per class the number `[C]` of its rows.
    """

    positions: np.ndarray
    first: np.ndarray
    counts: np.ndarray


def rows_by_class(labels: np.ndarray) -> Classes:
    """Returns the rows of each class, of the class `[n]` of each row."""
    _, first, counts = np.unique(np.sort(labels), return_index=True, return_counts=True)
    return Classes(np.argsort(labels, kind="stable"), first, counts)


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of one split.

    Attributes:
      name: `train`, `valid` or `test`.
      ids: the examples' ids `[n]`, which are their row indices in the source.
      source: the raw rows.
      reader: decodes a raw row.
      arrays: all rows decoded, in the order of `ids`, if the split fits in memory; otherwise None.
      bad: id -> reason, for unreadable rows; they keep their position, with weight 0.
      missing: rate at which each modality of a row is dropped.
      missing_in: the modalities that are dropped; empty: all.
      classes: the rows of each class, where batches are to be balanced; None: every row is read once an epoch.
    """

    name: str
    ids: np.ndarray
    source: Rows
    reader: Reader
    arrays: Batch | None
    bad: dict[int, str]
    missing: float = 0.0
    missing_in: tuple[str, ...] = ()
    classes: Classes | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_labels(self) -> bool:
        """Whether a row has a label."""
        return bool(self.reader.targets.keys() - self.reader.unlabelled)

    def take(self, positions: np.ndarray) -> Batch:
        """Returns the batch of the rows at `positions` `[B]`; -1 gives a padding row with weight 0."""
        if self.arrays is not None:
            return _take(self.arrays, positions)
        return self.decode(positions)

    def subset(self, count: int) -> "Split":
        """Returns a split of at most `count` evenly spaced rows."""
        positions = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        arrays = None if self.arrays is None else _take(self.arrays, positions)
        return dataclasses.replace(self, ids=self.ids[positions], arrays=arrays, classes=None)

    def decode(self, positions: np.ndarray) -> Batch:
        """Returns the decoded rows at `positions` `[B]`; an unreadable row is added to `bad` and has weight 0.

        A row without a label is padding, unless no row of the split has one.
        """
        batch = empty_batch(self.reader, len(positions))
        real = np.flatnonzero(positions >= 0)
        ids = self.ids[positions[real]]
        rows = row_sequences.iterate(self.source, ids)
        for position, row_id, row in zip(real.tolist(), ids.tolist(), rows, strict=True):
            try:
                fill_row(batch, position, row, row_id, self.reader)
            except BadRow as error:
                self.bad[row_id] = str(error)
                batch.id[position] = row_id
            except BadTarget as error:
                message = f"split {self.name!r}, {error}; correct the data or the target"
                raise UserError(message, path="config.data.targets") from error
        return drop_modalities(batch, self.missing, self.missing_in)


def check_bad(split: Split, unreadable: Collection[int], max_fraction: float) -> None:
    """Raises UserError if more than `max_fraction` of a split's rows are unreadable.

    Args:
      split: the split.
      unreadable: the ids of its unreadable rows.
      max_fraction: the tolerated fraction.
    """
    unexplained = sorted({*unreadable} - {*split.bad})
    if unexplained:  # another process read them; read them again for the reason
        split.decode(np.searchsorted(split.ids, unexplained))
    if len(unreadable) > max_fraction * len(split):
        raise UserError(
            f"{len(unreadable)} of {len(split)} rows of split {split.name!r} cannot be read; correct the data or raise "
            f"the limit; the first: {split.bad[min(unreadable)]}",
            path="config.data.max_bad_fraction",
            value=max_fraction,
        )


def _take(arrays: Batch, positions: np.ndarray) -> Batch:
    """Returns the rows at `positions` `[B]` of decoded arrays; -1 gives a padding row."""
    padding = positions < 0
    padded = padding.any()

    def take(array: np.ndarray) -> np.ndarray:
        taken = np.asarray(array).take(positions, axis=0)  # [B, ...]; twice as fast as array[positions]
        if padded:
            taken[padding] = 0
        return taken

    batch = jax.tree.map(take, arrays)
    batch.id[padding] = -1
    return batch
