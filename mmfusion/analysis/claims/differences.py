"""Paired differences between methods on test, corrected for the family of comparisons and for selection."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mmfusion.analysis.claims.crossed import NewData, on_new_data
from mmfusion.analysis.claims.folds import MIN_FOLDS, compare_folds, fold_means
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.significance import (
    BETTER,
    CANNOT_TELL,
    EQUIVALENT,
    FOLDS,
    WORSE,
    Comparison,
    compare,
    holm,
    max_t,
    seeds_needed,
    verdict,
)
from mmfusion.analysis.claims.undertrained import Training

SELECTION_DRAWS = 1_000


@dataclasses.dataclass(frozen=True)
class Scope:
    """What comparisons need beside the scores of runs.

    Attributes:
      equivalence: the margin of equivalence as a share of the score of the other method.
      examples: trial name, or name of a baseline without runs -> the scores `[E]` of the same test examples, whose
        mean is the metric; empty where the metric is no such mean.
      tuned: the number of hyperparameter settings that each method's were selected from, with the seeds of the scores.
      trials: the number of settings that each method was tuned with, with other seeds; 0: none was tuned.
      untuned: methods all of whose settings failed.
      test_examples: the number of test examples.
      training: trial name -> its training; empty: no method is judged for being undertrained.
      undertrained: the methods that no verdict may rest on.
    """

    equivalence: float = 0.01
    examples: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    tuned: int = 1
    trials: int = 0
    untuned: tuple[str, ...] = ()
    test_examples: int = 0
    training: Mapping[str, Training] = dataclasses.field(default_factory=dict)
    undertrained: frozenset[str] = frozenset()


NO_SCOPE = Scope()


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two methods over the seeds, or the folds, that both finished.

    Attributes:
      method: the method's name.
      other: the name of the method that it is compared with.
      comparison: of their test scores, signed so that higher is better; None with fewer than two pairs.
      p: p value, corrected for multiple comparisons.
      verdict: `better`, `worse`, `equivalent` or `cannot tell`, over new training runs on this test set.
      seeds_needed: the number of seeds at which this verdict would tell; None above 1,000, or over folds.
      failed_seeds: seeds on which either method failed or collapsed, which the comparison leaves out.
      failed_folds: over folds, those in which either method failed on a seed, which the comparison leaves out.
      selection: what the selection of the two methods added to the difference, by which it is corrected.
      new_data: the difference for new training runs on new data; None where it is unknown.
      undertrained: the undertrained methods that a verdict would rest on, for which it is `cannot tell`.
    """

    method: str
    other: str
    comparison: Comparison | None
    p: float | None
    verdict: str
    seeds_needed: int | None
    failed_seeds: tuple[int, ...] = ()
    failed_folds: tuple[int, ...] = ()
    selection: float = 0.0
    new_data: NewData | None = None
    undertrained: tuple[str, ...] = ()


def differences(
    pairs: Sequence[tuple[MethodResult, MethodResult]], higher: bool, scope: Scope = NO_SCOPE
) -> list[Difference]:
    """Compares pairs of methods over seeds or folds; p values are corrected for the family of pairs.

    Args:
      pairs: a method and the method that it is compared with.
      higher: whether a higher score is better.
      scope: what else the comparisons need.
    """
    comparisons = [_compare(result, other, higher) for result, other in pairs]
    compared = [pair for pair, comparison in zip(pairs, comparisons, strict=True) if comparison]
    if any(comparison and comparison.over == FOLDS for comparison in comparisons):
        corrected = iter(holm([comparison.p for comparison in comparisons if comparison]))
    else:
        corrected = iter(max_t(_table(compared, higher)) if compared else [])
    judged = [_new_data(result, other, higher, scope, len(compared)) for result, other in pairs]
    return [
        _difference(pair, ([], []), comparison, next(corrected) if comparison else None, len(compared), scope, new_data)
        for pair, comparison, new_data in zip(pairs, comparisons, judged, strict=True)
    ]


