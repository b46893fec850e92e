"""Absent modalities: dropped at a fixed rate by example id, the same for every strategy and run; rows without any.

B rows · M modalities
"""

import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mmfusion.data.batch import Batch


def keep_masks(
    ids: np.ndarray, modalities: Sequence[str], rate: float, only: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Returns per modality the mask `[B]` of the rows that keep it; every row keeps at least one modality.

    Each modality of a row is dropped independently at `rate`. A modality that is dropped at one rate is also dropped at
    every higher rate, except for the modality that a row keeps.

    Args:
      ids: example ids `[B]`.
      modalities: names of the modalities, in any order.
      rate: from 0 to 1.
      only: the modalities that are dropped; empty: all.
    """
    names = sorted(modalities)
    draws = np.stack([_uniform(ids, name) for name in names])  # [M, B]
    keep = draws >= rate
    if only:
        keep[[name not in only for name in names]] = True
    empty = np.flatnonzero(~keep.any(axis=0))
    keep[draws.argmax(axis=0)[empty], empty] = True
    return dict(zip(names, keep, strict=True))


def drop_modalities(batch: Batch, rate: float, only: Collection[str] = ()) -> Batch:
    """Returns the host batch with modalities (of `only`, if given) dropped at `rate`, beside those that are absent."""
    if not rate:
        return batch
    keep: Mapping[str, np.ndarray] = keep_masks(np.asarray(batch.id), list(batch.present), rate, only)
    return batch.replace(present={m: present & keep[m] for m, present in batch.present.items()})


def without_empty_rows(batch: Batch) -> Batch:
    """Returns the host batch of training with padding in place of rows without any modality, which are no examples."""
    empty = ~np.logical_or.reduce(list(batch.present.values()))  # [B]
    if not (empty & (batch.weight > 0)).any():
        return batch
    return batch.replace(weight=np.where(empty, np.float32(0), batch.weight), id=np.where(empty, -1, batch.id))


def _uniform(ids: np.ndarray, name: str) -> np.ndarray:
    """Returns a pseudorandom number in [0, 1) for each id `[B]`, by the mixing function of SplitMix64."""
    x = ids.astype(np.int64).astype(np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    with np.errstate(over="ignore"):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) / 2.0**53
