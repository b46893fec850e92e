"""Lines about a dataset that a new run prints: held-out rows, copies in several splits, and unknown values."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmfusion.data import leakage
from mmfusion.data.batch import Batch
from mmfusion.data.decoding import Reader
from mmfusion.data.holdout import makes_test
from mmfusion.data.modalities import modality_type
from mmfusion.data.split import Split

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig

UNKNOWN_WORDS = 0.2  # share from which unknown words are reported


def notes(
    config: "DataConfig",
    splits: Mapping[str, Split],
    digests: Mapping[str, Mapping[str, np.ndarray]],
    reader: Reader,
) -> tuple[str, ...]:
    """Returns the lines.

    Args:
      config: the `data` section of a config.
      splits: the splits; of a streamed split nothing is said, as its rows have not been read.
      digests: per other split and modality the digests `[n]` of its rows' raw values, see `leakage.DigestedRows`.
      reader: the reader of the splits.
    """
    decoded = {name: split for name, split in splits.items() if split.arrays is not None}
    lines = []
    if "valid" in splits and not config.valid:
        lines.append(_held_out(config, splits))
    if "test" in splits and makes_test(config):
        lines += _without_rows(config, splits, ("train", "test"))
    for first, second in itertools.combinations(decoded, 2):
        lines += _copies(first, second, len(splits[second]), leakage.duplicates(digests[first], digests[second]))
    for name, split in decoded.items():
        lines += _empty(name, split.arrays)
        if name != "train" and split.arrays is not None:
            lines += _unknown(name, split.arrays, reader)
    return tuple(lines)


def _empty(name: str, batch: Batch | None) -> Iterator[str]:
    """Yields how many rows of a split have no modality."""
    assert batch is not None
    count = int(np.sum((batch.weight > 0) & ~np.logical_or.reduce(list(batch.present.values()))))
    if count:
        yield f"{count:,} of {len(batch.id):,} rows of {name} have no modality and do not count"


def _held_out(config: "DataConfig", splits: Mapping[str, Split]) -> str:
    line = f"valid is {len(splits['valid']):,} rows held out of train"
    line += f", by groups of {config.group!r}" if config.group else ""
    line += ", the latest ones" if config.time else ""
    return "; ".join([line, *_without_rows(config, splits, ("valid",))])


def _without_rows(config: "DataConfig", splits: Mapping[str, Split], names: Sequence[str]) -> Iterator[str]:
    """Yields how many classes of each task have no row in a split, of those that train, valid or test has."""
    for task, target in config.targets.items():
        arrays = {name: split.arrays for name, split in splits.items() if split.arrays is not None}
        labels = {name: np.unique(batch.targets[task][batch.metric_weight(task) > 0]) for name, batch in arrays.items()}
        if target.kind != "classification" or not labels:
            continue
        every = np.unique(np.concatenate(list(labels.values())))
        for name in names:
            if missing := len(np.setdiff1d(every, labels.get(name, every))):
                yield f"{missing} of the {len(every)} classes of {task!r} have no row in {name}"


def _copies(first: str, second: str, total: int, counts: dict[str, int]) -> Iterator[str]:
    """Yields a line on rows of `second` that occur in `first`; single modalities are named where rows do."""
    if counts["rows"]:
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "rows")
        yield f"{counts['rows']:,} of the {total:,} rows of {second} are exact copies of rows of {first} ({parts})"


def _unknown(split: str, arrays: Batch, reader: Reader) -> Iterator[str]:
    for (modality, what), counts in count_unknown(arrays, reader).items():
        if line := describe_unknown(modality, what, *counts):
            yield f"{split}: {line}"


def count_unknown(batch: Batch, reader: Reader) -> dict[tuple[str, str], tuple[int, int]]:
    """Returns per modality and kind of value how many values its fitted state does not know, and of how many.

    Args:
      batch: decoded rows, on the host.
      reader: the reader that decoded them.
    """
    result = {}
    for modality, options in reader.modalities.items():
        count = modality_type(options["kind"]).unknown
        if count is not None:
            inputs, mask = np.asarray(batch.inputs[modality]), np.asarray(batch.mask[modality])
            counts = count(inputs, mask, options, reader.fitted[modality])
            result |= {(modality, what): pair for what, pair in counts.items()}
    return result


def describe_unknown(modality: str, what: str, unknown: int, total: int) -> str:
    """Returns a line on values that the fitted state does not know; empty where there is nothing to say.

    Args:
      modality: the modality's name.
      what: `words`, or the column of a table.
      unknown: the number of unknown values.
      total: the number of values.
    """
    if what != "words":
        line = f"{unknown:,} of {total:,} values of {modality} column {what!r} are unknown categories"
        return line if unknown else ""
    return (
        ""
        if unknown <= UNKNOWN_WORDS * total
        else (
            f"{unknown:,} of {total:,} words of {modality} are unknown to its word tokenizer; "
            f"config.data.modalities.{modality}.tokenizer=bpe has no unknown words"
        )
    )
