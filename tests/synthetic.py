"""A dataset of random rows in memory, with absent modalities, texts of varying length and unreadable rows.

It needs neither TFDS nor file decoding; tests of the step, of devices and of hosts use it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mmfusion.config import defaults
from mmfusion.data import text
from mmfusion.data.dataset import Dataset
from mmfusion.data.decoding import Reader
from mmfusion.data.split import Split
from tests import tiny

WORDS = ("red", "green", "blue", "round", "square", "big", "small", "left")
CLASSES = ("one", "two", "three")


def config(changes: dict[str, Any] | None = None, fusion: str = "co_attention") -> ConfigDict:
    """Returns a tiny config for `dataset`: SGD, dropout, augmentation, a random objective, smoothed weighted labels."""
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
    """Returns raw rows: a quarter has no image, a quarter no text, an eighth is unreadable (weight 0).

    A third has no `sparse` label, a half no `amount`, and a few have neither.
    """
    random, amounts = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    result = []
    for number in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        words = random.choice(WORDS, random.integers(1, 9))
        absent = random.integers(4)
        # Unreadable rows are consecutive, so that devices and micro-batches differ in their number.
        image = b"no image" if number % 32 < 4 else None if absent == 0 else pixels
        sentence = "" if absent == 1 else " ".join(words)
        label = int(random.integers(len(CLASSES)))
        partly = {
            "sparse": None if amounts.random() < 1 / 3 else label,
            "amount": None if number % 16 < 8 else float(amounts.normal()),
        }
        result.append({"image": image, "sentence": sentence, "label": label, "importance": number % 5 / 2, **partly})
    return result


def dataset(config: ConfigDict, sizes: dict[str, int], *, in_memory: bool = True) -> Dataset:
    """Returns the dataset of a config with `sizes` rows per split, streamed from `rows` unless `in_memory`."""
    targets = config.data.targets
    reader = Reader(
        modalities=config.data.modalities.to_dict(),
        targets=targets.to_dict(),
        outputs={task: 1 if target.kind == "regression" else len(CLASSES) for task, target in targets.items()},
        fitted={"text": text.train_tokenizer([" ".join(WORDS)], "word", 20)},
        weight_feature=config.data.weight_feature,
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
