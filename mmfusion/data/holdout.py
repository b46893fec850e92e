"""Which rows are in which split: validation rows are held out of train by group and stratified by class."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfusion.data.rows import PairedRows, Rows, uncached
from mmfusion.data.sources import Source
from mmfusion.data.text import as_string
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig

MIN_GROUPS = 5  # a class with so many groups has some of them in each part
STRATIFIED_ROWS = 100_000  # above, labels are not read in advance, and chance keeps the classes' shares


def split_ids(config: "DataConfig", opened: Mapping[str, Source]) -> dict[str, np.ndarray]:
    """Returns the ids `[n]` of each split; without `config.valid`, validation rows are held out of train."""

    @functools.cache
    def held_out(rows: Rows) -> np.ndarray:
        ids = members(opened["train" if "train" in opened else "valid"])
        held = np.zeros(len(rows), bool)
        held[ids] = holdout_split(_groups(rows, ids, config.group), config.valid_fraction, _classes(rows, ids, config))
        return held

    def members(source: Source) -> np.ndarray:
        return np.arange(len(source.rows)) if source.members is None else source.members["train"]

    result = {}
    for split, source in opened.items():
        if not config.valid and split != "test":
            ids, mask = members(source), held_out(source.rows)
            ids = ids[mask[ids] if split == "valid" else ~mask[ids]]
        else:
            ids = np.arange(len(source.rows)) if source.members is None else source.members[split]
        if len(ids) == 0:
            raise UserError(
                f"split {split!r} of {config.name!r} is empty; correct the expression or valid_fraction",
                path=f"config.data.{split}",
                value=getattr(config, split) or None,
            )
        result[split] = ids
    return result


def holdout_split(groups: Iterable[Any], fraction: float, classes: Sequence[Any] | None = None) -> np.ndarray:
    """Returns the mask `[n]` of the rows held out for validation: about `fraction` of the groups of each class.

    The groups of a class are taken in the order of a platform-independent hash of their names, so that a larger
    fraction contains a smaller one. A class with `MIN_GROUPS` groups or more has at least one in each part, and so has
    the whole from two groups on.

    Args:
      groups: the group of each row.
      fraction: from 0 to 1.
      classes: the class of each row, of which a group has the most frequent; None: all the same.
    """
    names = [str(group) for group in groups]
    members: dict[str, Counter] = {}
    for name, label in zip(names, [0] * len(names) if classes is None else classes, strict=True):
        members.setdefault(name, Counter())[label] += 1
    strata: dict[Any, list[str]] = {}
    for name in sorted(members, key=_uniform):
        strata.setdefault(min(members[name].items(), key=lambda item: (-item[1], str(item[0])))[0], []).append(name)
    held_out = {name for stratum in strata.values() for name in stratum[: _share(len(stratum), fraction)]}
    if not held_out and fraction and len(members) > 1:  # every class is small
        held_out = {min(members, key=_uniform)}
    return np.array([name in held_out for name in names], bool)


def _share(count: int, fraction: float) -> int:
    """Returns how many of `count` groups are held out."""
    share = int(count * fraction + 0.5)
    return min(max(share, 1), count - 1) if count >= MIN_GROUPS and fraction else share


def _uniform(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _classes(rows: Rows, ids: np.ndarray, config: "DataConfig") -> list[str] | None:
    """Returns the class of each row in the first classification task; None without one, or of many rows."""
    features = [target.feature for target in config.targets.values() if target.kind == "classification"]
    if not features or len(ids) > STRATIFIED_ROWS:
        return None
    return [str(rows[i][features[0]]) for i in ids.tolist()]


def _groups(rows: Rows, ids: np.ndarray, feature: str) -> Iterable[Any]:
    if not feature:  # pairs are grouped by the row of the second dataset, which several pairs may share
        stored = uncached(rows)
        return stored.partner if isinstance(stored, PairedRows) else ids.tolist()
    if feature not in rows[0]:
        raise UserError("no such feature", path="config.data.group", value=feature, choices=rows[0])
    return [as_string(rows[i][feature]) for i in ids.tolist()]
