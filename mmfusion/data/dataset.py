"""Opens the dataset of a config: its splits, read in batches, and the description that a run saves of its data."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfusion.data import class_order, content, fitting, labels, leakage, summary, targets, trust
from mmfusion.data.cache import OFF, digest, open_cache, source_key
from mmfusion.data.decoded import decode
from mmfusion.data.decoding import Reader
from mmfusion.data.modalities import modality_type
from mmfusion.data.modality_type import Options
from mmfusion.data.opening import available_name, ids_of_splits, open_splits
from mmfusion.data.rows import Rows, uncached
from mmfusion.data.sources import Source
from mmfusion.data.split import Split, rows_by_class
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
      content: per split, a checksum of its source's rows as stored.
      name: the dataset in use: the config's `name` or `fallback_name`.
      class_weights: per task with `class_weights="balanced"` the weight of each class.
      keys: per split and modality what its decoded inputs follow from, see `Cache.path`.
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
    keys: dict[str, dict[str, list[Any]]] = dataclasses.field(default_factory=dict)

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
        now["class_names"] |= {  # older versions had numbers in place of the names of a list of classes
            task: names for task, names in saved["class_names"].items() if self._is_unnamed(task, names)
        }
        changed = [key for key in now if key in saved and key != "content" and saved[key] != now[key]]
        changed += [
            f"rows of {split}"
            for split in before
            if split != "test"  # its rows may change, as no state depends on them
            and not content.matches(before[split], self.content[split], self.splits[split].source)
        ]
        if changed:
            raise UserError(
                f"the data has changed since it was started: {', '.join(changed)} (fingerprint {saved['fingerprint']}, "
                f"now {self.fingerprint}; rows {before}, now {self.content}): restore the data, or give another "
                "--workdir",
                path=workdir,
            )

    def _is_unnamed(self, task: str, names: Sequence[str]) -> bool:
        kind = self.reader.targets[task]["kind"] if task in self.reader.targets else ""
        return kind == "multilabel" and class_order.is_unnamed(names) and len(names) == len(self.class_names[task])

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

    def described(self) -> dict[str, Any]:
        """Returns what `result.json` says of the data."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "content": self.content,
            "examples": {name: len(split) for name, split in self.splits.items()},
            "unreadable": {name: sorted(split.bad.values()) for name, split in self.splits.items()},
        }

    def identity(self) -> dict[str, str]:
        """Returns a text for each thing that all hosts of a run must share: its rows, classes and fitted states."""
        saved = self.saved()
        return {
            "data": f"{self.name}, fingerprint {self.fingerprint}",
            **{f"rows of {split}": checksum for split, checksum in self.content.items()},
            **{f"vocabulary or columns of {m}": digest(state) for m, state in self.fitted.items()},
            **{key: digest(saved[key]) for key in ("class_names", "feature_classes", "class_weights", "scales")},
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
    name = (saved or {}).get("name") or available_name(config)
    if saved and name not in (config.name, config.fallback_name):
        raise UserError(f"the run was trained on {name!r}, which its config does not name", path="config.data.name")
    if saved is None:  # a config of the user
        for _, place in trust.places(vars(config)):
            trust.name_place(place)
    elif splits:
        trust.check_places(vars(config))
    needed = list(dict.fromkeys([*splits, *(() if saved else ("train",))]))
    stored = open_splits(config, name, needed, seed, saved["class_names"] if saved else None)
    leakage.check(config, stored)
    opened = class_order.match(config, tasks, stored, fitting.restore(saved)) if saved else stored
    cache = open_cache(config.cache if splits or not saved else OFF)
    row_keys = {split: source_key(source, modalities) if cache.folder else None for split, source in opened.items()}
    ids, division_notes = ids_of_splits(config, opened, row_keys, cache)
    if saved:
        fitted = fitting.restore(saved)
    else:
        fitted = fitting.fit(modalities, tasks, opened["train"], ids["train"], cache, row_keys["train"])
    reader = Reader(
        modalities=modalities,
        targets={task: _with_encoding(task, options, opened, fitted.class_names) for task, options in tasks.items()},
        outputs={task: len(names) or 1 for task, names in fitted.class_names.items()},
        fitted={m: modality_type(modalities[m]["kind"]).load(string) for m, string in fitted.states.items()},
        class_names=fitted.feature_classes,
        scales=fitted.scales,
        weight_feature=config.weight_feature,
        unknown_class=labels.unknown_classes(tasks, next(iter(opened.values()))) if opened else {},
    )
    described_rows = [
        {split: opened[split].version for split in sorted(needed)},
        {split: digest(ids[split].tolist()) for split in sorted(needed)},
    ]
    read = {
        split: _undecoded(split, ids[split], opened[split].rows, reader, config if split == "train" else None)
        for split in splits
    }
    keys = {split: _decoded_key(read[split], row_keys[split], fitted.states) for split in splits}
    decoded, digests = decode(read, keys, {split: opened[split].rows for split in splits}, config, cache)
    if config.sampler == targets.BALANCED and "train" in decoded:
        task, options = next((t, options) for t, options in tasks.items() if options["kind"] == "classification")
        classes = fitting.class_labels(
            task, options, opened["train"], decoded["train"].ids, fitted.class_names[task], cache, row_keys["train"]
        )
        decoded["train"] = dataclasses.replace(decoded["train"], classes=rows_by_class(classes))
    about_labels = labels.notes(decoded, {split: len(numbers) for split, numbers in ids.items()})
    return Dataset(
        splits=decoded,
        notes=()
        if saved
        else (*opened["train"].notes, *division_notes, *about_labels, *summary.notes(config, decoded, digests, reader)),
        rejected=_rejected(opened, decoded),
        class_weights=fitted.class_weights,
        reader=reader,
        class_names=fitted.class_names,
        fitted=fitted.states,
        fingerprint=digest([*described_rows, reader.modalities, reader.targets]),
        rows=digest(described_rows),
        keys={
            name: {m: _input_key(split, m, opened[name], fitted.states.get(m)) for m in modalities}
            for name, split in decoded.items()
        },
        content=content.checksums({split: stored[split] for split in sorted(needed)}, cache),
        name=name,
    )


def _rejected(opened: Mapping[str, Source], splits: Mapping[str, Split]) -> tuple[tuple[int, str, str], ...]:
    rejected = {(row, "", reason) for source in opened.values() for row, reason in source.rejected.items()}
    for split in splits.values():
        for row, reason in split.bad.items():  # "row 7, image: not an image"
            modality, _, message = reason.partition(", ")[2].partition(": ")
            rejected.add((row, modality, message))
    return tuple(sorted(rejected))


def _with_encoding(
    task: str, options: Options, opened: Mapping[str, Source], class_names: Mapping[str, Sequence[str]]
) -> Options:
    """Returns the options of a target, with the encoding of a multi-label target that the dataset tells."""
    if options["kind"] != "multilabel" or not opened:
        return options
    stored = next(iter(opened.values())).features.get(options["feature"])
    path = f"config.data.targets.{task}"
    return {**options, "encoding": targets.encoding(stored, options, len(class_names[task]), path)}


def _undecoded(name: str, ids: np.ndarray, rows: Rows, reader: Reader, missing: "DataConfig | None") -> Split:
    """Returns a split to be decoded; with `missing`, modalities of its rows are dropped as this config says."""
    unlabelled = labels.unlabelled_tasks(reader.targets, rows, ids, name)
    reader = dataclasses.replace(reader, unlabelled=unlabelled)
    split = Split(name, ids, uncached(rows), reader, None, {})
    if missing is None:
        return split
    names = tuple(filter(None, missing.missing_in.split("+")))
    return dataclasses.replace(split, missing=missing.missing, missing_in=names)


def _decoded_key(split: Split, row_key: Any, fitted: Mapping[str, str]) -> list[Any]:
    """Returns what the decoded rows of a split depend on; augmentation is done later, on the device."""
    reader = split.reader
    modalities = {m: _decoding(options) for m, options in reader.modalities.items()}
    scales = {task: dataclasses.asdict(scale) for task, scale in reader.scales.items()}
    described = [modalities, reader.targets, reader.outputs, fitted, reader.class_names, scales, reader.weight_feature]
    described += [reader.unknown_class, sorted(reader.unlabelled)]
    return [
        "decoded",
        row_key,
        split.name,
        digest(split.ids.tolist()),
        split.missing,
        split.missing_in,
        described,
    ]


def _input_key(split: Split, modality: str, source: Source, fitted: str | None) -> list[Any]:
    """Returns what the decoded inputs of one modality of a split depend on."""
    options = split.reader.modalities[modality]
    rows = [source_key(source, {modality: options}), digest(split.ids.tolist()), split.missing, split.missing_in]
    return [*rows, _decoding(options), digest(fitted)]


def _decoding(options: Options) -> Options:
    return {name: value for name, value in options.items() if name != "augment"}
