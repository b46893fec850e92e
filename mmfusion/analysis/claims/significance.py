"""What paired runs say: a difference with its interval, an exact test, corrections for many, and a verdict in words.

Runs are paired by seed. n pairs
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES, EXACT = 9_999, 16  # pairs up to which every flip of sign is counted
LEVEL, MEANINGFUL = 0.95, 0.75  # of intervals; P(A>B) that matters (Bouthillier et al. 2021)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A against B over paired seeds.

    Attributes:
      difference: mean of A - B.
      interval: of the difference, 95 %, by the BCa bootstrap.
      normal_interval: the same by Student's t, which is the wider one of few pairs.
      p: of the exact sign-flip test, two-sided, not corrected.
      better: P(A>B), ties half.
      better_interval: of P(A>B), 95 %.
      n: pairs.
    """

    difference: float
    interval: tuple[float, float]
    normal_interval: tuple[float, float]
    p: float
    better: float
    better_interval: tuple[float, float]
    n: int


def compare(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Comparison:
    """Compares the scores of A and B, higher is better, of the same seeds in the same order.

    Args:
      a, b: scores `[n]`, finite.
      seed: of the resampling.

    Raises:
      ValueError: the lengths differ, there are fewer than two pairs, or a score is not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2 or not np.isfinite([a, b]).all():
        raise ValueError(f"a comparison needs two or more finite pairs, got {a.tolist()} and {b.tolist()}")
    differences = a - b
    wins = (differences > 0) + 0.5 * (differences == 0)
    return Comparison(
        difference=float(differences.mean()),
        interval=mean_interval(differences, seed),
        normal_interval=_normal_interval(differences),
        p=sign_flip(differences),
        better=float(wins.mean()),
        better_interval=percentile_interval(wins, seed),
        n=len(a),
    )


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the BCa bootstrap interval of a mean (Efron 1987), 95 %; a point where all values are equal."""
    if np.allclose(values, values[0], rtol=1e-9, atol=1e-12):  # rounding is no spread, and BCa divides by the spread
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(seed)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _normal_interval(values: np.ndarray) -> tuple[float, float]:
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def percentile_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a mean, 95 %."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, size=(RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_flip(differences: np.ndarray) -> float:
    """Returns the two-sided p of the mean under all 2^n flips of sign (Fisher 1935): exact, at least 2 / 2^n.

    Above EXACT pairs 9,999 random flips stand for all.
    """
    if not differences.any():
        return 1.0
    resamples = np.inf if len(differences) <= EXACT else RESAMPLES
    found = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=resamples, rng=np.random.default_rng(0)
    )
    return float(found.pvalue)


def sign_flip_of_chosen(differences: np.ndarray, chosen: int) -> float:
    """Returns the two-sided p of one of several means, whichever was chosen and however (Westfall & Young 1993).

    All are flipped together, pair by pair, and how far the chosen one's mean is from 0 is held against the farthest of
    each flip; how far is the p of Student's t, so that means of other numbers of pairs compare. Where none differs, the
    chance that any is so far is the p returned. It is at least 2 / 2^n, as of one alone. Above 12 pairs 9,999 random
    flips stand for all.

    Args:
      differences: `[k, n]`, NaN where a pair is missing.
      chosen: which of the k.
    """
    have = np.isfinite(differences)
    values, count = np.where(have, differences, 0.0), have.sum(axis=1)
    square = (values**2).sum(axis=1) / np.maximum(count, 1)
    usable = (count > 1) & (square > 0)
    if not usable[chosen]:
        return 1.0
    place = usable[:chosen].sum()
    values, count, square = values[usable], count[usable], square[usable]
    pairs = values.shape[1]
    if pairs <= 12:
        signs = 1.0 - 2.0 * ((np.arange(2**pairs)[:, None] >> np.arange(pairs)) & 1)  # [2^n, n], the first all 1
    else:
        signs = np.random.default_rng(0).choice([1.0, -1.0], size=(RESAMPLES + 1, pairs))
        signs[0] = 1.0
    mean = signs @ values.T / count  # [flips, k]
    spread = np.maximum(square - mean**2, 1e-12 * square) / (count - 1)
    far = -stats.t.logsf(np.abs(mean) / np.sqrt(spread), count - 1)
    return float((far.max(axis=1) >= far[0, place] * (1 - 1e-9)).mean())


def holm(p: Sequence[float]) -> list[float]:
    """Returns the p values corrected for their number, in the same order (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    corrected, largest = np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected.tolist()


def verdict(comparison: Comparison, p: float) -> str:
    """Returns `better`, `worse` or `cannot tell`.

    Better asks for all of: p, corrected, below 0.05; the interval of the difference above 0; and, of P(A>B), an
    interval above 0.5 whose upper end is above 0.75 (Bouthillier et al. 2021, arXiv:2103.03098). Worse is its mirror.
    """
    (low, high), (least, most) = comparison.interval, comparison.better_interval
    if p < 1 - LEVEL and low > 0 and least > 0.5 and most > MEANINGFUL:
        return "better"
    if p < 1 - LEVEL and high < 0 and most < 0.5 and least < 1 - MEANINGFUL:
        return "worse"
    return "cannot tell"


def seeds_to_tell(differences: Sequence[float], comparisons: int = 1, most: int = 1_000) -> int | None:
    """Returns how many pairs in all would tell such a difference, four times in five; None above `most`.

    By a paired t-test with the mean and deviation seen, at 0.05 divided by the number of comparisons; more than there
    are, and at least as many as let the sign-flip test reach that.
    """
    differences = np.asarray(differences, np.float64)
    mean, deviation = abs(differences.mean()), differences.std(ddof=1)
    if mean == 0:
        return None
    level = (1 - LEVEL) / comparisons
    pairs = np.arange(max(len(differences) + 1, fewest_pairs(comparisons)), most + 1)
    wanted = stats.t.ppf(1 - level / 2, pairs - 1) + stats.t.ppf(0.8, pairs - 1)
    enough = pairs[wanted * deviation <= mean * np.sqrt(pairs)]
    return int(enough[0]) if len(enough) else None


def fewest_pairs(comparisons: int) -> int:
    """Returns with how many pairs the sign-flip test can come below 0.05 after Holm's correction: its p is 2 / 2^n."""
    return math.floor(math.log2(2 * comparisons / (1 - LEVEL))) + 1
