"""Opens the sources of a config's splits, and says which of their rows each split has."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfusion.data import features, sources
from mmfusion.data.cache import Cache, digest
from mmfusion.data.holdout import fold_values, makes_test, split_ids
from mmfusion.data.modalities import MODALITY_TYPES, feature_names
from mmfusion.data.rows import CachedRows
from mmfusion.data.sources import Source
from mmfusion.data.table_dataset import is_table, open_table_source
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig


def available_name(config: "DataConfig") -> str:
    """Returns the name of the dataset that can be prepared: the config's `name`, or its `fallback_name`."""
    return sources.available_name(config.name, config.fallback_name, data_dir=config.dir, manual_dir=config.manual_dir)


def open_splits(
    config: "DataConfig", name: str, splits: Sequence[str], seed: int, class_names: Mapping[str, Sequence[str]] | None
) -> dict[str, Source]:
    """Returns the source of each split with cached rows; splits with the same TFDS expression share a source.

    Args:
      config: the `data` section of a config.
      name: what `available_name` returned.
      splits: the splits.
      seed: seed of pairings.
      class_names: per task the classes of a saved run; None: a new run.

    Raises:
      UserError: there is no such dataset or split, or it does not have what the config reads.
    """
    if is_table(config.name):
        source = open_table_source(config, class_names)
        _check_features(config, source)
        return dict.fromkeys(splits, source)
    test = config.train if makes_test(config) else config.test
    expressions = {"train": config.train, "valid": config.valid or config.train, "test": test}
    opened = {}
    for expression in dict.fromkeys(expressions[split] for split in splits):
        source = sources.open_source(name, expression, data_dir=config.dir, manual_dir=config.manual_dir, seed=seed)
        _check_features(config, source)
        opened[expression] = dataclasses.replace(source, rows=CachedRows(source.rows))
    return {split: opened[expressions[split]] for split in splits}


def fold_numbers(config: "DataConfig") -> list[int]:
    """Returns the values that `config.fold` may have; empty where the data is not divided into folds.

    Args:
      config: the `data` section of a config.

    Raises:
      UserError: the data is not available, or `fold_by` does not give folds.
    """
    if not config.fold_by:
        return list(range(config.folds))
    return list(fold_values(config, open_splits(config, available_name(config), ("train",), 0, None)["train"]))


def ids_of_splits(
    config: "DataConfig", opened: Mapping[str, Source], row_keys: Mapping[str, Any], cache: Cache
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns what `holdout.split_ids` does, from the cache if it is there."""
    members = {
        split: source.members and digest({name: ids.tolist() for name, ids in source.members.items()})
        for split, source in opened.items()
    }
    classes = [target.feature for target in config.targets.values() if target.kind == "classification"]
    division = [config.folds, config.fold_by, config.fold, config.time, config.test_fraction]
    options = [list(opened), members, config.valid, config.valid_fraction, config.group, division, classes]

    def compute() -> list[Any]:
        ids, notes = split_ids(config, opened)
        return [{split: numbers.tolist() for split, numbers in ids.items()}, list(notes)]

    ids, notes = cache.remember(["ids", *row_keys.values(), options], compute)
    return {split: np.array(numbers) for split, numbers in ids.items()}, tuple(notes)


def _check_features(config: "DataConfig", source: Source) -> None:
    if len(source.rows) == 0:
        raise UserError(f"{source.version} has no examples", path="config.data.name", value=config.name)
    names = sorted(source.rows[0])
    wanted = [
        (f"modalities.{m}", name, section.kind)
        for m, section in config.modalities.items()
        for name in feature_names(section.to_dict())
    ]
    wanted += [(f"targets.{task}", section.feature, "") for task, section in config.targets.items()]
    paths = [(f"config.data.{section}.feature", name, kind) for section, name, kind in wanted]
    if config.weight_feature:
        paths.append(("config.data.weight_feature", config.weight_feature, ""))
    for path, name, kind in paths:
        if name not in names:
            message = f"the dataset {config.name!r} has no such feature"
            raise UserError(message, path=path, value=name, choices=names)
        if kind and name in source.features:
            features.check_takes(source.features[name], kind, MODALITY_TYPES, path, name)
