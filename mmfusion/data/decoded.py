"""Decodes the rows of splits: in memory where that is quick, and otherwise once, by all cores, into the cache."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfusion.data import array_files, decoded_files, labels
from mmfusion.data.cache import Cache
from mmfusion.data.decode_worker import decode_chunks
from mmfusion.data.decoded_files import Chunk
from mmfusion.data.leakage import DigestedRows
from mmfusion.data.progress import progress
from mmfusion.data.rows import Rows
from mmfusion.data.split import Split, check_bad
from mmfusion.errors import UserError, one_line

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig

SECONDS = 5.0  # rows that one core decodes in less are not kept
SAMPLE = 8  # rows of a split that are decoded for this estimate

Digests = dict[str, np.ndarray]


def decode(
    splits: Mapping[str, Split],
    keys: Mapping[str, Any],
    rows: Mapping[str, Rows],
    config: "DataConfig",
    cache: Cache,
) -> tuple[dict[str, Split], dict[str, Digests]]:
    """Returns splits decoded and checked, or to be streamed, and per decoded split the digests of its raw values.

    Args:
      splits: the splits, not decoded.
      keys: what each split's decoded rows follow from, see `Cache.path`.
      rows: the raw rows of each split, which may be cached in memory.
      config: the `data` section of a config.
      cache: keeps the rows that take long to decode.

    Raises:
      UserError: a target cannot be read, too many rows cannot, or a modality is absent in all rows of a split.
    """
    folders = {name: folder for name in splits if (folder := cache.path(keys[name]))}
    _keep({folder: splits[name] for name, folder in folders.items() if not folder.exists()}, cache)
    result, digests = {}, {}
    for name, split in splits.items():
        if name in folders and folders[name].exists():
            arrays, digests[name], bad = decoded_files.load(folders[name], split.reader)
            split = dataclasses.replace(split, arrays=arrays, bad=bad)
            os.utime(folders[name])
        elif len(split) * split.reader.bytes_per_row() <= config.memory_gb * 1e9:
            source = DigestedRows(rows[name], split.reader.modalities)
            arrays = dataclasses.replace(split, source=source).decode(np.arange(len(split)))
            split, digests[name] = dataclasses.replace(split, arrays=arrays), source.digests(split.ids)
        if split.arrays is not None:
            split, digests[name] = labels.drop_unlabelled(split, digests[name])
            _check(split, config)
        result[name] = split
    return result, digests


def _check(split: Split, config: "DataConfig") -> None:
    assert split.arrays is not None
    check_bad(split, split.bad, config.max_bad_fraction)
    if split.arrays.row_weight is not None and not split.arrays.row_weight.any():
        message = f"is 0 in every row of split {split.name!r}"
        raise UserError(message, path="config.data.weight_feature", value=config.weight_feature)
    for modality, present in split.arrays.present.items():
        if not present.any():
            raise UserError(
                f"absent in every row of split {split.name!r}; correct its feature, or leave it out with "
                ":modalities=...",
                path=f"config.data.modalities.{modality}",
            )


def _keep(splits: Mapping[Path, Split], cache: Cache) -> None:
    """Decodes splits into their folders, if that is worth while and there is space."""
    if not splits or sum(map(_seconds, splits.values())) < SECONDS:
        return
    size = sum(len(split) * split.reader.bytes_per_row() for split in splits.values())
    try:
        if not (reason := cache.refuse(size)):
            _decode_into(splits)
            return
    except OSError as error:
        reason = one_line(error)
    print(f"data   decoded rows are not kept in {cache.folder}: {reason}", flush=True)


def _seconds(split: Split) -> float:
    """Returns an estimate of the processor time that decoding a split takes."""
    positions = np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).astype(int)
    split = dataclasses.replace(split, bad={})
    seconds = 0.0
    with contextlib.suppress(UserError):  # raised when all rows are decoded
        for _ in range(2):  # the first time imports modules
            start = time.thread_time()
            split.decode(positions)
            seconds = (time.thread_time() - start) * len(split) / len(positions)
    return seconds


def _decode_into(splits: Mapping[Path, Split]) -> None:
    """Decodes splits into their folders; chunks that a killed process has finished are kept."""
    with contextlib.ExitStack() as stack:
        parts = {folder: part for folder in sorted(splits) if (part := array_files.claim(folder, stack))}
        stack.enter_context(array_files.removed_from_full_disk(parts.values()))
        chunks = []
        for folder, part in parts.items():
            split = splits[folder]
            decoded_files.create(part, split)
            done, size = decoded_files.finished(part, split), decoded_files.chunk_size(split.reader)
            for first in range(0, len(split), size):
                if first not in done:
                    rows = dataclasses.replace(split, ids=split.ids[first : first + size])
                    chunks.append(Chunk(part, len(split), first, rows))
        processes = max(1, min(len(os.sched_getaffinity(0)), len(chunks)))
        total, left = sum(len(splits[folder]) for folder in parts), sum(len(chunk.split) for chunk in chunks)
        by = f" by {processes} processes" if processes > 1 else ""
        with progress("decoding", f"rows{by}", total, left) as advance:
            decode_chunks(chunks, processes, lambda chunk: advance(len(chunk.split)))
        for folder, part in parts.items():
            decoded_files.finish(part, splits[folder], folder)
