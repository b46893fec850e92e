"""Batches with NaN weights for some updates."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mmfusion.data import pipeline

ORIGINAL = pipeline.train_batches


def train_batches(updates: range | set[int], times: float = math.inf) -> Callable[..., Iterator[Any]]:
    """Returns a `pipeline.train_batches` with NaN weights in the first `times` reads of each of `updates` (from 1)."""
    read = dict.fromkeys(updates, 0)

    def batches(*args: Any, first: int, **options: Any) -> Iterator[Any]:
        for step, batch in enumerate(ORIGINAL(*args, first=first, **options), start=first + 1):
            if step in read and read[step] < times:
                read[step] += 1
                batch = batch.replace(weight=np.full_like(batch.weight, np.nan))
            yield batch

    return batches
