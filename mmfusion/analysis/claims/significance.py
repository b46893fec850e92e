"""Statistics of paired runs: a difference with its interval, exact tests of families of them, and a verdict.

Runs are paired by seed. n is the number of pairs. Everything here speaks of new training runs on the same test set; see
`crossed.py` for new data, and `folds.py` for runs paired by fold, which are not independent.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9_999
MAX_EXACT_PAIRS = 16  # all sign flips are enumerated up to this number of pairs, above it RESAMPLES random ones
MAX_EXACT_SIMULATED_PAIRS = 12
SIMULATIONS = 1_000
LEVEL = 0.95  # confidence level of intervals
POWER = 0.8
BETTER, WORSE, EQUIVALENT, CANNOT_TELL = "better", "worse", "equivalent", "cannot tell"
SEEDS, FOLDS = "seeds", "folds"
MIN_SEEDS = 6  # with five, no p is below 2 / 2^5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of A with B over paired seeds, or over folds.

    Attributes:
      difference: the mean of A - B; after selection, corrected for it.
      interval: 95 % Student's t interval of the difference; over folds, of the corrected resampled t.
      narrow_interval: the 90 % interval: its ends are those of two one-sided tests at 0.05.
      p: two-sided p of the exact sign-flip test, or over folds of the corrected resampled t, not corrected for multiple
        comparisons.
      better: P(A>B); a tie counts one half.
      n: the number of pairs.
      over: what the pairs are: `seeds` or `folds`.
      variance_factor: over folds, the factor of the sample variance in the variance of the mean.
    """

    difference: float
    interval: tuple[float, float]
    narrow_interval: tuple[float, float]
    p: float
    better: float
    n: int
    over: str = SEEDS
    variance_factor: float | None = None

    def moved(self, by: float) -> "Comparison":
        """Returns the comparison with its difference and intervals moved."""
        (low, high), (narrow_low, narrow_high) = self.interval, self.narrow_interval
        return dataclasses.replace(
            self,
            difference=self.difference + by,
            interval=(low + by, high + by),
            narrow_interval=(narrow_low + by, narrow_high + by),
        )


def paired_differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """Returns a - b `[n]`, float64; raises ValueError unless there are two or more finite pairs."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2 or not np.isfinite([first, second]).all():
        raise ValueError(f"a comparison needs two or more finite pairs, got {first.tolist()} and {second.tolist()}")
    return first - second


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compares the scores of A and B, where higher is better, for the same seeds in the same order.

    Args:
      a: scores `[n]`, finite.
      b: scores `[n]`, finite.

    Raises:
      ValueError: the lengths differ, there are fewer than two pairs, or a score is not finite.
    """
    differences = paired_differences(a, b)
    return Comparison(
        difference=float(differences.mean()),
        interval=mean_interval(differences),
        narrow_interval=mean_interval(differences, 2 * LEVEL - 1),
        p=float(max_t(differences[None])[0]),
        better=float(((differences > 0) + 0.5 * (differences == 0)).mean()),
        n=len(differences),
    )


def mean_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Returns the Student's t interval of a mean; a point if all values are equal but for rounding."""
    mean = float(values.mean())
    if np.allclose(values, values[0], rtol=1e-9, atol=1e-12):
        return mean, mean
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return mean - half, mean + half


def interquartile_mean(values: Sequence[float]) -> float:
    """Returns the mean of the middle half of the values (Agarwal et al. 2021, arXiv:2108.13264)."""
    return float(stats.trim_mean(values, 0.25))


def max_t(differences: np.ndarray) -> np.ndarray:
    """Returns two-sided p values `[k]` of k means, corrected for the family (Westfall & Young 1993, single-step max-T).

    The pairs of all k comparisons are flipped jointly (Fisher 1935), and each mean is compared with the most extreme
    mean of each flip. Extremeness is the p of Student's t, so that means over different numbers of pairs are
    comparable. All 2^n flips are enumerated up to 16 pairs, so that ties count exactly; above, 9,999 random ones are
    drawn. p is at least 2 / 2^n, however large the family; of one comparison it is that of the exact sign-flip test.

    Args:
      differences: `[k, n]`, NaN for a missing pair.
    """
    present = np.isfinite(differences)
    values, count = np.where(present, differences, 0.0), present.sum(axis=1)
    square = (values**2).sum(axis=1) / np.maximum(count, 1)
    usable = (count > 1) & (square > 0)
    p = np.ones(len(differences))
    if usable.any():
        extremeness = _extremeness(_signs(differences.shape[1]), values[usable], count[usable], square[usable])
        p[usable] = (extremeness.max(axis=1, keepdims=True) >= extremeness[0] * (1 - 1e-9)).mean(axis=0)
    return p


