"""Paired comparisons of methods over seeds or over datasets, and ranks over datasets (Demšar 2006, JMLR 7).

D datasets · M methods · n pairs.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from mmfusion.analysis.claims.differences import Difference
from mmfusion.analysis.claims.significance import CANNOT_TELL, LEVEL, compare, max_t, verdict

DATASETS = "datasets"


@dataclasses.dataclass(frozen=True)
class Friedman:
    """Friedman's test that all methods have the same rank, and the critical difference of two mean ranks.

    Attributes:
      chi_square: Friedman's statistic, M - 1 degrees of freedom.
      f: its correction by Iman and Davenport (1980), M - 1 and (M - 1)(D - 1) degrees of freedom; None if infinite.
      p: of `f`.
      critical_difference: of Nemenyi's test at 0.05.
      groups: the largest groups of methods, best first, whose mean ranks differ by less than it.
    """

    chi_square: float
    f: float | None
    p: float
    critical_difference: float
    groups: tuple[tuple[str, ...], ...]


def judge(
    scores: dict[str, np.ndarray], methods: Sequence[str], other: str, margin: float, over: str
) -> list[Difference]:
    """Compares methods with another over pairs; p values are corrected for this family by the max-T method.

    Args:
      scores: method -> scores `[n]`, higher is better; NaN where it has none.
      methods: the methods; `other` is left out.
      other: the method that they are compared with.
      margin: of equivalence.
      over: what the pairs are.
    """
    methods = [method for method in methods if method != other]
    if not methods:
        return []
    differences = np.stack([scores[method] - scores[other] for method in methods])
    found = []
    for method, row, p in zip(methods, differences, max_t(differences), strict=True):
        present = np.isfinite(row)
        if present.sum() < 2:
            found.append(Difference(method, other, None, None, CANNOT_TELL, None))
            continue
        comparison = compare(scores[method][present].tolist(), scores[other][present].tolist())
        comparison = dataclasses.replace(comparison, over=over)
        found.append(Difference(method, other, comparison, float(p), verdict(comparison, p, margin), None))
    return found


def friedman(mean_ranks: dict[str, float], datasets: int) -> Friedman | None:
    """Returns Friedman's test of mean ranks over datasets; None with fewer than two datasets or three methods.

    Ties are not corrected for, which errs on the side of no difference.
    """
    k = len(mean_ranks)
    if datasets < 2 or k < 3:
        return None
    squares = sum(rank**2 for rank in mean_ranks.values())
    chi_square = 12 * datasets / (k * (k + 1)) * (squares - k * (k + 1) ** 2 / 4)
    rest = datasets * (k - 1) - chi_square
    f = (datasets - 1) * chi_square / rest if rest > 1e-9 else math.inf
    p = float(stats.f.sf(f, k - 1, (k - 1) * (datasets - 1)))
    difference = critical_difference(k, datasets)
    return Friedman(chi_square, f if math.isfinite(f) else None, p, difference, groups(mean_ranks, difference))


def critical_difference(methods: int, datasets: int) -> float:
    """Returns the difference of two mean ranks that Nemenyi's test tells apart at 0.05."""
    return nemenyi_quantile(methods) * math.sqrt(methods * (methods + 1) / (6 * datasets))


def nemenyi_quantile(methods: int) -> float:
    """Returns the 0.95 quantile of the studentized range of M methods, divided by the square root of 2."""
    return float(stats.studentized_range.ppf(LEVEL, methods, np.inf)) / math.sqrt(2)


def groups(mean_ranks: dict[str, float], difference: float) -> tuple[tuple[str, ...], ...]:
    """Returns the largest groups of at least two methods whose mean ranks differ by less than `difference`."""
    names = sorted(mean_ranks, key=mean_ranks.__getitem__)
    found: list[tuple[str, ...]] = []
    for start, first in enumerate(names):
        group = tuple(name for name in names[start:] if mean_ranks[name] - mean_ranks[first] < difference)
        if len(group) > 1 and not (found and set(group) <= set(found[-1])):
            found.append(group)
    return tuple(found)
