"""Input with PyTorch's DataLoader: rows of arrays in memory, and records of PNG images."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from experiments.benchmark.contender import timed_items

BATCH, LENGTH = 64, 12


class Rows(Dataset):
    """Rows of arrays in memory."""

    def __init__(self, folder: Path):
        with np.load(folder / "arrays.npz", allow_pickle=False) as file:
            self.arrays = [torch.from_numpy(file[name]) for name in ("image", "text", "mask", "label")]

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, row: int) -> tuple[torch.Tensor, ...]:
        return tuple(array[row] for array in self.arrays)


class Records(Dataset):
    """PNG images in one file, with their texts, decoded row by row."""

    def __init__(self, folder: Path):
        self.path, self.offsets = folder / "records.bin", np.load(folder / "offsets.npy", allow_pickle=False)
        described = json.loads((folder / "records.json").read_text())
        self.vocabulary, self.text, self.label = (described[key] for key in ("vocabulary", "text", "label"))
        self.file: Any = None

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        self.file = self.file or self.path.open("rb")  # each worker has its own
        self.file.seek(self.offsets[row])
        content = self.file.read(self.offsets[row + 1] - self.offsets[row])
        image = np.array(Image.open(io.BytesIO(content)))
        words = self.text[row].lower().split()[:LENGTH]
        ids, mask = np.zeros(LENGTH, np.int32), np.arange(LENGTH) < len(words)
        ids[: len(words)] = [self.vocabulary.get(word, 1) for word in words]
        return image, ids, mask, self.label[row]


def in_memory(folder: str, rows: int, batches: int) -> tuple[dict[str, Any], Any]:
    """A contender."""
    return {}, _rounds(Rows(Path(folder)), 0, batches)


def streamed(folder: str, rows: int, batches: int, workers: int) -> tuple[dict[str, Any], Any]:
    """A contender."""
    return {}, _rounds(Records(Path(folder)), workers, batches)


def _rounds(data: Dataset, workers: int, count: int) -> Any:
    loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0)
    one_batch = timed_items(itertools.chain.from_iterable(itertools.repeat(loader)), count)
    return lambda: one_batch() / BATCH