def selected_difference(
    candidates: Sequence[MethodResult],
    other_candidates: Sequence[MethodResult],
    result: MethodResult,
    other: MethodResult,
    higher: bool,
    scope: Scope = NO_SCOPE,
) -> Difference:
    """Compares two methods, each selected among several candidates.

    Over seeds, p is valid for any selection, and the difference and its interval are corrected by the bootstrap for
    what the selection adds to it. Over folds p is corrected for every pair of candidates (Bonferroni), as signs of
    folds must not be flipped. That the first is better than the best of others rests on every one of these, and that it
    is worse on every candidate: an undertrained one might be the best.

    Args:
      candidates: the methods that `result` was selected from.
      other_candidates: the methods that `other` was selected from.
      result: the first method.
      other: the method that it is compared with.
      higher: whether a higher score is better.
      scope: what else the comparison needs.
    """
    comparison, pair = _compare(result, other, higher), (result, other)
    groups = candidates, other_candidates
    pairs = [(first, second) for first in candidates for second in other_candidates]
    if comparison is None:
        return _difference(pair, groups, None, None, 1, scope, None)
    if comparison.over == FOLDS:
        return _difference(pair, groups, comparison, min(1.0, len(pairs) * comparison.p), len(pairs), scope, None)
    (index,) = (i for i, (first, second) in enumerate(pairs) if first is result and second is other)
    p = float(max_t(_table(pairs, higher))[index])
    gained = selection_gain(candidates, other_candidates, higher)
    new_data = _new_data(result, other, higher, scope, 1, gained)
    return _difference(pair, groups, comparison.moved(-gained), p, len(pairs), scope, new_data, gained)


def selection_gain(candidates: Sequence[MethodResult], other_candidates: Sequence[MethodResult], higher: bool) -> float:
    """Returns what selection by validation is expected to add to the difference of two selected methods on test.

    Validation and test scores of a run have the luck of its seed in common. Seeds are drawn with replacement, and the
    methods are selected in each draw: their difference in the draw is compared with that of the same methods over all
    seeds (Efron 1983), times the square root of n / (n - 1), by which a resampled mean varies less.
    """
    seeds = sorted({seed for row in (*candidates, *other_candidates) for seed in row.seeds})
    if len(seeds) < 2 or len(candidates) == len(other_candidates) == 1:
        return 0.0
    draws = np.random.default_rng(0).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), SELECTION_DRAWS)
    draws[(draws > 0).sum(axis=1) < 2] = 1  # a draw of one seed only has no difference to compare
    gained = [_gain(group, seeds, draws, higher) for group in (candidates, other_candidates)]
    return float((gained[0] - gained[1]).mean()) * math.sqrt(len(seeds) / (len(seeds) - 1))


def _gain(rows: Sequence[MethodResult], seeds: Sequence[int], draws: np.ndarray, higher: bool) -> np.ndarray:
    """Returns for each draw of seeds how much better the method selected in it scores in the draw than over all."""
    rows = [row for row in rows if row.seeds and len(row.valid) == len(row.seeds)]
    if len(rows) < 2:
        return np.zeros(len(draws))
    sign = 1.0 if higher else -1.0
    valid, test = np.full((2, len(rows), len(seeds)), np.nan)
    for i, row in enumerate(rows):
        at = [seeds.index(seed) for seed in row.seeds]
        valid[i, at], test[i, at] = sign * np.array(row.valid), sign * np.array(row.test)
    present = np.isfinite(test)
    counts = np.maximum(present @ draws.T, 1)  # [k, draws]
    drawn = [np.where(present, x, 0.0) @ draws.T / counts for x in (valid, test)]
    selected = np.where(present @ draws.T > 0, drawn[0], -np.inf).argmax(axis=0)
    return drawn[1][selected, np.arange(len(draws))] - np.nanmean(test, axis=1)[selected]


def _table(pairs: Sequence[tuple[MethodResult, MethodResult]], higher: bool) -> np.ndarray:
    """Returns the differences of test scores `[pairs, seeds]`, higher is better; NaN for a seed that one lacks."""
    seeds = sorted({seed for first, second in pairs for seed in set(first.seeds) & set(second.seeds)})
    sign = 1.0 if higher else -1.0
    table = np.full((len(pairs), len(seeds)), np.nan)
    for i, pair in enumerate(pairs):
        scores, other_scores = (dict(zip(x.seeds, x.test, strict=True)) for x in pair)
        for j, seed in enumerate(seeds):
            if seed in scores and seed in other_scores:
                table[i, j] = sign * (scores[seed] - other_scores[seed])
    return table


