"""Lines about a dataset that a new run prints: held-out rows, copies in several splits, and unknown values."""

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mmfusion.data import leakage
from mmfusion.data.batch import Batch
from mmfusion.data.decoding import Reader
from mmfusion.data.modalities import modality_type
from mmfusion.data.split import Split

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig

UNKNOWN_WORDS = 0.2  # share from which unknown words are reported


def notes(
    config: "DataConfig", splits: Mapping[str, Split], rows: Mapping[str, leakage.DigestedRows], reader: Reader
) -> tuple[str, ...]:
    """Returns the lines.

    Args:
      config: the `data` section of a config.
      splits: the splits; of a streamed split nothing is said, as its rows have not been read.
      rows: per split the rows that it was decoded from, with their digests.
      reader: the reader of the splits.
    """
    in_memory = {name: split for name, split in splits.items() if split.arrays is not None}
    lines = []
    if "valid" in splits and not config.valid:
        lines.append(_held_out(config, splits))
    for first, second in itertools.combinations(in_memory, 2):
        digests = [
            {m: values[splits[name].ids] for m, values in rows[name].digests.items()} for name in (first, second)
        ]
        lines += _copies(first, second, len(splits[second]), leakage.duplicates(*digests))
    for name, split in in_memory.items():
        if name != "train" and split.arrays is not None:
            lines += _unknown(name, split.arrays, reader)
    return tuple(lines)


def _held_out(config: "DataConfig", splits: Mapping[str, Split]) -> str:
    line = f"valid is {len(splits['valid']):,} rows held out of train"
    line += f", by groups of {config.group!r}" if config.group else ""
    for task, target in config.targets.items():
        arrays = [splits[name].arrays for name in ("train", "valid") if name in splits]
        labels = [
            np.unique(batch.targets[task][batch.metric_weight(task) > 0]) for batch in arrays if batch is not None
        ]
        if target.kind != "classification" or len(labels) < 2:
            continue
        train, valid = labels
        missing = np.setdiff1d(train, valid)
        if missing.size:
            line += f"; {missing.size} of the {train.size} classes of {task!r} have no row in it"
    return line


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
