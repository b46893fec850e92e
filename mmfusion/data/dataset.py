"""A config's `data` section -> its splits, ready to be gathered by whole batches, and what a run must keep of them."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import xxhash

from mmfusion.data import sources
from mmfusion.data.batch import Batch
from mmfusion.data.decoding import BadRow, BadTarget, Reader, empty_batch, fill_row
from mmfusion.data.missing import lose
from mmfusion.data.modalities import MODALITY_TYPES, as_string, feature_names, raw_value
from mmfusion.data.rows import Chunks, each, leaves
from mmfusion.errors import UserError

SAMPLED = 100  # rows of each source that its fingerprint is of
FIT_ROWS = 100_000  # a vocabulary settles long before; streaming sets need not be read through


@dataclasses.dataclass(frozen=True)
class Split:
    """The rows of one split, by number in their source.

    Attributes:
      numbers: rows of the source that belong to this split `[n]`; they are the examples' ids.
      source: the raw rows.
      reader: turns a raw row into arrays.
      arrays: everything decoded, in the order of `numbers`, when the split fits in memory; else None.
      bad: rows that could not be read and why; they stay in the order with weight 0.
      missing: chance with which a row loses each modality.
    """

    name: str
    numbers: np.ndarray
    source: Sequence[Any]
    reader: Reader
    arrays: Batch | None
    bad: dict[int, str]
    missing: float = 0.0

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, positions: np.ndarray) -> Batch:
        """Returns the batch of the rows at `positions` `[B]` of this split; -1 makes a padding row of weight 0."""
        if self.arrays is not None:
            return _take(self.arrays, positions)
        return self.decode(positions)

    def subset(self, count: int) -> "Split":
        """Returns a split of at most `count` of the rows, evenly spread."""
        positions = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        arrays = None if self.arrays is None else _take(self.arrays, positions)
        return dataclasses.replace(self, numbers=self.numbers[positions], arrays=arrays)

    def decode(self, positions: np.ndarray) -> Batch:
        """Reads and decodes the rows at `positions` `[B]`; an unreadable row is listed in `bad` and has weight 0."""
        batch = empty_batch(self.reader, len(positions))
        real = np.flatnonzero(positions >= 0)
        numbers = self.numbers[positions[real]]
        for i, number, row in zip(real, numbers.tolist(), each(self.source, numbers), strict=True):
            try:
                fill_row(batch, i, row, number, self.reader)
            except BadRow as error:
                self.bad[number] = str(error)
                batch.id[i] = number
            except BadTarget as error:
                raise UserError(f"split {self.name!r}, {error}; correct the data or config.data.targets") from error
        return lose(batch, self.missing)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits by name, and what the model and the run directory need of the data.

    Attributes:
      splits: `train`, `valid`, `test`, or those that were asked for.
      reader: turns raw rows into arrays.
      class_names: per task; empty for regression.
      fitted: per modality what training rows taught, as a string: of text a tokenizer, of tables their columns.
      fingerprint: of the sources, their splits and how they are read.
      rows: of the sources and their splits alone.
      content: per split, a checksum of some of its source's rows as stored.
      name: of the dataset that is there: the config's `name` or `fallback_name`.
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
        """Returns per modality the encoder fields that the data decides, like a text's `vocabulary`."""
        fitted = self.reader.fitted
        return {
            modality: MODALITY_TYPES[options["kind"]].encoder_kwargs(options, fitted.get(modality))
            for modality, options in self.reader.modalities.items()
        }

    def check_unchanged(self, saved: dict[str, Any], workdir: str) -> None:
        """Raises UserError where this is not the data of which `saved` was kept by a run in `workdir`."""
        now, before = self.saved(), saved.get("content", self.content)
        described = any(saved[key] != value for key, value in now.items() if key in saved and key != "content")
        # Rows to be tested on may be mended: no state has seen them.
        if described or any(before[split] != self.content[split] for split in before if split != "test"):
            raise UserError(
                f"the data has changed since {workdir} began (fingerprint {saved['fingerprint']}, now "
                f"{self.fingerprint}; rows {before}, now {self.content}): bring the old data back, or give another "
                "--workdir"
            )

    def saved(self) -> dict[str, Any]:
        """Returns what a run keeps of its data, as JSON values; `load` takes it back."""
        return {
            "class_names": {task: list(names) for task, names in self.class_names.items()},
            "learned": self.fitted,
            "fingerprint": self.fingerprint,
            "content": self.content,
            "name": self.name,
        }


