"""Opens the dataset of a config: its splits, read in batches, and the description that a run saves of its data."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mmfusion.data import rows as row_sequences
from mmfusion.data import sources
from mmfusion.data.batch import Batch
from mmfusion.data.decoding import BadRow, BadTarget, Reader, empty_batch, fill_row
from mmfusion.data.holdout import split_ids
from mmfusion.data.missing import drop_modalities
from mmfusion.data.modalities import feature_names, modality_type, raw_value
from mmfusion.data.modality_type import Options
from mmfusion.data.rows import CachedRows, Rows, uncached
from mmfusion.data.sources import Source
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig

FIT_ROWS = 100_000  # rows that vocabularies are fitted to, so that streamed splits need not be read completely


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
    """

    name: str
    ids: np.ndarray
    source: Rows
    reader: Reader
    arrays: Batch | None
    bad: dict[int, str]
    missing: float = 0.0

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: np.ndarray) -> Batch:
        """Returns the batch of the rows at `positions` `[B]`; -1 gives a padding row with weight 0."""
        if self.arrays is not None:
            return _take(self.arrays, positions)
        return self.decode(positions)

    def subset(self, count: int) -> "Split":
        """Returns a split of at most `count` evenly spaced rows."""
        positions = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        arrays = None if self.arrays is None else _take(self.arrays, positions)
        return dataclasses.replace(self, ids=self.ids[positions], arrays=arrays)

    def decode(self, positions: np.ndarray) -> Batch:
        """Returns the decoded rows at `positions` `[B]`; an unreadable row is added to `bad` and has weight 0."""
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
        return drop_modalities(batch, self.missing)


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
    """

    splits: dict[str, Split]
    reader: Reader
    class_names: dict[str, tuple[str, ...]]
    fitted: dict[str, str]
    fingerprint: str
    rows: str
    content: dict[str, str]
    name: str

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
        description_changed = any(saved[key] != now[key] for key in now if key != "content")
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
    targets = {task: section.to_dict() for task, section in config.targets.items()}
    name = (saved or {}).get("name") or sources.available_name(
        config.name, config.fallback_name, data_dir=config.dir, manual_dir=config.manual_dir
    )
    needed = list(dict.fromkeys([*splits, *(() if saved else ("train",))]))
    opened = _open(config, name, needed, seed)
    ids = split_ids(config, opened)
    if saved:
        class_names = {task: tuple(names) for task, names in saved["class_names"].items()}
        fitted = dict(saved["learned"])
    else:
        class_names = _class_names(targets, opened["train"].class_names)
        fitted = _fit(modalities, opened["train"], ids["train"])
    reader = Reader(
        modalities=modalities,
        targets=targets,
        outputs={task: len(names) or 1 for task, names in class_names.items()},
        fitted={m: modality_type(modalities[m]["kind"]).load(string) for m, string in fitted.items()},
        class_names=opened[needed[0]].class_names if needed else {},
    )
    described_rows = [
        {split: opened[split].version for split in sorted(needed)},
        {split: len(ids[split]) for split in sorted(needed)},
    ]
    return Dataset(
        splits={split: _decoded_split(split, ids[split], opened[split].rows, reader, config) for split in splits},
        reader=reader,
        class_names=class_names,
        fitted=fitted,
        fingerprint=_digest([*described_rows, reader.modalities, reader.targets]),
        rows=_digest(described_rows),
        content={split: row_sequences.checksum(uncached(opened[split].rows)) for split in sorted(needed)},
        name=name,
    )


def _open(config: "DataConfig", name: str, splits: Sequence[str], seed: int) -> dict[str, Source]:
    """Returns the source of each split with cached rows; splits with the same TFDS expression share a source."""
    expressions = {"train": config.train, "valid": config.valid or config.train, "test": config.test}
    opened = {}
    for expression in dict.fromkeys(expressions[split] for split in splits):
        source = sources.open_source(name, expression, data_dir=config.dir, manual_dir=config.manual_dir, seed=seed)
        _check_features(config, source)
        opened[expression] = dataclasses.replace(source, rows=CachedRows(source.rows))
    return {split: opened[expressions[split]] for split in splits}


def _digest(description: Any) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _check_features(config: "DataConfig", source: Source) -> None:
    if len(source.rows) == 0:
        raise UserError(f"{source.version} has no examples", path="config.data.name", value=config.name)
    features = sorted(source.rows[0])
    wanted = [
        (f"modalities.{m}", name)
        for m, section in config.modalities.items()
        for name in feature_names(section.to_dict())
    ]
    wanted += [(f"targets.{task}", section.feature) for task, section in config.targets.items()]
    for path, name in wanted:
        if name not in features:
            message = f"the dataset {config.name!r} has no such feature"
            raise UserError(message, path=f"config.data.{path}.feature", value=name, choices=features)


def _class_names(
    targets: Mapping[str, Options], feature_class_names: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    class_names: dict[str, tuple[str, ...]] = {}
    for task, options in targets.items():
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


def _fit(modalities: Mapping[str, Options], source: Source, train: np.ndarray) -> dict[str, str]:
    """Returns the state fitted to the training rows of each modality: vocabularies, and the columns of tables."""
    kinds = {m: modality_type(options["kind"]) for m, options in modalities.items()}
    reads_first = any(kind.fit and kind.fit_rows is None for kind in kinds.values())
    first = [source.rows[int(i)] for i in train[:FIT_ROWS]] if reads_first else []
    fitted = {}
    for m, kind in kinds.items():
        if kind.fit:
            rows = first if kind.fit_rows is None else _evenly_spaced(source.rows, train, kind.fit_rows)
            fitted[m] = kind.fit([raw_value(row, modalities[m], source.class_names) for row in rows], modalities[m])
    return {m: string for m, string in fitted.items() if string}


def _evenly_spaced(rows: Rows, ids: np.ndarray, count: int) -> list[dict[str, Any]]:
    positions = np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)
    return list(row_sequences.iterate(uncached(rows), ids[positions]))


def _decoded_split(name: str, ids: np.ndarray, rows: Rows, reader: Reader, config: "DataConfig") -> Split:
    """Returns a split, decoded if it fits in memory."""
    missing = config.missing if name == "train" else 0.0
    split = Split(name, ids, uncached(rows), reader, None, {}, missing)
    if len(ids) * reader.bytes_per_row() > config.memory_gb * 1e9:
        return split
    arrays = dataclasses.replace(split, source=rows).decode(np.arange(len(ids)))
    check_bad(split, split.bad, config.max_bad_fraction)
    for modality, present in arrays.present.items():
        if not present.any():
            raise UserError(
                f"absent in every row of split {name!r}; correct its feature, or leave it out with :modalities=...",
                path=f"config.data.modalities.{modality}",
            )
    return dataclasses.replace(split, arrays=arrays)


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

    def take(array: np.ndarray) -> np.ndarray:
        taken = array[positions]  # [B, ...]
        if padding.any():
            taken[padding] = 0
        return taken

    batch = jax.tree.map(take, arrays)
    batch.id[padding] = -1
    return batch
