"""Aggregates over the runs of several datasets, with intervals of a stratified bootstrap (Agarwal et al. 2021,
arXiv:2108.13264).

D datasets · M methods · S seeds of a dataset · B draws. Scores of a dataset are a table `[..., M, S]`, higher is
better, NaN for a run that failed. Leading axes are draws.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

DRAWS = 2_000
LEVEL = 0.95
MIN_SEEDS = 3  # of each dataset, for an interval
TRIM = 0.25  # of the runs at each end, that an interquartile mean leaves out

Tables = Sequence[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; the interval is None where a dataset has fewer than three seeds."""

    value: float
    interval: tuple[float, float] | None = None


def estimates(tables: Tables, statistic: Callable[[Tables], np.ndarray]) -> list[Estimate]:
    """Returns a statistic of each method, with its percentile interval over resampled runs."""
    values, low, high = spans(tables, statistic)
    if low is None or high is None:
        return [Estimate(float(value)) for value in values]
    return [Estimate(float(v), (float(a), float(b))) for v, a, b in zip(values, low, high, strict=True)]


def spans(
    tables: Tables, statistic: Callable[[Tables], np.ndarray]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Returns a statistic `[...]` and the ends of its pointwise interval `[...]`, None with fewer than three seeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of no runs, which are NaN
        values = statistic(tables)
        if min(table.shape[-1] for table in tables) < MIN_SEEDS:
            return values, None, None
        ends = np.nanquantile(statistic(resampled(tables, DRAWS)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return values, ends[0], ends[1]


def resampled(tables: Tables, draws: int) -> list[np.ndarray]:
    """Returns tables `[B, M, S - 1]` of seeds drawn with replacement within each dataset.

    Datasets are the strata: an interval speaks of new training runs on these datasets. A seed is drawn for all methods
    together, as runs are paired by seed. S - 1 of S are drawn, with which the variance of a mean is unbiased (Rao & Wu
    1988).
    """
    rng = np.random.default_rng(0)
    found = []
    for table in tables:
        seeds = rng.integers(table.shape[-1], size=(draws, table.shape[-1] - 1))  # [B, S - 1]
        found.append(np.moveaxis(table[:, seeds], 1, 0))
    return found


def mean_ranks(tables: Tables) -> np.ndarray:
    """Returns the mean over datasets of each method's rank by mean score `[..., M]`; 1 is best, ties share a rank."""
    return np.mean([ranks(np.nanmean(table, axis=-1)) for table in tables], axis=0)


def ranks(means: np.ndarray) -> np.ndarray:
    """Returns the rank of each of the means `[..., M]`; 1 is the highest."""
    return stats.rankdata(-means, axis=-1)


def interquartile_means(tables: Tables) -> np.ndarray:
    """Returns the mean of the middle half of all runs of each method `[..., M]`."""
    runs = np.sort(np.concatenate(list(tables), axis=-1), axis=-1)  # failed runs last
    count = np.isfinite(runs).sum(axis=-1, keepdims=True)
    cut, index = np.floor(TRIM * count), np.arange(runs.shape[-1])
    kept = (index >= cut) & (index < count - cut)
    return np.where(kept, runs, 0.0).sum(axis=-1) / kept.sum(axis=-1)


def means(tables: Tables) -> np.ndarray:
    """Returns the mean over datasets of each method's mean score `[..., M]`."""
    return np.mean([np.nanmean(table, axis=-1) for table in tables], axis=0)


def profiles(tables: Tables, thresholds: np.ndarray) -> np.ndarray:
    """Returns the share of runs above each threshold, mean over datasets `[..., M, T]`."""
    shares = []
    for table in tables:
        count = np.isfinite(table).sum(axis=-1)
        shares.append(np.stack([(table > t).sum(axis=-1) / count for t in thresholds], axis=-1))
    return np.mean(shares, axis=0)


def improvements(tables: Tables, reference: int) -> np.ndarray:
    """Returns P(a run of the method > a run of the reference), mean over datasets `[..., M]`; a tie counts one half."""
    found = []
    for table in tables:
        runs, other = table[..., :, :, None], table[..., None, reference, None, :]  # [..., M, S, 1], [..., 1, 1, S]
        finite = np.isfinite(table).sum(axis=-1)
        wins = ((runs > other) + 0.5 * (runs == other)).sum(axis=(-2, -1))
        found.append(wins / (finite * finite[..., reference, None]))
    return np.mean(found, axis=0)