def load(
    config: Any,
    *,
    seed: int,
    splits: Sequence[str] = ("train", "valid", "test"),
    saved: Mapping[str, Any] | None = None,
) -> Dataset:
    """Opens, prepares where needed, carves, checks and (where it fits) decodes a dataset.

    Args:
      config: the `data` section of a config.
      seed: of pairings; the carve of the validation split does not depend on it.
      splits: which to make ready.
      saved: `Dataset.saved()` of the run that this data is for; None where a run begins, and vocabularies are trained.

    Raises:
      UserError: the data is not there, is not what the config says, or too much of it is corrupt.
    """
    place = {"data_dir": config.dir, "manual_dir": config.manual_dir}
    # Older runs do not have the keys.
    name = (saved or {}).get("name") or sources.available(config.name, config.get("fallback_name", ""), **place)
    names = {"train": config.train, "valid": config.valid or config.train, "test": config.test}
    needed = dict.fromkeys([*splits, *(() if saved else ("train",))])
    opened = {
        expression: sources.open_source(name, expression, **place, seed=seed)
        for expression in dict.fromkeys(names[split] for split in needed)
    }
    opened = {
        expression: dataclasses.replace(source, rows=Chunks(source.rows)) for expression, source in opened.items()
    }
    for source in opened.values():
        _check_features(config, source)
    carved = functools.cache(lambda rows: holdout_split(_groups(rows, config.group), config.valid_fraction))
    numbers = {
        split: _numbers(split, opened[names[split]].rows, None if config.valid or split == "test" else carved, config)
        for split in needed
    }
    if saved:
        class_names = {task: tuple(classes) for task, classes in saved["class_names"].items()}
        fitted = dict(saved["learned"])
    else:
        source = opened[names["train"]]
        class_names = _class_names(config.targets, source.class_names)
        fitted = _fit(config.modalities, source, numbers["train"])
    reader = Reader(
        modalities=config.modalities.to_dict(),
        targets=config.targets.to_dict(),
        outputs={task: len(classes) or 1 for task, classes in class_names.items()},
        fitted={m: MODALITY_TYPES[config.modalities[m].kind].load(string) for m, string in fitted.items()},
        named=next((source.class_names for source in opened.values()), {}),
    )
    rows = [
        {split: opened[names[split]].version for split in sorted(needed)},
        {split: len(numbers[split]) for split in sorted(needed)},
    ]
    return Dataset(
        splits={s: _ready(s, numbers[s], opened[names[s]].rows, reader, config) for s in splits},
        reader=reader,
        class_names=class_names,
        fitted=fitted,
        fingerprint=_digest([*rows, reader.modalities, reader.targets]),
        rows=_digest(rows),
        content={split: _sampled(opened[names[split]].rows.rows) for split in sorted(needed)},
        name=name,
    )


