"""Which rows lack which modality at a rate: a function of the row's id, the same for every strategy and run.

B rows
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from mmfusion.data.batch import Batch


def kept(ids: np.ndarray, modalities: Sequence[str], rate: float) -> dict[str, np.ndarray]:
    """Returns by modality which rows `[B]` keep it when each is lost with chance `rate`, for itself; one always stays.

    What is lost at a rate is lost at every higher one, but for the last modality of a row.

    Args:
      ids: of the rows `[B]`.
      modalities: their names, in any order.
      rate: from 0 up to 1.
    """
    names = sorted(modalities)
    chance = np.stack([_uniform(ids, m) for m in names])  # [M, B]
    keep = chance >= rate
    keep[chance.argmax(axis=0), np.arange(len(ids))] = True
    return dict(zip(names, keep, strict=True))


def lose(batch: Batch, rate: float) -> Batch:
    """Returns the host batch with modalities lost at a rate; what was absent before stays absent."""
    if not rate:
        return batch
    keep: Mapping[str, np.ndarray] = kept(np.asarray(batch.id), list(batch.present), rate)
    return batch.replace(present={m: present & keep[m] for m, present in batch.present.items()})


def _uniform(ids: np.ndarray, name: str) -> np.ndarray:
    """Returns a number in [0, 1) for each id `[B]` and a name, by the mixing function of SplitMix64."""
    x = ids.astype(np.int64).astype(np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) / 2.0**53
