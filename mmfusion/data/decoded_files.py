"""The decoded rows of a split as files, one NumPy array each, written in chunks and read as memory maps."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from mmfusion import files
from mmfusion.data.batch import Batch
from mmfusion.data.decoding import Reader, empty_batch
from mmfusion.data.leakage import DigestedRows
from mmfusion.data.rows import ROWS
from mmfusion.data.split import Split

CHUNK_BYTES = 64 << 20
CHUNKS = "chunks.jsonl"  # a line for each chunk that is written whole
BAD = "bad.json"  # of a split that is written whole


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a split to be decoded.

    Attributes:
      folder: the folder of the split's files.
      size: the number of rows of the split.
      first: the position of the first row of the chunk.
      split: a split of the chunk's rows alone.
    """

    folder: Path
    size: int
    first: int
    split: Split

    def decode(self) -> None:
        """Decodes the rows into the files, and adds the line that says so.

        Raises:
          UserError: a target cannot be read, or a prepared dataset is corrupt.
          OSError: the files cannot be written, such as on a full disk.
        """
        rows = DigestedRows(self.split.source, self.split.reader.modalities)
        split = dataclasses.replace(self.split, source=rows, bad={})
        leaves = jax.tree.leaves((split.decode(np.arange(len(split))), rows.digests(split.ids)))
        for path, leaf in zip(_paths(self.folder, len(leaves)), leaves, strict=True):
            with path.open("r+b") as file:
                total = self.size * (leaf.nbytes // len(leaf))
                file.seek(self.first * (leaf.nbytes // len(leaf)) - total, os.SEEK_END)
                file.write(leaf)
        line = {"first": self.first, "checksum": _checksum(leaves), "bad": list(split.bad.items())}
        handle = os.open(self.folder / CHUNKS, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, f"{json.dumps(line)}\n".encode())
        finally:
            os.close(handle)


def chunk_size(reader: Reader) -> int:
    """Returns the number of rows of a chunk."""
    return max(1, min(ROWS, CHUNK_BYTES // max(1, reader.bytes_per_row())))


def create(folder: Path, split: Split) -> None:
    """Creates the files of a split in an existing folder with their final size, unless an earlier process did.

    Raises:
      OSError: the disk has not enough space.
    """
    if (folder / CHUNKS).exists():
        return
    leaves = jax.tree.leaves(_template(split.reader))
    for path, leaf in zip(_paths(folder, len(leaves)), leaves, strict=True):
        np.lib.format.open_memmap(path, "w+", leaf.dtype, (len(split), *leaf.shape[1:]))
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    (folder / CHUNKS).touch()


def finished(folder: Path, split: Split) -> dict[int, list[tuple[int, str]]]:
    """Returns by its first row each chunk that is written whole, and its unreadable rows: (id, reason)."""
    leaves, size = jax.tree.leaves(_load(folder, split.reader)), chunk_size(split.reader)
    result = {}
    for text in (folder / CHUNKS).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the process was killed as it wrote this line
        first = line["first"]
        if _checksum([leaf[first : first + size] for leaf in leaves]) == line["checksum"]:
            result[first] = line["bad"]
    return result


def finish(folder: Path, split: Split, target: Path) -> None:
    """Moves the folder of a split whose chunks are all written to its final name, durably."""
    bad = sorted(row for rows in finished(folder, split).values() for row in rows)
    files.write_json(folder / BAD, bad)
    files.sync(folder)
    folder.rename(target)
    files.sync_file(target.parent)


def load(folder: Path, reader: Reader) -> tuple[Batch, dict[str, np.ndarray], dict[int, str]]:
    """Returns the decoded rows of a split as memory maps, the digests of their raw values, and its unreadable rows."""
    batch, digests = _load(folder, reader)
    return batch, digests, dict(json.loads((folder / BAD).read_text()))


def _load(folder: Path, reader: Reader) -> tuple[Batch, dict[str, np.ndarray]]:
    leaves, structure = jax.tree.flatten(_template(reader))
    arrays = [np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) for path in _paths(folder, len(leaves))]
    return jax.tree.unflatten(structure, arrays)


def _template(reader: Reader) -> tuple[Batch, dict[str, np.ndarray]]:
    return empty_batch(reader, 0), {modality: np.zeros(0, np.uint64) for modality in reader.modalities}


def _paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"{i:02d}.npy" for i in range(count)]


def _checksum(leaves: list[Any]) -> str:
    digest = xxhash.xxh3_64()
    for leaf in leaves:
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