def _signs(pairs: int) -> np.ndarray:
    """Returns sign flips `[flips, n]`; the first flips nothing."""
    if pairs <= MAX_EXACT_PAIRS:
        return 1.0 - 2.0 * ((np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1)
    signs = np.random.default_rng(0).choice([1.0, -1.0], size=(RESAMPLES + 1, pairs))
    signs[0] = 1.0
    return signs


def _extremeness(signs: np.ndarray, values: np.ndarray, count: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Returns -log p of Student's t of each flip's means `[flips, k]`."""
    mean = signs @ values.T / count
    variance = np.maximum(square - mean**2, 1e-12 * square) / (count - 1)
    return -stats.t.logsf(np.abs(mean) / np.sqrt(variance), count - 1)


def holm(p: Sequence[float]) -> list[float]:
    """Returns the p values corrected for multiple comparisons (Holm 1979), in the same order."""
    order = np.argsort(p, kind="stable")
    corrected, largest = np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected.tolist()


def verdict(comparison: Comparison, p: float, margin: float = 0.0) -> str:
    """Returns `better`, `worse`, `equivalent` or `cannot tell`.

    The two are `equivalent` where the 90 % interval lies within the margin: two one-sided tests at 0.05 (Schuirmann
    1987). Otherwise `better` requires a corrected p below 0.05 and a 95 % interval above 0, `worse` the mirror image.
    More seeds give more power, unless the true difference equals the margin.

    Args:
      comparison: of the two.
      p: corrected for multiple comparisons.
      margin: in the units of the score, above 0 for equivalence.
    """
    enough = comparison.n >= MIN_SEEDS or comparison.over == FOLDS
    if enough and max(map(abs, comparison.narrow_interval)) < margin:
        return EQUIVALENT
    low, high = comparison.interval
    if p < 1 - LEVEL and (low > 0 or high < 0):
        return BETTER if low > 0 else WORSE
    return CANNOT_TELL


def seeds_needed(
    differences: Sequence[float] | np.ndarray, comparisons: int = 1, margin: float = 0.0, max_seeds: int = 1_000
) -> int | None:
    """Returns the number of seeds at which `verdict` would tell with power 0.8; None above `max_seeds`.

    The verdict is simulated with normal differences of the observed mean and deviation, and p multiplied by the number
    of comparisons (Bonferroni), which has at most the power of `max_t`.

    Args:
      differences: observed `[n]`, of which the result is more than n.
      comparisons: the size of the family.
      margin: see `verdict`.
    """
    differences = np.asarray(differences, np.float64)
    mean, deviation = abs(float(differences.mean())), float(differences.std(ddof=1))
    if mean == 0 and not margin:
        return None
    low = max(len(differences) + 1, MIN_SEEDS)
    high = low
    while power(mean, deviation, high, comparisons, margin) < POWER:
        if high >= max_seeds:
            return None
        low, high = high + 1, min(2 * high, max_seeds)
    while low < high:  # the power rises with the number of seeds
        middle = (low + high) // 2
        if power(mean, deviation, middle, comparisons, margin) < POWER:
            low = middle + 1
        else:
            high = middle
    return high


def power(mean: float, deviation: float, pairs: int, comparisons: int = 1, margin: float = 0.0) -> float:
    """Returns the share of simulations in which `verdict` tells: better or worse, or equivalent within the margin."""
    values = mean + deviation * np.random.default_rng(pairs).normal(size=(SIMULATIONS, pairs))
    means, error = values.mean(axis=1), values.std(axis=1, ddof=1) / math.sqrt(pairs)
    t = np.abs(means) / np.maximum(error, 1e-300)
    p = _sign_flips_of_many(values) if pairs <= MAX_EXACT_SIMULATED_PAIRS else 2 * stats.t.sf(t, pairs - 1)
    level = 1 - LEVEL
    differs = (comparisons * p < level) & (t > stats.t.ppf(1 - level / 2, pairs - 1))
    equal = np.abs(means) + stats.t.ppf(1 - level, pairs - 1) * error < margin
    return float((differs | equal).mean())


def _sign_flips_of_many(values: np.ndarray) -> np.ndarray:
    """Returns the exact sign-flip p of each row of `[simulations, n]`."""
    means = np.abs(values @ _half_of_signs(values.shape[1]).T)
    return (means >= means[:, :1] * (1 - 1e-9)).mean(axis=1)


@functools.cache
def _half_of_signs(pairs: int) -> np.ndarray:
    """Returns the flips that leave the first pair, as |mean| is that of the opposite flip, too."""
    signs = _signs(pairs)
    return signs[signs[:, 0] > 0]
