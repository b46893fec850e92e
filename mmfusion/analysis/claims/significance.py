"""Statistics of paired runs: a difference with its interval, an exact test, multiple comparisons, and a verdict.

Runs are paired by seed. n is the number of pairs. Runs paired by fold are not independent: see `folds.py`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from scipy import stats

RESAMPLES = 9_999
MAX_EXACT_PAIRS = 16  # all sign flips are enumerated up to this number of pairs, above it RESAMPLES random ones
MAX_EXACT_PAIRS_OF_SELECTED = 12
LEVEL = 0.95  # confidence level of intervals
MEANINGFUL = 0.75  # P(A>B) of a meaningful difference (Bouthillier et al. 2021)
POWER = 0.8
BETTER, WORSE, INCONCLUSIVE = "better", "worse", "inconclusive"
SEEDS, FOLDS = "seeds", "folds"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of A with B over paired seeds, or over folds.

    Attributes:
      difference: the mean of A - B.
      interval: 95 % BCa bootstrap interval of the difference; over folds, of the corrected resampled t.
      normal_interval: 95 % Student's t interval of the difference, which is wider with few pairs; over folds the same.
      p: two-sided p of the exact sign-flip test, or over folds of the corrected resampled t, not corrected for multiple
        comparisons.
      better: P(A>B); a tie counts one half.
      better_interval: 95 % bootstrap interval of P(A>B); None over folds.
      n: the number of pairs.
      over: what the pairs are: `seeds` or `folds`.
      variance_factor: over folds, the factor of the sample variance in the variance of the mean.
    """

    difference: float
    interval: tuple[float, float]
    normal_interval: tuple[float, float]
    p: float
    better: float
    better_interval: tuple[float, float] | None
    n: int
    over: str = SEEDS
    variance_factor: float | None = None


def paired_differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """Returns a - b `[n]`, float64; raises ValueError unless there are two or more finite pairs."""
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2 or not np.isfinite([first, second]).all():
        raise ValueError(f"a comparison needs two or more finite pairs, got {first.tolist()} and {second.tolist()}")
    return first - second


