"""Selection of hyperparameters and methods on validation.

Test scores are read once everything has been selected: see `differences.py`.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import REFERENCE, Trial, fold_of
from mmfusion.analysis.claims.folds import corrected_interval, fold_means
from mmfusion.analysis.claims.significance import mean_interval
from mmfusion.errors import UserError

BY_FOLD = "by fold"


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """A method at the hyperparameters that validation selected for it.

    Attributes:
      method: its name.
      unimodal_baseline: see `Trial`.
      selected: the selected hyperparameters, by config key.
      trials: names of the trials that have a validation and a test score, in the order of `seeds`.
      seeds: the seeds of these trials, in order.
      failed_seeds: the seeds that failed or whose scores are undefined.
      valid: the validation scores that are defined.
      test: the test scores of `seeds`.
      parameters: the number of parameters of the model.
      fusion: see `Trial`.
      variation: see `Trial`.
      folds: the folds of `trials`; empty without folds.
      failed_folds: the folds of `failed_seeds`.
      test_over_train: over folds, the mean number of test rows divided by that of training rows.
      collapsed_seeds: seeds of runs at chance, which are not in `seeds`; see `collapse.py`.
    """

    method: str
    unimodal_baseline: bool
    selected: dict[str, Any]
    trials: tuple[str, ...]
    seeds: tuple[int, ...]
    failed_seeds: tuple[int, ...]
    valid: tuple[float, ...]
    test: tuple[float, ...]
    parameters: int | None
    fusion: str = ""
    variation: str = ""
    folds: tuple[int, ...] = ()
    failed_folds: tuple[int, ...] = ()
    test_over_train: float = 0.0
    collapsed_seeds: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """The mean test score, over folds of the means of each fold; NaN without a score."""
        return statistics.fmean(self.units) if self.test else math.nan

    @property
    def cells(self) -> tuple[Any, ...]:
        """What pairs the runs of two methods: their seeds, or their folds and seeds."""
        return tuple(zip(self.folds, self.seeds, strict=True)) if self.folds else self.seeds

    @property
    def units(self) -> list[float]:
        """The test scores that statistics are made of: of each seed, or the mean of each fold."""
        return fold_means(self.test, self.folds) if self.folds else list(self.test)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean test score; None with fewer than two seeds or folds."""
        if len(self.units) < 2:
            return None
        if self.folds:
            return corrected_interval(self.units, self.test_over_train)
        return mean_interval(np.array(self.test))

    @property
    def is_reference(self) -> bool:
        """Whether its strategy is the reference strategy."""
        return self.fusion == REFERENCE


def references(results: Sequence[MethodResult]) -> dict[str, MethodResult]:
    """Returns the reference of each fused method.

    It is `concat` with the same variation, or the first method if all methods are variations of one strategy.
    """
    fused = [result for result in results if not result.unimodal_baseline]
    if len({result.fusion for result in fused}) == 1:
        return {result.method: fused[0] for result in fused[1:]}
    by_variation = {result.variation: result for result in fused if result.is_reference}
    return {
        result.method: by_variation[result.variation]
        for result in fused
        if result.variation in by_variation and not result.is_reference
    }


def direction(trials: Sequence[Trial], metric: str) -> bool:
    """Returns whether a higher value of the metric is better.

    Raises:
      UserError: the trials do not have the metric.
    """
    metrics = configs.selectable(configs.from_json(trials[0].config))
    if metric not in metrics:
        raise UserError("the runs do not have this metric", path="--metric", value=metric, choices=metrics)
    return metrics[metric]


def method_results(
    trials: Sequence[Trial], results: Mapping[str, Mapping[str, Any]], metric: str
) -> list[MethodResult]:
    """Returns a result per method, in the plan's order, at the hyperparameters with the best mean validation score.

    Hyperparameters that fail on fewer seeds rank first, regardless of their scores. In each fold they are selected by
    themselves, as the validation rows of one fold are test rows of another.

    Args:
      trials: the trials of the plan.
      results: trial name -> its `result.json`; failed trials are missing.
      metric: the metric that methods are selected and compared by.
    """
    higher = direction(trials, metric)
    # method -> fold -> hyperparameters -> a trial per seed
    search_space: dict[str, dict[int | None, dict[str, list[Trial]]]] = {}
    for trial in trials:
        folds = search_space.setdefault(trial.method, {})
        folds.setdefault(fold_of(trial), {}).setdefault(repr(trial.hyperparameters), []).append(trial)

    def score(trial: Trial, split: str) -> float | None:
        value = results.get(trial.name, {}).get(split, {}).get(metric)
        return value if value is not None and math.isfinite(value) else None

    def rank(candidate: list[Trial]) -> tuple[int, float]:
        scores = _defined(score(trial, "valid") for trial in candidate)
        mean = statistics.fmean(scores) if scores else 0.0
        return len(scores), mean if higher else -mean

    found = []
    for method, folds in search_space.items():
        chosen = [max(candidates.values(), key=rank) for candidates in folds.values()]  # the first in case of a tie
        best = [trial for candidate in chosen for trial in candidate]
        scores = {trial.name: (score(trial, "valid"), score(trial, "test")) for trial in best}
        finished = [trial for trial in best if None not in scores[trial.name]]
        failed = [trial for trial in best if trial not in finished]
        ratios = [_test_over_train(results[trial.name]) for trial in finished if fold_of(trial) is not None]
        found.append(
            MethodResult(
                method=method,
                unimodal_baseline=best[0].unimodal_baseline,
                selected=common([candidate[0].hyperparameters for candidate in chosen]),
                trials=tuple(trial.name for trial in finished),
                seeds=tuple(trial.config["seed"] for trial in finished),
                failed_seeds=tuple(trial.config["seed"] for trial in failed),
                valid=tuple(_defined(valid for valid, _ in scores.values())),
                test=tuple(_defined(scores[trial.name][1] for trial in finished)),
                parameters=results[finished[0].name]["parameters"] if finished else None,
                fusion=best[0].fusion,
                variation=best[0].variation,
                folds=tuple(fold for trial in finished if (fold := fold_of(trial)) is not None),
                failed_folds=tuple(fold for trial in failed if (fold := fold_of(trial)) is not None),
                test_over_train=statistics.fmean(ratios) if ratios else 0.0,
            )
        )
    return found


def _test_over_train(result: Mapping[str, Any]) -> float:
    examples = result["data"]["examples"]
    return examples["test"] / examples["train"]


def common(selected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the hyperparameters that all folds selected; `by fold` where they differ."""
    return {
        key: value if all(each[key] == value for each in selected) else BY_FOLD for key, value in selected[0].items()
    }


def _defined(scores) -> list[float]:
    return [score for score in scores if score is not None]


def best(results: Sequence[MethodResult], higher: bool, *, fewest_failures_first: bool = True) -> MethodResult | None:
    """Returns the result with the best mean validation score; None if there is none.

    Args:
      results: the methods.
      higher: whether a higher score is better.
      fewest_failures_first: whether methods that failed on fewer seeds rank first. Otherwise only those methods rank
        last that have less than half as many finished seeds as the method with the most.
    """
    sign = 1.0 if higher else -1.0
    most = max((len(result.valid) for result in results), default=0)

    def rank(result: MethodResult) -> tuple[int, float]:
        finished = len(result.valid)
        return finished if fewest_failures_first else 2 * finished >= most, sign * statistics.fmean(result.valid)

    return max((result for result in results if result.valid), key=rank, default=None)
