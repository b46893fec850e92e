"""Opens the dataset of a config: its splits, read in batches, and the description that a run saves of its data."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfusion.data import features, fitting, labels, leakage, sources, summary, targets
from mmfusion.data import rows as row_sequences
from mmfusion.data.cache import Cache, open_cache, source_key
from mmfusion.data.decoded import decode
from mmfusion.data.decoding import Reader
from mmfusion.data.holdout import fold_values, makes_test, split_ids
from mmfusion.data.modalities import MODALITY_TYPES, feature_names, modality_type
from mmfusion.data.modality_type import Options
from mmfusion.data.rows import CachedRows, uncached
from mmfusion.data.sources import Source
from mmfusion.data.split import Split, rows_by_class
from mmfusion.data.table_dataset import is_table, open_table_source
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits by name, and the description of the data for the model and the run directory.

    Attributes:
      splits: `train`, `valid`, `test`, or the requested ones.
      reader: decodes raw rows.
      class_names: per task; empty for regression.
      fitted: per modality its state fitted to the training rows, as a string: a tokenizer, or the columns of a table.
      fingerprint: digest of the sources, their splits, and the options of modalities and targets.
      rows: digest of the sources and their splits.
      content: per split, a checksum of some of its source's rows as stored.
      name: the dataset in use: the config's `name` or `fallback_name`.
      class_weights: per task with `class_weights="balanced"` the weight of each class.
      notes: lines about the data that a new run prints: how rows were held out, copies in several splits, unknown
        values.
      rejected: rows that cannot be read: (id, modality or empty, reason).
    """

    splits: dict[str, Split]
    reader: Reader
    class_names: dict[str, tuple[str, ...]]
    fitted: dict[str, str]
    fingerprint: str
    rows: str
    content: dict[str, str]
    name: str
    notes: tuple[str, ...] = ()
    rejected: tuple[tuple[int, str, str], ...] = ()
    class_weights: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def encoder_kwargs(self) -> dict[str, dict[str, Any]]:
        """Returns per modality the encoder arguments that depend on the data, such as `vocabulary` for text."""
        fitted = self.reader.fitted
        return {
            modality: modality_type(options["kind"]).encoder_kwargs(options, fitted.get(modality))
            for modality, options in self.reader.modalities.items()
        }

    def check_unchanged(self, saved: dict[str, Any], workdir: str) -> None:
        """Raises UserError if the data differs from that of the run in `workdir`, whose description is `saved`."""
        now, before = self.saved(), saved["content"]
        description_changed = any(saved[key] != now[key] for key in now if key in saved and key != "content")
        # Test rows may change, as no state depends on them.
        if description_changed or any(before[split] != self.content[split] for split in before if split != "test"):
            raise UserError(
                f"the data has changed since it was started (fingerprint {saved['fingerprint']}, now "
                f"{self.fingerprint}; rows {before}, now {self.content}): restore the data, or give another --workdir",
                path=workdir,
            )

    def saved(self) -> dict[str, Any]:
        """Returns the description that a run saves of its data, as JSON values; see `saved` of `load`."""
        return {
            "class_names": {task: list(names) for task, names in self.class_names.items()},
            "learned": self.fitted,  # the key of the file format
            "fingerprint": self.fingerprint,
            "content": self.content,
            "name": self.name,
            "feature_classes": {name: list(names) for name, names in self.reader.class_names.items()},
            "class_weights": {task: list(weights) for task, weights in self.class_weights.items()},
            "scales": {task: dataclasses.asdict(scale) for task, scale in self.reader.scales.items()},
        }


