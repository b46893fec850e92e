"""A dataset of random rows in memory, as uneven as data gets: absent modalities, texts of all lengths, unreadable rows.

No TFDS, no decoding of files: for tests of the step, of devices and of hosts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.data import text
from mmfusion.data.dataset import Dataset, Split
from mmfusion.data.decoding import Reader
from tests import tiny

WORDS = ("red", "green", "blue", "round", "square", "big", "small", "left")
CLASSES = ("one", "two", "three")


def config(changes: dict[str, Any] | None = None, fusion: str = "co_attention") -> ConfigDict:
    """Returns a tiny config for `dataset`: plain SGD, dropout, augmentation, an objective that
    draws, labels smoothed and weighted."""
    result = tiny.config(f"fusion={fusion}")
    with result.unlocked():
        result.model.encoders.text = defaults.encoder("text", "bow", tokens="all", dropout=0.2)
        result.objectives.mvae = defaults.objective("mvae", weight=0.3, latent=2, hidden=4)
        result.optim = defaults.optimizer("sgd", 0.3, clip_norm=0.0, schedule="constant")
    small = {
        "batch_size": 64,
        "data.modalities.image.size": (8, 8),
        "data.modalities.text.length": 6,
        "data.modalities.image.augment.flip": 0.5,
        "data.modalities.image.augment.crop": 1,
        "data.modalities.image.augment.brightness": 0.3,
        "data.targets.label.label_smoothing": 0.1,
        "data.targets.label.class_weights": (1.0, 3.0, 0.5),
        "model.encoders.image.strides": (2, 2),
        "model.encoders.image.norm": "layer",
        "model.encoders.image.dropout": 0.2,
    }
    for path, value in {**small, **(changes or {})}.items():
        tiny.put(result, path, value)
    return result.lock()


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns raw rows: a quarter has no picture, a quarter no text, an eighth cannot be read (and has weight 0)."""
    draw = np.random.default_rng(seed)
    result = []
    for number in range(count):
        pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
        words = draw.choice(WORDS, draw.integers(1, 9))
        lacks = draw.integers(4)
        # Unreadable rows come in runs, so that devices and micro-batches differ in how many they have.
        image = b"no picture" if number % 32 < 4 else None if lacks == 0 else pixels
        sentence = "" if lacks == 1 else " ".join(words)
        result.append({"image": image, "sentence": sentence, "label": int(draw.integers(len(CLASSES)))})
    return result


def dataset(config: ConfigDict, sizes: dict[str, int], *, in_memory: bool = True) -> Dataset:
    """Returns the dataset of a config, with so many rows a split; streamed from `rows` where not in memory."""
    reader = Reader(
        modalities=config.data.modalities.to_dict(),
        targets=config.data.targets.to_dict(),
        outputs={"label": len(CLASSES)},
        fitted={"text": text.train_tokenizer([" ".join(WORDS)], "word", 20)},
    )
    splits = {name: split(name, rows(count, seed), reader) for seed, (name, count) in enumerate(sizes.items())}
    if in_memory:
        splits = {
            name: dataclasses.replace(one, arrays=one.decode(np.arange(len(one)))) for name, one in splits.items()
        }
    return Dataset(
        splits, reader, {"label": CLASSES}, {"text": text.to_json(reader.fitted["text"])},
        "synthetic", "synthetic", {}, "synthetic",
    )  # fmt: skip


def split(name: str, source: Sequence[dict[str, Any]], reader: Reader) -> Split:
    """Returns a split that is streamed from raw rows."""
    return Split(name, np.arange(len(source)), source, reader, None, {})
