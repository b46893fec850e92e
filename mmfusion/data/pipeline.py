"""Batches as a function of (seed, step): the order of examples, each host's share of it, and prefetching."""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Split


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def train_positions(seed: int, step: int, *, size: int, batch_size: int) -> np.ndarray:
    """Returns the positions `[B]` in a split of `size` rows that the global batch of `step` takes.

    Epochs are permutations laid end to end, so a batch may reach into the next one and none is dropped.
    """
    offsets = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = offsets // size
    positions = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        positions[here] = _epoch(seed, int(epoch), size)[offsets[here] % size]
    return positions


def eval_positions(step: int, *, size: int, batch_size: int) -> np.ndarray:
    """Returns the positions `[B]` of evaluation batch `step`, in the split's own order, -1 past its end."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.where(positions < size, positions, -1)


def host_share(positions: np.ndarray, host: int, hosts: int) -> np.ndarray:
    """Returns the contiguous part of a global batch `[B]` that one host reads, `[B / hosts]`."""
    return positions.reshape(hosts, -1)[host]


def train_batches(
    split: Split, *, seed: int, batch_size: int, first: int, last: int, host: int = 0, hosts: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Yields this host's share of the global batches of steps `first` to `last - 1`."""

    def batch(step: int) -> Batch:
        return split.take(host_share(train_positions(seed, step, size=len(split), batch_size=batch_size), host, hosts))

    return _read_ahead(batch, first, last, workers)


def eval_batches(split: Split, *, batch_size: int, host: int = 0, hosts: int = 1, workers: int = 0) -> Iterator[Batch]:
    """Yields this host's share of the batches of one pass over a split, the last one padded with weight 0."""

    def batch(step: int) -> Batch:
        return split.take(host_share(eval_positions(step, size=len(split), batch_size=batch_size), host, hosts))

    return _read_ahead(batch, 0, -(-len(split) // batch_size), workers)


def _read_ahead(batch: Callable[[int], Batch], first: int, last: int, workers: int) -> Iterator[Batch]:
    """Reads whole batches ahead in Grain's threads, or in `workers` processes for sets too large for memory."""
    batches = grain.MapDataset.range(first, last).map(batch)
    ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        if not flags.FLAGS.is_parsed():  # where no command did: Grain's processes ask it for theirs
            flags.FLAGS.mark_as_parsed()
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(ahead)


def to_device(batches: Iterator[Batch], put: Callable[[Batch], Any], ahead: int = 2) -> Iterator[tuple[Batch, Any]]:
    """Yields (host batch, device batch), with `ahead` transfers under way before each is needed."""
    queue: collections.deque[tuple[Batch, Any]] = collections.deque()
    for batch in batches:
        queue.append((batch, put(batch)))
        if len(queue) > ahead:
            yield queue.popleft()
    while queue:
        yield queue.popleft()
