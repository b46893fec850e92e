"""Which rows are in which split: validation rows are held out of train by group, see `config.data.group`."""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfusion.data.rows import PairedRows, Rows, uncached
from mmfusion.data.sources import Source
from mmfusion.data.text import as_string
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig


def split_ids(config: "DataConfig", opened: Mapping[str, Source]) -> dict[str, np.ndarray]:
    """Returns the ids `[n]` of each split; without `config.valid`, validation rows are held out of train."""

    @functools.cache
    def held_out(rows: Rows) -> np.ndarray:
        return holdout_split(_groups(rows, config.group), config.valid_fraction)

    result = {}
    for split, source in opened.items():
        ids = np.arange(len(source.rows))
        if not config.valid and split != "test":
            mask = held_out(source.rows)
            ids = ids[mask if split == "valid" else ~mask]
        if len(ids) == 0:
            raise UserError(
                f"split {split!r} of {config.name!r} is empty; correct the expression or valid_fraction",
                path=f"config.data.{split}",
                value=getattr(config, split) or None,
            )
        result[split] = ids
    return result


def holdout_split(groups: Iterable[Any], fraction: float) -> np.ndarray:
    """Returns the mask `[n]` of the rows held out for validation, by a platform-independent hash of their groups."""

    def uniform(group: Any) -> float:
        return int.from_bytes(hashlib.blake2b(str(group).encode(), digest_size=8).digest(), "big") / 2**64

    return np.array([uniform(group) < fraction for group in groups], bool)


def _groups(rows: Rows, feature: str) -> Iterable[Any]:
    if not feature:  # pairs are grouped by the row of the second dataset, which several pairs may share
        stored = uncached(rows)
        return stored.partner if isinstance(stored, PairedRows) else range(len(rows))
    if feature not in rows[0]:
        raise UserError("no such feature", path="config.data.group", value=feature, choices=rows[0])
    return [as_string(rows[i][feature]) for i in range(len(rows))]