def _new_data(
    result: MethodResult, other: MethodResult, higher: bool, scope: Scope, comparisons: int, selection: float = 0.0
) -> NewData | None:
    """Returns the difference on new data; None over folds, or without the scores of every example of both."""
    scores, other_scores = (_example_scores(row, scope) for row in (result, other))
    seeds = sorted(scores.keys() & other_scores.keys())
    if result.folds or len(seeds) < 2 or len({len(x[seed]) for x in (scores, other_scores) for seed in seeds}) != 1:
        return None
    sign = 1.0 if higher else -1.0
    table = np.stack([sign * (scores[seed] - other_scores[seed]) for seed in seeds])
    return on_new_data(table, comparisons, selection) if table.shape[1] > 1 else None


def _example_scores(row: MethodResult, scope: Scope) -> dict[int, np.ndarray]:
    """Returns the scores `[E]` of every test example by seed; a baseline without runs has one for all seeds."""
    names = row.trials or (row.method,) * len(row.seeds)
    return {seed: scope.examples[name] for seed, name in zip(row.seeds, names, strict=True) if name in scope.examples}


def _paired(result: MethodResult, other: MethodResult, higher: bool) -> tuple[list[float], list[float]]:
    """Returns the test scores on the seeds that both finished, signed so that higher is better.

    Over folds they are means of each fold over the seeds that both finished in it.
    """
    sign = 1.0 if higher else -1.0
    scores, other_scores = (dict(zip(x.cells, x.test, strict=True)) for x in (result, other))
    cells = sorted(set(scores) & set(other_scores))
    paired = [[sign * found[cell] for cell in cells] for found in (scores, other_scores)]
    if result.folds:
        paired = [fold_means(values, [fold for fold, _ in cells]) for values in paired]
    return paired[0], paired[1]


def _compare(result: MethodResult, other: MethodResult, higher: bool) -> Comparison | None:
    """Returns the comparison of two methods; None with fewer than two seeds or `MIN_FOLDS` folds."""
    a, b = _paired(result, other, higher)
    if len(a) < (MIN_FOLDS if result.folds else 2):
        return None
    return compare_folds(a, b, max(result.test_over_train, other.test_over_train)) if result.folds else compare(a, b)


def _difference(
    pair: tuple[MethodResult, MethodResult],
    groups: tuple[Sequence[MethodResult], Sequence[MethodResult]],
    comparison: Comparison | None,
    p: float | None,
    family: int,
    scope: Scope,
    new_data: NewData | None,
    selection: float = 0.0,
) -> Difference:
    result, other = pair
    folds = tuple(sorted({*result.failed_folds, *other.failed_folds}))
    left_out = {seed for row in pair for seed in (*row.failed_seeds, *row.collapsed_seeds)}
    failed = () if folds else tuple(sorted(left_out))
    if comparison is None or p is None:
        return Difference(result.method, other.method, None, None, CANNOT_TELL, None, failed, folds)
    margin = scope.equivalence * abs(other.mean)
    found, needed = verdict(comparison, p, margin), None
    undertrained = _rests_on_undertrained(pair, groups, found, scope)
    if undertrained:
        found = CANNOT_TELL
    elif found == CANNOT_TELL and comparison.over != FOLDS:
        a, b = _paired(result, other, higher=True)  # `seeds_needed` ignores the sign of the differences
        needed = seeds_needed(np.subtract(a, b) - selection * np.sign(np.mean(np.subtract(a, b))), family, margin)
    if new_data and _rests_on_undertrained(pair, groups, new_data.verdict, scope):
        new_data = dataclasses.replace(new_data, verdict=CANNOT_TELL)
    return Difference(
        result.method, other.method, comparison, p, found, needed, failed, folds, selection, new_data, undertrained
    )


def _rests_on_undertrained(
    pair: tuple[MethodResult, MethodResult],
    groups: tuple[Sequence[MethodResult], Sequence[MethodResult]],
    found: str,
    scope: Scope,
) -> tuple[str, ...]:
    """Returns the undertrained methods that a verdict rests on: of the pair, and of those they were selected from."""
    candidates, others = groups
    rivals = {BETTER: others, WORSE: candidates, EQUIVALENT: (*candidates, *others)}.get(found, ())
    names = dict.fromkeys(row.method for row in (*pair, *rivals))
    return tuple(name for name in names if name in scope.undertrained)
