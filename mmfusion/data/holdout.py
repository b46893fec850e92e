"""Which rows are in which split: test and validation rows are held out of train, by fold, by time or by group."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfusion.data import folds
from mmfusion.data.rows import PairedRows, Rows, feature_values, uncached
from mmfusion.data.sources import Source
from mmfusion.data.table import canonical
from mmfusion.data.text import as_string
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig

MIN_GROUPS = 5  # a class with so many groups has some of them in each part
STRATIFIED_ROWS = 100_000  # above, labels are not read in advance, and chance keeps the classes' shares
OWN_TEST = "a test split of the dataset's own is not used"


def makes_test(config: "DataConfig") -> bool:
    """Returns whether the test split is made of rows of train, and an own test split of the dataset is not read."""
    return bool(config.folds or config.fold_by or config.time)


def split_ids(config: "DataConfig", opened: Mapping[str, Source]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the ids `[n]` of each split, and lines that say how test and validation rows were held out of train.

    Without `config.valid`, validation rows are held out of train, and with folds or a time the test rows.
    """
    made = [
        split for split in opened if split == "train" or (makes_test(config) if split == "test" else not config.valid)
    ]
    divided, notes = {}, ()
    if made and (makes_test(config) or not config.valid):
        source = opened[made[0]]  # they all have the source of train
        divided, notes = _divide(source.rows, _members(source, "train"), config)
    result = {}
    for split, source in opened.items():
        ids = divided[split] if split in made and divided else _members(source, split)
        if len(ids) == 0:
            raise UserError(
                f"split {split!r} of {config.name!r} is empty; correct the expression or valid_fraction",
                path=f"config.data.{split}",
                value=getattr(config, split) or None,
            )
        result[split] = ids
    return result, notes


def fold_values(config: "DataConfig", source: Source) -> dict[int, str]:
    """Returns the number and the value of each fold of `config.fold_by`.

    Args:
      config: the `data` section of a config.
      source: the source of train.
    """
    ids = _members(source, "train")
    return folds.given_folds(_values(source.rows, ids, config.fold_by, "fold_by"), ids.tolist(), config.fold_by)[1]


def _members(source: Source, split: str) -> np.ndarray:
    return np.arange(len(source.rows)) if source.members is None else source.members[split]


def _divide(rows: Rows, ids: np.ndarray, config: "DataConfig") -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the ids of train, and of the splits held out of it, and a line on the test split."""
    if config.time:
        return _divide_by_time(rows, ids, config)
    result, notes = {}, ()
    if makes_test(config):
        fold, note = _folds(rows, ids, config)
        result["test"], ids = ids[fold == config.fold], ids[fold != config.fold]
        notes = (f"test is {len(result['test']):,} rows of train, {note}; {OWN_TEST}",)
    if not config.valid:
        held = holdout_split(_groups(rows, ids, config.group), config.valid_fraction, _classes(rows, ids, config))
        result["valid"], ids = ids[held], ids[~held]
    return {**result, "train": ids}, notes


def _folds(rows: Rows, ids: np.ndarray, config: "DataConfig") -> tuple[np.ndarray, str]:
    """Returns the fold `[n]` of each row, and what the chosen one is."""
    if not config.fold_by:
        classes = _classes(rows, ids, config)
        note = f"fold {config.fold} of {config.folds}" + (", stratified by class" if classes else "")
        note += f", by groups of {config.group!r}" if config.group else ""
        return folds.equal_folds(_groups(rows, ids, config.group), config.folds, classes), note
    values = _values(rows, ids, config.fold_by, "fold_by")
    fold, names = folds.given_folds(values, ids.tolist(), config.fold_by)
    if config.fold not in names:
        message = f"no such fold of {config.fold_by!r}"
        raise UserError(message, path="config.data.fold", value=config.fold, choices=map(str, names))
    if config.group and not config.allow_leakage:
        first: dict[str, int] = {}
        for group, number in zip(_groups(rows, ids, config.group), fold.tolist(), strict=True):
            if first.setdefault(str(group), number) != number:
                message = f"{group!r} has rows in folds {first[str(group)]} and {number} of {config.fold_by!r}"
                raise UserError(message, path="config.data.group", value=config.group)
    return fold, f"with {config.fold_by!r} {names[config.fold]!r}, fold {config.fold} of {len(names)}"


def _divide_by_time(rows: Rows, ids: np.ndarray, config: "DataConfig") -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    values = _values(rows, ids, config.time, "time")
    times = folds.times(values, ids.tolist(), config.time)
    test = folds.latest(times, config.test_fraction, kept=2)
    rest = np.flatnonzero(~test)
    late = folds.latest([times[i] for i in rest], config.valid_fraction, kept=1)
    parts = {"train": rest[~late], "valid": rest[late], "test": np.flatnonzero(test)}
    starts = {split: as_string(values[min(part, key=times.__getitem__)]) for split, part in parts.items()}
    note = f"train, valid and test are in the order of {config.time!r}: valid is {len(parts['valid']):,} rows from "
    note += f"{starts['valid']} on, test {len(parts['test']):,} rows from {starts['test']} on; {OWN_TEST}"
    return {split: ids[part] for split, part in parts.items()}, (note,)


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
    stratified = folds.strata(names, classes)
    held_out = {name for stratum in stratified.values() for name in stratum[: _share(len(stratum), fraction)]}
    if not held_out and fraction and len(set(names)) > 1:  # every class is small
        held_out = {min(names, key=folds.hash_order)}
    return np.array([name in held_out for name in names], bool)


def _share(count: int, fraction: float) -> int:
    """Returns how many of `count` groups are held out."""
    share = int(count * fraction + 0.5)
    return min(max(share, 1), count - 1) if count >= MIN_GROUPS and fraction else share


def _classes(rows: Rows, ids: np.ndarray, config: "DataConfig") -> list[str] | None:
    """Returns the class of each row in the first classification task; None without one, or of many rows."""
    features = [target.feature for target in config.targets.values() if target.kind == "classification"]
    if not features or len(ids) > STRATIFIED_ROWS:
        return None
    return [str(value) for value in feature_values(rows, ids, features[0])]


def _groups(rows: Rows, ids: np.ndarray, feature: str) -> Iterable[Any]:
    if not feature:  # pairs are grouped by the row of the second dataset, which several pairs may share
        stored = uncached(rows)
        return stored.partner[ids] if isinstance(stored, PairedRows) else ids.tolist()
    return [canonical(value) for value in _values(rows, ids, feature, "group")]


def _values(rows: Rows, ids: np.ndarray, feature: str, key: str) -> list[Any]:
    """Returns a feature's values in the given rows; `key` is the config key that names it."""
    if feature not in rows[0]:
        raise UserError("no such feature", path=f"config.data.{key}", value=feature, choices=rows[0])
    return feature_values(rows, ids, feature)