def load(
    config: "DataConfig",
    *,
    seed: int,
    splits: Sequence[str] = ("train", "valid", "test"),
    saved: Mapping[str, Any] | None = None,
) -> Dataset:
    """Opens a dataset: prepares it if needed, splits it, checks it and, if it fits in memory, decodes it.

    Args:
      config: the `data` section of a config.
      seed: seed of pairings; the validation split does not depend on it.
      splits: names of the splits to return.
      saved: `Dataset.saved()` of an existing run; None: a new run, for which vocabularies are fitted.

    Raises:
      UserError: the data is not available, does not match the config, or has too many unreadable rows.
    """
    modalities = {m: section.to_dict() for m, section in config.modalities.items()}
    tasks = {task: section.to_dict() for task, section in config.targets.items()}
    name = (saved or {}).get("name") or _available_name(config)
    needed = list(dict.fromkeys([*splits, *(() if saved else ("train",))]))
    opened = _open(config, name, needed, seed, saved)
    leakage.check(config, opened)
    cache = open_cache(config.cache)
    row_keys = {split: source_key(source, modalities) if cache.folder else None for split, source in opened.items()}
    ids, division_notes = _split_ids(config, opened, row_keys, cache)

    def class_labels(task: str, rows: np.ndarray) -> np.ndarray:
        count = len(class_names[task])
        key = ["labels", row_keys["train"], _digest(rows.tolist()), tasks[task], class_names[task]]
        return np.array(
            cache.remember(key, lambda: labels.class_labels(task, tasks[task], opened["train"], rows, count).tolist())
        )

    if saved:
        class_names = {task: tuple(names) for task, names in saved["class_names"].items()}
        fitted = dict(saved["learned"])
        feature_classes = {name: tuple(names) for name, names in saved.get("feature_classes", {}).items()}
        scales = {task: targets.Scale(**scale) for task, scale in saved.get("scales", {}).items()}
        class_weights = {task: tuple(weights) for task, weights in saved.get("class_weights", {}).items()}
        _check_classes(config, tasks, modalities, opened, class_names, feature_classes)
    else:
        class_names = _class_names(tasks, opened["train"].class_names)
        feature_classes = fitting.feature_classes(modalities, opened["train"])
        key = ["fitted", row_keys["train"], _digest(ids["train"].tolist()), modalities, tasks]
        fitted, scales = cache.remember(key, lambda: fitting.fit(modalities, tasks, opened["train"], ids["train"]))
        scales = {task: targets.Scale(**scale) for task, scale in scales.items()}
        class_weights = {}
        for task, options in tasks.items():
            if targets.is_balanced(options):
                classes = class_labels(task, ids["train"])
                class_weights[task] = targets.balanced_weights(classes[classes >= 0], len(class_names[task]))
    reader = Reader(
        modalities=modalities,
        targets={task: _with_encoding(task, options, opened, class_names) for task, options in tasks.items()},
        outputs={task: len(names) or 1 for task, names in class_names.items()},
        fitted={m: modality_type(modalities[m]["kind"]).load(string) for m, string in fitted.items()},
        class_names=feature_classes,
        scales=scales,
        weight_feature=config.weight_feature,
        unknown_class=labels.unknown_classes(tasks, next(iter(opened.values()))) if opened else {},
    )
    described_rows = [
        {split: opened[split].version for split in sorted(needed)},
        {split: _digest(ids[split].tolist()) for split in sorted(needed)},
    ]
    read = {}
    for split in splits:
        unlabelled = labels.unlabelled_tasks(tasks, opened[split].rows, ids[split], split)
        own = dataclasses.replace(reader, unlabelled=unlabelled)
        read[split] = Split(split, ids[split], uncached(opened[split].rows), own, None, {}, _missing(config, split))
    keys = {split: _decoded_key(read[split], row_keys[split], fitted) for split in splits}
    decoded, digests = decode(read, keys, {split: opened[split].rows for split in splits}, config, cache)
    if config.sampler == targets.BALANCED and "train" in decoded:
        task = next(task for task, options in tasks.items() if options["kind"] == "classification")
        classes = rows_by_class(class_labels(task, decoded["train"].ids))
        decoded["train"] = dataclasses.replace(decoded["train"], classes=classes)
    about_labels = labels.notes(decoded, {split: len(numbers) for split, numbers in ids.items()})
    return Dataset(
        splits=decoded,
        notes=()
        if saved
        else (*opened["train"].notes, *division_notes, *about_labels, *summary.notes(config, decoded, digests, reader)),
        rejected=_rejected(opened, decoded),
        class_weights=class_weights,
        reader=reader,
        class_names=class_names,
        fitted=fitted,
        fingerprint=_digest([*described_rows, reader.modalities, reader.targets]),
        rows=_digest(described_rows),
        content={split: row_sequences.checksum(uncached(opened[split].rows)) for split in sorted(needed)},
        name=name,
    )


def fold_numbers(config: "DataConfig") -> list[int]:
    """Returns the values that `config.fold` may have; empty where the data is not divided into folds.

    Args:
      config: the `data` section of a config.

    Raises:
      UserError: the data is not available, or `fold_by` does not give folds.
    """
    if not config.fold_by:
        return list(range(config.folds))
    return list(fold_values(config, _open(config, _available_name(config), ("train",), 0, None)["train"]))


