"""Differences judged for new data: seeds and test examples as two crossed sources of error.

A test over seeds alone speaks of new training runs on the same test set: two methods that are equal on the population
differ on any finite test set. Here the examples are drawn, too. S seeds · E examples
"""

import dataclasses
import math

import numpy as np
from scipy import stats

from mmfusion.analysis.claims.significance import BETTER, CANNOT_TELL, LEVEL, WORSE


@dataclasses.dataclass(frozen=True)
class NewData:
    """A difference of two methods, for new training runs on new data.

    Attributes:
      difference: the mean over seeds and examples; after selection, corrected for it.
      interval: its 95 % interval.
      p: two-sided, corrected for multiple comparisons.
      verdict: `better`, `worse` or `cannot tell`.
      examples: the number of test examples.
    """

    difference: float
    interval: tuple[float, float]
    p: float
    verdict: str
    examples: int


def standard_error(differences: np.ndarray) -> tuple[float, float]:
    """Returns the standard error of the mean of a two-way table, and its degrees of freedom.

    Seeds and examples are crossed random effects: the variance of the mean is (MS_seeds + MS_examples - MS_rest) / SE,
    with the degrees of freedom of Satterthwaite (1946). It is at least that of either effect alone.

    Args:
      differences: `[S, E]`, the difference of two methods' scores of each example with each seed; S, E >= 2.
    """
    seeds, examples = differences.shape
    mean, of_seeds, of_examples = differences.mean(), differences.mean(axis=1), differences.mean(axis=0)
    ms_seeds = examples * ((of_seeds - mean) ** 2).sum() / (seeds - 1)
    ms_examples = seeds * ((of_examples - mean) ** 2).sum() / (examples - 1)
    rest = differences - of_seeds[:, None] - of_examples + mean
    ms_rest = (rest**2).sum() / ((seeds - 1) * (examples - 1))
    squares, degrees = np.array([ms_seeds, ms_examples, -ms_rest]), (seeds - 1, examples - 1)
    total = squares.sum()
    if total < (alone := max(ms_seeds, ms_examples)):
        return math.sqrt(alone / differences.size), float(degrees[int(ms_examples >= ms_seeds)])
    if not total:
        return 0.0, math.inf
    freedom = total**2 / (squares**2 / (*degrees, (seeds - 1) * (examples - 1))).sum()
    return math.sqrt(total / differences.size), float(freedom)


def on_new_data(differences: np.ndarray, comparisons: int = 1, selection: float = 0.0) -> NewData:
    """Judges a difference for new training runs on new data.

    Args:
      differences: see `standard_error`, signed so that higher is better.
      comparisons: the size of the family, by which p is multiplied (Bonferroni).
      selection: what the selection of the methods is expected to add to the difference.
    """
    error, freedom = standard_error(differences)
    difference = float(differences.mean()) - selection
    if error:
        p = min(1.0, comparisons * float(2 * stats.t.sf(abs(difference) / error, freedom)))
    else:
        p = 0.0 if difference else 1.0
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error if error else 0.0
    found = CANNOT_TELL if p >= 1 - LEVEL else BETTER if difference > 0 else WORSE
    return NewData(difference, (difference - half, difference + half), p, found, differences.shape[1])
