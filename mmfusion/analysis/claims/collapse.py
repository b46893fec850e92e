"""Runs that stay at chance while other seeds of their method learn: failures, counted as a rate.

A mean over runs that learned and a run that did not describes neither.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.significance import LEVEL, holm
from mmfusion.analysis.claims.statement import Statement, enumerate_names

SHARE = 0.1  # of the gain over chance of the runs that learned, below which a run has collapsed
AGREEMENT = 5.0  # the least gain of the runs that learned, in their standard deviations


def collapsed(valid: Sequence[float], chance: float, higher: bool) -> list[bool]:
    """Returns which runs of a method collapsed, by their validation scores.

    A run has collapsed if its gain over chance is less than a tenth of that of the runs that learned, which must agree:
    the median gain of the upper half of the runs is at least five standard deviations of those that did not collapse.
    Where all runs are near chance, none has collapsed.

    Args:
      valid: validation scores `[n]`.
      chance: the validation score of the best baseline without inputs.
      higher: whether a higher score is better.
    """
    gains = (np.asarray(valid, np.float64) - chance) * (1.0 if higher else -1.0)
    if len(gains) < 3:
        return [False] * len(gains)
    learned = float(np.median(np.sort(gains)[len(gains) // 2 :]))
    low = gains < SHARE * learned
    others = gains[~low]
    if learned <= 0 or len(others) < 2 or learned < AGREEMENT * others.std(ddof=1):
        return [False] * len(gains)
    return low.tolist()


def set_apart(result: MethodResult, chance: float, higher: bool) -> MethodResult:
    """Returns the result with its collapsed runs as `collapsed_seeds`; over folds, or with failed runs, as it is."""
    if result.folds or not result.trials or len(result.valid) != len(result.seeds):
        return result
    low = collapsed(result.valid, chance, higher)
    kept = [i for i, each in enumerate(low) if not each]
    if len(kept) == len(low):
        return result
    return dataclasses.replace(
        result,
        collapsed_seeds=tuple(seed for seed, each in zip(result.seeds, low, strict=True) if each),
        **{name: tuple(getattr(result, name)[i] for i in kept) for name in ("trials", "seeds", "valid", "test")},
    )


def chance_score(baselines: Sequence[MethodResult], input_free: Sequence[str], higher: bool) -> float | None:
    """Returns the best validation score of the baselines without inputs; None without one."""
    scores = [statistics.fmean(row.valid) for row in baselines if row.method in input_free and row.valid]
    return (max if higher else min)(scores, default=None)


def rate_statement(results: Sequence[MethodResult], reference: MethodResult | None) -> Statement | None:
    """Returns how many runs of each method collapsed, with Fisher's exact test of the rates; None if none did."""
    found = [row for row in results if row.collapsed_seeds]
    if not found:
        return None
    counts = enumerate_names([f"{len(row.collapsed_seeds)} of {_runs(row)} of {row.method}" for row in found])
    text = f"Runs at chance while other seeds of their method learned, left out of all means: {counts}."
    others = [row for row in results if reference and row.method != reference.method and (row.seeds or row in found)]
    if reference and others:
        p = holm([_fisher(other, reference) for other in others])
        differ = [f"{row.method} (p = {each:.3g})" for row, each in zip(others, p, strict=True) if each < 1 - LEVEL]
        says = f"{enumerate_names(differ)} differ" if differ else "no strategy is shown to differ"
        text += f" By Fisher's exact test of the rates, {says} from {reference.method}."
    return Statement("collapsed", "", text)


def _runs(row: MethodResult) -> int:
    return len(row.seeds) + len(row.collapsed_seeds)


def _fisher(first: MethodResult, second: MethodResult) -> float:
    """Returns the two-sided p of Fisher's exact test of the rates of collapsed runs."""
    test: Any = stats.fisher_exact([[len(row.collapsed_seeds), len(row.seeds)] for row in (first, second)])
    return float(test.pvalue)