def _sampled(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a checksum of rows as stored, evenly spaced, at most `SAMPLED`."""
    digest = xxhash.xxh3_64()
    for row in each(rows, np.unique(np.linspace(0, len(rows) - 1, SAMPLED).astype(int))):
        for part in leaves(row):
            digest.update(f"{len(part)} ".encode() + part)  # so that what moves from one part to another is seen
    return digest.hexdigest()


def _digest(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _check_features(config: Any, source: sources.Source) -> None:
    if len(source.rows) == 0:
        raise UserError(f"dataset {config.name!r} is empty: {source.version}")
    have = sorted(source.rows[0])
    wanted = [(f"modalities.{m}", name) for m, options in config.modalities.items() for name in feature_names(options)]
    wanted += [(f"targets.{task}", options.feature) for task, options in config.targets.items()]
    for path, name in wanted:
        if name not in have:
            raise UserError(
                f"config.data.{path}.feature={name!r} is not in {config.name!r}: its features are {', '.join(have)}"
            )


def _numbers(split: str, rows: Chunks, carved: Callable[[Chunks], np.ndarray] | None, config: Any) -> np.ndarray:
    """Returns the rows of a split; train and valid share one source by a hash of each row's group."""
    numbers = np.arange(len(rows))
    if carved:
        numbers = numbers[carved(rows) if split == "valid" else ~carved(rows)]
    if len(numbers) == 0:
        raise UserError(f"split {split!r} of {config.name!r} is empty: check config.data.{split} and valid_fraction")
    return numbers


def holdout_split(groups: Sequence[Any], fraction: float) -> np.ndarray:
    """Returns which rows `[n]` go to validation, by a hash of each row's group: the same on every machine."""

    def share(group: Any) -> float:
        return int.from_bytes(hashlib.blake2b(str(group).encode(), digest_size=8).digest(), "big") / 2**64

    return np.array([share(group) < fraction for group in groups], bool)


def _groups(rows: Chunks, feature: str) -> Sequence[Any]:
    if not feature:  # of a pair, the second's row: one that has several partners must not be in both
        return rows.rows.partner if isinstance(rows.rows, sources.PairedRows) else range(len(rows))
    if feature not in rows[0]:
        raise UserError(f"config.data.group={feature!r} is not a feature: they are {', '.join(sorted(rows[0]))}")
    return [as_string(row[feature]) for row in rows]


def _class_names(targets: Any, named: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    class_names: dict[str, tuple[str, ...]] = {}
    for task, options in targets.items():
        names = named.get(options.feature, ())
        if options.kind == "regression":
            names = ()
        elif options.classes and names and len(names) != options.classes:
            raise UserError(
                f"config.data.targets.{task}.classes={options.classes}, but the dataset names {len(names)} classes"
            )
        elif not (names or options.classes):
            raise UserError(f"config.data.targets.{task}.classes must be given: the dataset does not say how many")
        else:
            names = names or tuple(str(i) for i in range(options.classes))
        class_names[task] = names
    return class_names


def _fit(modalities: Any, source: sources.Source, train: np.ndarray) -> dict[str, str]:
    """Returns what rows of the train split teach of each modality: vocabularies, and the columns of tables."""
    teaching = {m: options for m, options in modalities.items() if MODALITY_TYPES[options.kind].fit}
    if not teaching:
        return {}
    sample = [source.rows[int(i)] for i in train[:FIT_ROWS]]
    return {
        m: MODALITY_TYPES[options.kind].fit([raw_value(row, options, source.class_names) for row in sample], options)
        for m, options in teaching.items()
    }


def _ready(name: str, numbers: np.ndarray, rows: Chunks, reader: Reader, config: Any) -> Split:
    missing = config.get("missing", 0.0) if name == "train" else 0.0  # older runs do not have the key
    split = Split(name, numbers, rows.rows, reader, None, {}, missing)
    if len(numbers) * reader.bytes_per_row() > config.memory_gb * 1e9:
        return split
    arrays = dataclasses.replace(split, source=rows).decode(np.arange(len(numbers)))
    check_bad(split, split.bad, config.max_bad_fraction)
    for modality, present in arrays.present.items():
        if not present.any():
            raise UserError(
                f"modality {modality!r} is absent in every row of split {name!r}: "
                f"leave it out with :modalities=... or correct config.data.modalities.{modality}"
            )
    return dataclasses.replace(split, arrays=arrays)


def check_bad(split: Split, unreadable: Collection[int], max_fraction: float) -> None:
    """Raises UserError where more than `max_fraction` of a split's rows, those with these ids, could not be read."""
    if unnamed := sorted({*unreadable} - {*split.bad}):  # found by another process: read here again, for the reason
        split.decode(np.searchsorted(split.numbers, unnamed))
    if len(unreadable) > max_fraction * len(split):
        raise UserError(
            f"{len(unreadable)} of {len(split)} rows of split {split.name!r} cannot be read, more than "
            f"config.data.max_bad_fraction={max_fraction:g} allows; the first: {split.bad[min(unreadable)]}"
        )


def _take(arrays: Batch, positions: np.ndarray) -> Batch:
    """Gathers whole batches; a position of -1 becomes padding."""
    padding = positions < 0

    def gather(array: np.ndarray) -> np.ndarray:
        taken = array[positions]  # [B, ...]
        if padding.any():
            taken[padding] = 0
        return taken

    batch = jax.tree.map(gather, arrays)
    batch.id[padding] = -1
    return batch
