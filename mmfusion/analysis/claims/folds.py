"""Statistics over folds or other splits of the same rows, whose training rows overlap: never as if independent."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats

from mmfusion.analysis.claims.significance import FOLDS, LEVEL, Comparison, paired_differences

MIN_FOLDS = 3  # with two, the mean has one degree of freedom, and equal differences are common


def variance_factor(count: int, test_over_train: float) -> float:
    """Returns the factor of the sample variance in the variance of a mean over J splits: 1 / J + n_test / n_train.

    It replaces the 1 / J of independent samples (Nadeau and Bengio 2003, "Inference for the generalization error").
    """
    return 1 / count + test_over_train


def corrected_t(values: Sequence[float] | np.ndarray, test_over_train: float) -> tuple[float, float]:
    """Returns the corrected resampled t of a mean over splits, and its two-sided p with J - 1 degrees of freedom.

    Args:
      values: the value `[J]` of each split, such as a difference of two methods.
      test_over_train: the number of test rows of a split, divided by that of its training rows.
    """
    values = np.asarray(values, np.float64)
    mean, error = values.mean(), _error(values, test_over_train)
    if not error:
        return (math.copysign(math.inf, mean), 0.0) if mean else (0.0, 1.0)
    return float(mean / error), float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))


def corrected_interval(
    values: Sequence[float] | np.ndarray, test_over_train: float, level: float = LEVEL
) -> tuple[float, float]:
    """Returns the interval of a mean over splits by the corrected resampled t; for arguments see `corrected_t`."""
    values = np.asarray(values, np.float64)
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * _error(values, test_over_train)
    return float(values.mean() - half), float(values.mean() + half)


def _error(values: np.ndarray, test_over_train: float) -> float:
    """Returns the corrected standard error of the mean; 0 if all values are equal but for rounding."""
    if np.allclose(values, values[0], rtol=1e-9, atol=1e-12):
        return 0.0
    return math.sqrt(variance_factor(len(values), test_over_train) * values.var(ddof=1))


def compare_folds(a: Sequence[float], b: Sequence[float], test_over_train: float) -> Comparison:
    """Compares the scores of A and B, where higher is better, in the same folds in the same order.

    Args:
      a: scores `[J]`, finite, each a mean over the seeds of a fold.
      b: scores `[J]`, finite.
      test_over_train: see `corrected_t`.

    Raises:
      ValueError: the lengths differ, there are fewer than two folds, or a score is not finite.
    """
    differences = paired_differences(a, b)
    return Comparison(
        difference=float(differences.mean()),
        interval=corrected_interval(differences, test_over_train),
        narrow_interval=corrected_interval(differences, test_over_train, 2 * LEVEL - 1),
        p=corrected_t(differences, test_over_train)[1],
        better=float(((differences > 0) + 0.5 * (differences == 0)).mean()),
        n=len(differences),
        over=FOLDS,
        variance_factor=variance_factor(len(differences), test_over_train),
    )


def fold_means(values: Sequence[float], folds: Sequence[int]) -> list[float]:
    """Returns the mean of the values of each fold, in the order of the folds' numbers."""
    by_fold: dict[int, list[float]] = {}
    for value, fold in zip(values, folds, strict=True):
        by_fold.setdefault(fold, []).append(value)
    return [statistics.fmean(by_fold[fold]) for fold in sorted(by_fold)]
