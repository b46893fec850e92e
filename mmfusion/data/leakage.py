"""What must not be shared by inputs and targets, or by splits: features, stored rows, and copies of rows."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mmfusion.data.holdout import makes_test
from mmfusion.data.modalities import feature_names
from mmfusion.data.modality_type import Options
from mmfusion.data.rows import Rows, content, iterate
from mmfusion.data.sources import Source
from mmfusion.data.table_schema import is_missing
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig

ALLOW = "if that is wanted, set config.data.allow_leakage=true"


def check(config: "DataConfig", opened: Mapping[str, Source]) -> None:
    """Checks that no target is an input and that the splits have no stored row in common, unless the config allows it.

    Args:
      config: the `data` section of a config.
      opened: the source of each split; validation and test rows that are held out of train have its source.

    Raises:
      UserError: a target is an input, or two splits overlap.
    """
    if config.allow_leakage:
        return
    targets = {target.feature: task for task, target in config.targets.items()}
    for modality, section in config.modalities.items():
        for name in feature_names(section.to_dict()):
            if name in targets:
                message = f"is the target of task {targets[name]!r}, too; leave it out of the inputs, or {ALLOW}"
                raise UserError(message, path=f"config.data.modalities.{modality}.feature", value=name)
    of_train = {"valid": not config.valid, "test": makes_test(config)}
    apart = [split for split in opened if not of_train.get(split)]
    for first, second in itertools.combinations(apart, 2):
        if rows := _common(opened[first], opened[second]):
            message = f"has {rows} rows in common with {first}; give splits without common rows, or {ALLOW}"
            raise UserError(message, path=f"config.data.{second}", value=getattr(config, second))


def _common(first: Source, second: Source) -> int:
    """Returns the number of stored rows that two sources have in common."""
    return sum(
        max(0, min(end, other_end) - max(start, other_start))
        for (name, start, end), (other, other_start, other_end) in itertools.product(first.slices, second.slices)
        if name == other
    )


class DigestedRows(Sequence):
    """Rows that note a digest of each modality's raw value as they are read."""

    def __init__(self, rows: Rows, modalities: Mapping[str, Options]):
        self._rows = rows
        self._features = {modality: feature_names(options) for modality, options in modalities.items()}
        self._digests: dict[str, dict[int, int]] = {modality: {} for modality in modalities}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        read = [dict(values) for values in iterate(self._rows, np.array(rows))]
        for row, values in zip(rows, read, strict=True):
            for modality, names in self._features.items():
                self._digests[modality][row] = _digest([values[name] for name in names])
        return read

    def digests(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Returns per modality the digests `[n]` uint64 of rows that have been read, 0 where there is no value."""
        return {m: np.array([seen[i] for i in ids.tolist()], np.uint64) for m, seen in self._digests.items()}


def _digest(values: Sequence[Any]) -> int:
    if all(is_missing(value) for value in values):
        return 0
    digest = xxhash.xxh3_64()
    for part in content(values):
        digest.update(f"{len(part)} ".encode())
        digest.update(part)
    return digest.intdigest()


def duplicates(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Returns how many rows of `second` are exact copies of rows of `first`: in all modalities (`rows`), and in each.

    Args:
      first: per modality the digests `[n]` of one split's rows, see `DigestedRows`.
      second: per modality the digests `[m]` of another split's rows.
    """
    counts = {}
    for modality in second:
        seen = np.isin(second[modality], first[modality]) & (second[modality] != 0)
        counts[modality] = int(seen.sum())
    whole = [np.stack([split[m] for m in sorted(split)], axis=1) for split in (first, second)]  # [n, M], [m, M]
    known = {row.tobytes() for row in whole[0]}
    rows = sum(row.tobytes() in known for row in whole[1] if row.any())
    return {"rows": rows, **counts}