def _available_name(config: "DataConfig") -> str:
    return sources.available_name(config.name, config.fallback_name, data_dir=config.dir, manual_dir=config.manual_dir)


def _open(
    config: "DataConfig", name: str, splits: Sequence[str], seed: int, saved: Mapping[str, Any] | None
) -> dict[str, Source]:
    """Returns the source of each split with cached rows; splits with the same TFDS expression share a source."""
    if is_table(config.name):
        source = open_table_source(config, saved["class_names"] if saved else None)
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


def _rejected(opened: Mapping[str, Source], splits: Mapping[str, Split]) -> tuple[tuple[int, str, str], ...]:
    rejected = {(row, "", reason) for source in opened.values() for row, reason in source.rejected.items()}
    for split in splits.values():
        for row, reason in split.bad.items():  # "row 7, image: not an image"
            modality, _, message = reason.partition(", ")[2].partition(": ")
            rejected.add((row, modality, message))
    return tuple(sorted(rejected))


def _digest(description: Any) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


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


def _with_encoding(
    task: str, options: Options, opened: Mapping[str, Source], class_names: Mapping[str, Sequence[str]]
) -> Options:
    """Returns the options of a target, with the encoding of a multi-label target that the dataset tells."""
    if options["kind"] != "multilabel" or not opened:
        return options
    stored = next(iter(opened.values())).features.get(options["feature"])
    path = f"config.data.targets.{task}"
    return {**options, "encoding": targets.encoding(stored, options, len(class_names[task]), path)}


def _class_names(
    tasks: Mapping[str, Options], feature_class_names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    class_names: dict[str, tuple[str, ...]] = {}
    for task, options in tasks.items():
        names, count = feature_class_names.get(options["feature"], ()), options.get("classes", 0)
        if options["kind"] == "regression":
            names = ()
        elif count and names and len(names) != count:
            raise UserError(
                f"must be 0 or {len(names)}, the number of the dataset's classes",
                path=f"config.data.targets.{task}.classes",
                value=count,
            )
        elif not (names or count):
            raise UserError(
                "must be the number of classes, as the dataset does not define it",
                path=f"config.data.targets.{task}.classes",
                value=count,
            )
        else:
            names = names or tuple(str(i) for i in range(count))
        class_names[task] = names
    return class_names


def _split_ids(
    config: "DataConfig", opened: Mapping[str, Source], row_keys: Mapping[str, Any], cache: Cache
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns what `split_ids` does, from the cache if it is there."""
    members = {
        split: source.members and _digest({name: ids.tolist() for name, ids in source.members.items()})
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


def _missing(config: "DataConfig", split: str) -> float:
    return config.missing if split == "train" else 0.0


def _decoded_key(split: Split, row_key: Any, fitted: Mapping[str, str]) -> list[Any]:
    """Returns what the decoded rows of a split depend on; augmentation is done later, on the device."""
    reader = split.reader
    modalities = {
        m: {name: value for name, value in options.items() if name != "augment"}
        for m, options in reader.modalities.items()
    }
    scales = {task: dataclasses.asdict(scale) for task, scale in reader.scales.items()}
    described = [modalities, reader.targets, reader.outputs, fitted, reader.class_names, scales, reader.weight_feature]
    described += [reader.unknown_class, sorted(reader.unlabelled)]
    return ["decoded", row_key, split.name, _digest(split.ids.tolist()), split.missing, described]


def _check_classes(
    config: "DataConfig",
    tasks: Mapping[str, Options],
    modalities: Mapping[str, Options],
    opened: Mapping[str, Source],
    class_names: Mapping[str, Sequence[str]],
    feature_classes: Mapping[str, Sequence[str]],
) -> None:
    """Raises UserError where a source's classes have other names, or another order, than those of the saved run."""
    for source in opened.values():
        expected = {name: (f"the feature {name!r}", names) for name, names in feature_classes.items()}
        for task, names in class_names.items():
            if names:  # no regression
                expected[tasks[task]["feature"]] = (f"the target {task!r}", names)
        for feature, (owner, names) in expected.items():
            found = source.class_names.get(feature, names)
            if tuple(found) != tuple(names):
                raise UserError(
                    f"{source.version} has the classes {_shortened(found)} of {owner}, and the run was trained on "
                    f"{_shortened(names)}; prepare it with the same classes in the same order",
                    path="config.data.name",
                    value=config.name,
                )


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