def compare(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Comparison:
    """Compares the scores of A and B, where higher is better, for the same seeds in the same order.

    Args:
      a: scores `[n]`, finite.
      b: scores `[n]`, finite.
      seed: seed of the resampling.

    Raises:
      ValueError: the lengths differ, there are fewer than two pairs, or a score is not finite.
    """
    differences = paired_differences(a, b)
    wins = (differences > 0) + 0.5 * (differences == 0)
    return Comparison(
        difference=float(differences.mean()),
        interval=mean_interval(differences, seed),
        normal_interval=_normal_interval(differences),
        p=sign_flip(differences),
        better=float(wins.mean()),
        better_interval=_bootstrap(wins, "percentile", seed),
        n=len(differences),
    )


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % BCa bootstrap interval of a mean (Efron 1987); a point if all values are equal."""
    if np.allclose(values, values[0], rtol=1e-9, atol=1e-12):  # BCa would divide by a deviation of rounding errors
        return float(values[0]), float(values[0])
    return _bootstrap(values, "BCa", seed)


def _bootstrap(values: np.ndarray, method: str, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    interval = stats.bootstrap(
        (values,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method=method, rng=rng
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _normal_interval(values: np.ndarray) -> tuple[float, float]:
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def sign_flip(differences: np.ndarray) -> float:
    """Returns the exact two-sided p of the mean under all 2^n sign flips (Fisher 1935), at least 2 / 2^n.

    Above MAX_EXACT_PAIRS pairs, 9,999 random flips are sampled instead.
    """
    if not differences.any():
        return 1.0
    resamples = cast(Any, np.inf) if len(differences) <= MAX_EXACT_PAIRS else RESAMPLES
    found = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=resamples, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)


def sign_flip_of_selected(differences: np.ndarray, selected: int) -> float:
    """Returns the two-sided p of one of k means, valid for any selection of it (Westfall & Young 1993, max-T).

    The pairs of all k comparisons are flipped jointly, and the selected mean is compared with the most extreme mean of
    each flip. Extremeness is the p of Student's t, so that means over different numbers of pairs are comparable. This
    controls the family-wise error rate. p is at least 2 / 2^n, as for a single comparison. Above 12 pairs, 9,999 random
    flips are sampled.

    Args:
      differences: `[k, n]`, NaN for a missing pair.
      selected: index of the selected comparison.
    """
    present = np.isfinite(differences)
    values, count = np.where(present, differences, 0.0), present.sum(axis=1)
    square = (values**2).sum(axis=1) / np.maximum(count, 1)
    usable = (count > 1) & (square > 0)
    if not usable[selected]:
        return 1.0
    index = usable[:selected].sum()
    values, count, square = values[usable], count[usable], square[usable]
    pairs = values.shape[1]
    if pairs <= MAX_EXACT_PAIRS_OF_SELECTED:
        signs = 1.0 - 2.0 * ((np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1)  # [2^n, n]; row 0 flips nothing
    else:
        signs = np.random.default_rng(0).choice([1.0, -1.0], size=(RESAMPLES + 1, pairs))
        signs[0] = 1.0
    mean = signs @ values.T / count  # [flips, k]
    variance = np.maximum(square - mean**2, 1e-12 * square) / (count - 1)
    extremeness = -stats.t.logsf(np.abs(mean) / np.sqrt(variance), count - 1)
    return float((extremeness.max(axis=1) >= extremeness[0, index] * (1 - 1e-9)).mean())


def holm(p: Sequence[float]) -> list[float]:
    """Returns the p values corrected for multiple comparisons (Holm 1979), in the same order."""
    order = np.argsort(p, kind="stable")
    corrected, largest = np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected.tolist()


def verdict(comparison: Comparison, p: float) -> str:
    """Returns `better`, `worse` or `inconclusive`.

    `better` requires a corrected p below 0.05, an interval of the difference above 0, and an interval of P(A>B) that
    lies above 0.5 and reaches 0.75 (Bouthillier et al. 2021, arXiv:2103.03098). `worse` is the mirror image. Over folds
    P(A>B) has no interval, and p and the interval of the difference decide.
    """
    (low, high), (better_low, better_high) = comparison.interval, comparison.better_interval or (0.0, 1.0)
    if comparison.better_interval is None:
        return INCONCLUSIVE if p >= 1 - LEVEL or low <= 0 <= high else BETTER if low > 0 else WORSE
    if p < 1 - LEVEL and low > 0 and better_low > 0.5 and better_high > MEANINGFUL:
        return BETTER
    if p < 1 - LEVEL and high < 0 and better_high < 0.5 and better_low < 1 - MEANINGFUL:
        return WORSE
    return INCONCLUSIVE


def seeds_needed(differences: Sequence[float] | np.ndarray, comparisons: int = 1, max_seeds: int = 1_000) -> int | None:
    """Returns the number of seeds that detects the observed difference with power 0.8; None above `max_seeds`.

    Power is that of a paired t-test with the observed mean and standard deviation, at level 0.05 divided by the number
    of comparisons. The result exceeds the number of given seeds and suffices for the sign-flip test to reach the level.
    """
    differences = np.asarray(differences, np.float64)
    mean, deviation = abs(differences.mean()), differences.std(ddof=1)
    if mean == 0:
        return None
    level = (1 - LEVEL) / comparisons
    pairs = np.arange(max(len(differences) + 1, min_pairs(comparisons)), max_seeds + 1)
    noncentrality = stats.t.ppf(1 - level / 2, pairs - 1) + stats.t.ppf(POWER, pairs - 1)
    sufficient = pairs[noncentrality * deviation <= mean * np.sqrt(pairs)]
    return int(sufficient[0]) if len(sufficient) else None


def min_pairs(comparisons: int) -> int:
    """Returns the fewest pairs with which the sign-flip test (p at least 2 / 2^n) can pass Holm's correction."""
    return math.floor(math.log2(2 * comparisons / (1 - LEVEL))) + 1
