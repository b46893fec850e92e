"""The decoded rows of a split as files, see `array_files`."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from mmfusion import files
from mmfusion.data import array_files
from mmfusion.data.batch import Batch
from mmfusion.data.decoding import Reader, empty_batch
from mmfusion.data.leakage import DigestedRows
from mmfusion.data.rows import ROWS
from mmfusion.data.split import Split

CHUNK_BYTES = 64 << 20
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
        """Decodes the rows into the files.

        Raises:
          UserError: a target cannot be read, or a prepared dataset is corrupt.
          OSError: the files cannot be written, such as on a full disk.
        """
        rows = DigestedRows(self.split.source, self.split.reader.modalities)
        split = dataclasses.replace(self.split, source=rows, bad={})
        leaves = jax.tree.leaves((split.decode(np.arange(len(split))), rows.digests(split.ids)))
        array_files.write(self.folder, self.size, self.first, leaves, list(split.bad.items()))


def chunk_size(reader: Reader) -> int:
    """Returns the number of rows of a chunk."""
    return max(1, min(ROWS, CHUNK_BYTES // max(1, reader.bytes_per_row())))


def create(folder: Path, split: Split) -> None:
    """Creates the files of a split, see `array_files.create`."""
    array_files.create(folder, jax.tree.leaves(_template(split.reader)), len(split))


def finished(folder: Path, split: Split) -> dict[int, list[tuple[int, str]]]:
    """Returns by its first row each chunk that is written whole, and its unreadable rows: (id, reason)."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(_template(split.reader))]
    return array_files.finished(folder, dtypes, chunk_size(split.reader))


def finish(folder: Path, split: Split, target: Path) -> None:
    """Moves the folder of a split whose chunks are all written to its final name, durably."""
    bad = sorted(row for rows in finished(folder, split).values() for row in rows)
    files.write_json(folder / BAD, bad)
    array_files.move(folder, target)


def load(folder: Path, reader: Reader) -> tuple[Batch, dict[str, np.ndarray], dict[int, str]]:
    """Returns the decoded rows of a split as memory maps, the digests of their raw values, and its unreadable rows."""
    leaves, structure = jax.tree.flatten(_template(reader))
    batch, digests = jax.tree.unflatten(structure, array_files.load(folder, [leaf.dtype for leaf in leaves]))
    return batch, digests, dict(json.loads((folder / BAD).read_text()))


def _template(reader: Reader) -> tuple[Batch, dict[str, np.ndarray]]:
    return empty_batch(reader, 0), {modality: np.zeros(0, np.uint64) for modality in reader.modalities}
