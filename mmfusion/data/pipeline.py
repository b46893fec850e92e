"""Batches as a function of (seed, step): the order of examples, each host's share of a batch, and prefetching."""

import collections
import errno
import functools
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from absl import flags
from etils import epy

from mmfusion.data.batch import Batch
from mmfusion.data.missing import without_empty_rows
from mmfusion.data.split import Classes, Split
from mmfusion.errors import UserError

with epy.lazy_imports():
    import grain

SHARED_MEMORY = "/dev/shm"
BALANCED_STREAM = 1  # keeps these random numbers apart from those of other uses of (seed, step)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def train_positions(seed: int, step: int, *, size: int, batch_size: int) -> np.ndarray:
    """Returns the positions `[B]` of the global batch of `step` in a split of `size` rows.

    Epochs are consecutive permutations. A batch may span several epochs, and no row is dropped.
    """
    offsets = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = offsets // size
    positions = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        positions[in_epoch] = _permutation(seed, int(epoch), size)[offsets[in_epoch] % size]
    return positions


def balanced_positions(seed: int, step: int, *, classes: Classes, batch_size: int) -> np.ndarray:
    """Returns the positions `[B]` of the global batch of `step`, with each class B / C times, rounded up or down.

    The classes that have one more row than others, the rows, drawn with replacement, and their order are random.
    """
    random = np.random.default_rng([seed, step, BALANCED_STREAM])
    # B / C times all classes, the last time a random choice of them.
    drawn = random.permutation(np.resize(random.permutation(len(classes.counts)), batch_size))  # [B]
    return classes.positions[classes.first[drawn] + random.integers(classes.counts[drawn])]


def batch_positions(split: Split, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Returns the positions `[B]` of the global training batch of `step`, by the split's sampler."""
    if split.classes is not None:
        return balanced_positions(seed, step, classes=split.classes, batch_size=batch_size)
    return train_positions(seed, step, size=len(split), batch_size=batch_size)


def eval_positions(step: int, *, size: int, batch_size: int) -> np.ndarray:
    """Returns the positions `[B]` of evaluation batch `step` in split order, -1 past the end."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.where(positions < size, positions, -1)


def host_share(positions: np.ndarray, host: int, hosts: int) -> np.ndarray:
    """Returns the contiguous share `[B / hosts]` of a global batch's positions `[B]` that a host reads."""
    return positions.reshape(hosts, -1)[host]


def train_batches(
    split: Split, *, seed: int, batch_size: int, first: int, last: int, host: int = 0, hosts: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Yields this host's share of the global batches of steps `first` to `last - 1`."""

    def batch(step: int) -> Batch:
        positions = host_share(batch_positions(split, seed, step, batch_size), host, hosts)
        return without_empty_rows(split.take(positions))

    return _prefetch(batch, first, last, workers) if split.arrays is None else map(batch, range(first, last))


def eval_batches(split: Split, *, batch_size: int, host: int = 0, hosts: int = 1, workers: int = 0) -> Iterator[Batch]:
    """Yields this host's share of the batches of one pass over a split; the last batch is padded with weight 0."""

    def batch(step: int) -> Batch:
        return split.take(host_share(eval_positions(step, size=len(split), batch_size=batch_size), host, hosts))

    count = -(-len(split) // batch_size)
    return _prefetch(batch, 0, count, workers) if split.arrays is None else map(batch, range(count))


def _prefetch(batch: Callable[[int], Batch], first: int, last: int, workers: int) -> Iterator[Batch]:
    """Returns an iterator over the batches of steps, prefetched by Grain's threads or by `workers` processes."""
    batches = grain.MapDataset.range(first, last).map(batch)
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl's flags, which only commands parse
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        return _from_processes(dataset, workers)
    return iter(dataset)


def _from_processes(dataset: Iterable[Batch], workers: int) -> Iterator[Batch]:
    """Yields what processes read, which pass it on through shared memory.

    Raises:
      UserError: the shared memory is full, as that of a container often is.
    """
    try:
        yield from dataset
    except (OSError, RuntimeError) as error:
        # A process that writes to full shared memory is killed; the errors name no file.
        if getattr(error, "errno", None) != errno.ENOSPC and f"exit code {-signal.SIGBUS:d}" not in str(error):
            raise
        size = shutil.disk_usage(SHARED_MEMORY)
        message = (
            f"{SHARED_MEMORY}, through which processes pass batches, is full ({size.free / 1e6:.1f} of "
            f"{size.total / 1e6:.1f} MB are free): give it more (docker run --shm-size=8g), or take fewer workers, or 0"
        )
        raise UserError(message, path="config.data.workers", value=workers) from error


def to_device(batches: Iterator[Batch], put: Callable[[Batch], Any], ahead: int = 2) -> Iterator[tuple[Batch, Any]]:
    """Yields (host batch, device batch), with `ahead` further batches being transferred."""
    queue: collections.deque[tuple[Batch, Any]] = collections.deque()
    for batch in batches:
        queue.append((batch, put(batch)))
        if len(queue) > ahead:
            yield queue.popleft()
    while queue:
        yield queue.popleft()
