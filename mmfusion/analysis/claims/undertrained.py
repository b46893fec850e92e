"""Methods that were still improving when their training ended: undertrained, so that no claim rests on them.

A method is undertrained if the best step is the last one in more than a fifth of its runs, or if its validation score
rises by more than the margin of equivalence over the last fifth of training, in the mean over its runs. The score is
that of the best step so far, which selection would keep: a run that fell at the end, or that early stopping ended, has
a rise of 0.

The rise is measured from the last validation in the first four fifths of a run. With five or more validations at even
steps it covers a fifth of training. With fewer it covers more, so that the rule errs towards `undertrained`: that since
3/4 of training with four, since 1/2 with two. With no validation in the first four fifths, nothing shows that a run was
trained out, and it counts as undertrained.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.statement import NO_RESULT, Statement, enumerate_names

SHARE = 0.2  # of the runs, and of training


@dataclasses.dataclass(frozen=True)
class Training:
    """The training of a run.

    Attributes:
      steps: the steps that it took.
      best_step: the step that validation selected, the first of equal ones.
      history: steps and validation scores of the compared metric, in order.
    """

    steps: int
    best_step: int
    history: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Undertrained:
    """An undertrained method.

    Attributes:
      method: its name.
      runs: the number of its runs.
      best_last: of these, those whose best step is the last one.
      rise: the mean rise of the validation score over the last fifth of training; None where a run does not show it.
      margin: the rise above which it is undertrained.
    """

    method: str
    runs: int
    best_last: int
    rise: float | None
    margin: float


def rise(run: Training, higher: bool) -> float | None:
    """Returns the rise of a run's best score so far over the last fifth of training; None if it does not show it.

    Args:
      run: the run.
      higher: whether a higher score is better; if not, a fall counts as a rise.
    """
    sign = 1.0 if higher else -1.0
    scores = [(step, sign * score) for step, score in run.history if math.isfinite(score)]
    before = [score for step, score in scores if step <= (1 - SHARE) * run.steps]
    return max(score for _, score in scores) - max(before) if before else None


def judge(method: str, runs: Sequence[Training], higher: bool, equivalence: float) -> Undertrained | None:
    """Returns in what a method is undertrained; None if it is trained out.

    Args:
      method: its name.
      runs: its runs, at least one.
      higher: whether a higher score is better.
      equivalence: the margin as a share of the mean best validation score.
    """
    last = sum(run.best_step >= run.steps for run in runs)
    rises = [rise(run, higher) for run in runs]
    known = [each for each in rises if each is not None]
    mean = statistics.fmean(known) if len(known) == len(runs) else None
    best = [(max if higher else min)(score for _, score in run.history) for run in runs if run.history]
    margin = equivalence * abs(statistics.fmean(best)) if best else 0.0
    if last <= SHARE * len(runs) and mean is not None and mean <= margin:
        return None
    return Undertrained(method, len(runs), last, mean, margin)


def undertrained(
    results: Sequence[MethodResult], training: Mapping[str, Training], higher: bool, equivalence: float
) -> tuple[Undertrained, ...]:
    """Returns the undertrained methods; those without a run in `training` are not judged.

    Args:
      results: the methods.
      training: trial name -> its training.
      higher: whether a higher score is better.
      equivalence: see `judge`.
    """
    found = []
    for result in results:
        if runs := [training[name] for name in result.trials if name in training]:
            found.append(judge(result.method, runs, higher, equivalence))
    return tuple(filter(None, found))


def resting_on(
    found: Sequence[Undertrained], results: Sequence[MethodResult], training: Mapping[str, Training]
) -> frozenset[str]:
    """Returns the undertrained methods, and the ensembles of single modalities if one of these is undertrained.

    Args:
      found: the undertrained methods.
      results: all methods; ensembles have runs that are not in `training`.
      training: trial name -> its training.
    """
    names = {one.method for one in found}
    if any(result.unimodal_baseline and result.method in names for result in results):
        names |= {result.method for result in results if result.trials and not training.keys() & set(result.trials)}
    return frozenset(names)


def statement(found: Sequence[Undertrained], metric: str) -> Statement:
    """Returns which methods are undertrained, and in what."""
    names = enumerate_names([f"{one.method} ({_describe(one, metric)})" for one in found])
    text = (
        f"Undertrained, so that no claim rests on them: {names}. More steps, or early stopping, would train them out."
    )
    return Statement("undertrained", NO_RESULT, text)


def _describe(one: Undertrained, metric: str) -> str:
    last = f"the best step is the last one in {one.best_last} of {one.runs} runs"
    if one.rise is None:
        return f"{last}; no validation before the last fifth of training"
    moved = f"validation {metric} improves by {one.rise:.4f} over the last fifth of training, margin {one.margin:.4f}"
    return "; ".join([last] * (one.best_last > SHARE * one.runs) + [moved] * (one.rise > one.margin))


def reason(methods: Sequence[str]) -> str:
    """Returns that methods are undertrained, as a clause; "" without one."""
    return f"{enumerate_names(methods)} {'is' if len(methods) == 1 else 'are'} undertrained" if methods else ""
