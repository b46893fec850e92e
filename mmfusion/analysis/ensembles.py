"""Ensembles of independently trained single modalities: what their runs know together without being fused.

They need no training beyond the runs of each modality alone, whose outputs they combine seed by seed.

K members · n rows · C classes or labels
"""

import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from scipy import special
from sklearn import base, linear_model, multiclass, pipeline, preprocessing
from sklearn.model_selection import KFold

from mmfusion import metrics
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Plan
from mmfusion.analysis.baselines import TRIALS, Space, draw, outputs_of
from mmfusion.analysis.claims import selection
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.features import one_thread
from mmfusion.training import outputs
from mmfusion.training.evaluation import SCORES

MEAN, STACKED = "ensemble (mean)", "ensemble (stacked)"
PARTS = 5  # of the validation rows, each of which is predicted by a stacking model fitted on the others
COST = (0.001, 10.0)

Arrays = Mapping[str, np.ndarray]  # as in `outputs.npz`


class Ensembles(NamedTuple):
    """The ensembles of an ablation.

    Attributes:
      results: a result for each ensemble; `trials` are names of its members' runs taken together.
      outputs: such a name -> its arrays of the test split, as in `outputs.npz`.
    """

    results: list[MethodResult]
    outputs: dict[str, Arrays]


class Joined(NamedTuple):
    """The outputs of all members on a split.

    Attributes:
      outputs: `[K, n, C]` float64, of a regression with C = 1; NaN in rows of which a member has no output.
      targets: `[n, ...]`.
      weight: `[n]`, 0 on rows that do not count.
      ids: `[n]`, in order: those that any member has.
    """

    outputs: np.ndarray
    targets: np.ndarray
    weight: np.ndarray
    ids: np.ndarray


@one_thread
def ensembles(
    plan: Plan, methods: Sequence[MethodResult], directory: Path, metric: str, higher: bool, trials: int = TRIALS
) -> Ensembles:
    """Returns the mean and the stacked ensemble of the runs of each modality alone, one of each seed.

    The members are the modalities' results at their selected hyperparameters; of several variations of one modality
    alone, that with the best validation score. A seed that lacks a member has failed. There are no ensembles of fewer
    than two modalities, without outputs of runs, and of metrics that follow from no outputs, such as losses.

    Args:
      plan: of the ablation.
      methods: the results of its methods.
      directory: its directory.
      metric: `METRIC`, or `TASK/METRIC` of several tasks.
      higher: whether a higher score is better.
      trials: the number of settings of the stacking model.
    """
    prefix, _, name = metric.rpartition("/")
    targets = plan.trials[0].config["data"]["targets"]
    task = prefix or next(iter(targets))
    target = _Target(targets[task]["kind"], tuple(targets[task].get("metrics") or ()), name, higher)
    members = _members(plan, methods, higher)
    found = _runs(plan, members, directory)
    if len(members) < 2 or name == "loss" or not any(all(arrays) for arrays in found.values()):
        return Ensembles([], {})
    results, kept = [], {}
    for method in (MEAN, STACKED):
        runs = {cell: _combine(method, arrays, task, target, trials) for cell, arrays in found.items() if all(arrays)}
        finished = {cell: run for cell, run in runs.items() if run is not None}
        results.append(_result(method, finished, [cell for cell in found if cell not in finished], members))
        kept |= {_name(method, cell): run.arrays for cell, run in finished.items()}
    return Ensembles(results, kept)


Cell = tuple[int | None, int]  # the fold, None without folds, and the seed


class _Run(NamedTuple):
    """What an ensemble of one run of each member gives."""

    valid: float
    test: float
    setting: float | None
    arrays: Arrays


class _Target(NamedTuple):
    kind: str
    groups: tuple[str, ...]
    metric: str
    higher: bool


def _members(plan: Plan, methods: Sequence[MethodResult], higher: bool) -> list[MethodResult]:
    """Returns the result of each modality alone."""
    modality = {
        trial.method: next(iter(trial.config["data"]["modalities"]))
        for trial in plan.trials
        if trial.unimodal_baseline and not trial.fusion
    }
    by_modality: dict[str, list[MethodResult]] = {}
    for row in methods:
        if row.method in modality:
            by_modality.setdefault(modality[row.method], []).append(row)
    return [selection.best(rows, higher, fewest_failures_first=False) or rows[0] for rows in by_modality.values()]


def _runs(plan: Plan, members: Sequence[MethodResult], directory: Path) -> dict[Cell, list[Arrays]]:
    """Returns the members' outputs by fold and seed; empty where a member has none."""
    by_name = {trial.name: trial for trial in plan.trials}
    cells = [dict(zip(_cells(row.folds, row.seeds), row.trials, strict=True)) for row in members]
    failed = {cell for row in members for cell in _cells(row.failed_folds, row.failed_seeds)}
    return {
        cell: [
            outputs.read(runner.trial_directory(directory, by_name[own[cell]])) if cell in own else {} for own in cells
        ]
        for cell in sorted({*failed, *(cell for own in cells for cell in own)})
    }


def _cells(folds: Sequence[int], seeds: Sequence[int]) -> list[Cell]:
    return list(zip(folds or (None,) * len(seeds), seeds, strict=True))


def _name(method: str, cell: Cell) -> str:
    fold, seed = cell
    return f"{method}_seed={seed}" if fold is None else f"{method}_seed={seed}_fold={fold}"


def _combine(method: str, arrays: Sequence[Arrays], task: str, target: _Target, trials: int) -> _Run | None:
    """Returns the ensemble of one run of each member; None if a score is undefined.

    The validation score of the stacked ensemble is of rows that were left out as it was fitted.
    """
    valid, test = (join(arrays, split, task) for split in ("valid", "test"))
    if method == MEAN:
        on_valid, on_test, setting = mean(valid.outputs, target.kind), mean(test.outputs, target.kind), None
    else:
        stacked = _stacked(valid, test, target, trials)
        if stacked is None:
            return None
        on_valid, on_test, setting = stacked
    valid_score, test_score = _score(on_valid, valid, target), _score(on_test, test, target)
    if valid_score is None or test_score is None:
        return None
    content = {"output": on_test, "target": test.targets, "weight": test.weight}
    kept = {"test/id": test.ids, **{f"test/{task}/{key}": value for key, value in content.items()}}
    return _Run(valid_score, test_score, setting, kept)


def join(arrays: Sequence[Arrays], split: str, task: str) -> Joined:
    """Returns the members' outputs on all rows that any of them has.

    Args:
      arrays: of each member, as in `outputs.npz`.
      split: `valid` or `test`.
      task: the target.
    """
    ids = np.unique(np.concatenate([own[f"{split}/id"] for own in arrays]))
    found = []
    fields: dict[str, np.ndarray] = {}
    for own in arrays:
        at = np.searchsorted(ids, own[f"{split}/id"])
        output = own[f"{split}/{task}/output"]
        table = np.full((len(ids), *output.shape[1:]), np.nan)
        table[at] = output
        found.append(table.reshape(len(ids), -1))
        for key in ("target", "weight"):
            values = own[f"{split}/{task}/{key}"]
            field = fields.setdefault(key, np.zeros((len(ids), *values.shape[1:]), values.dtype))
            field[at] = values
    return Joined(np.stack(found), fields["target"], fields["weight"], ids)


def mean(outputs: np.ndarray, kind: str) -> np.ndarray:
    """Returns the outputs of the mean of the members' probabilities, or of their values.

    Args:
      outputs: `[K, n, C]`, NaN in rows that a member lacks; each row has a member.
      kind: of the target.

    Returns:
      Log-probabilities `[n, C]`, for several labels log-odds, or for regression values `[n]`.
    """
    if kind == "regression":
        return np.nanmean(outputs, axis=0)[:, 0]
    absent = np.isnan(outputs).any(axis=2, keepdims=True)
    count = (~absent).sum(axis=0)  # [n, 1]

    def log_mean(log_probabilities: np.ndarray) -> np.ndarray:
        return special.logsumexp(np.where(absent, -np.inf, log_probabilities), axis=0) - np.log(count)

    if kind == "multilabel":
        return log_mean(special.log_expit(outputs)) - log_mean(special.log_expit(-outputs))
    return log_mean(special.log_softmax(outputs, axis=2))


def _stacked(
    valid: Joined, test: Joined, target: _Target, trials: int
) -> tuple[np.ndarray, np.ndarray, float | None] | None:
    """Returns the outputs of left-out validation rows and of the test rows, and the setting with the best ones.

    None where a part of the validation rows has one class only.
    """
    counts = np.flatnonzero(valid.weight > 0)
    y = valid.targets[counts]
    if target.kind == "multilabel":
        y = (y >= 0.5).astype(int)
    if len(counts) < PARTS:
        return None
    parts = list(KFold(PARTS, shuffle=True, random_state=0).split(counts))
    if target.kind == "classification" and any(len(np.unique(y[rest])) < 2 for rest, _ in parts):
        return None
    columns = [_columns(joined.outputs, valid.outputs, target.kind) for joined in (valid, test)]
    x = columns[0][counts]
    classes = valid.outputs.shape[2]
    estimator, space = _stacking_model(target.kind)

    def predict(options: Mapping[str, float], rest: np.ndarray, rows: np.ndarray) -> np.ndarray:
        model = cast(Any, base.clone(estimator)).set_params(**options)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # not converged; a constant label
            return outputs_of(model.fit(x[rest], y[rest]), rows, target.kind, classes)

    def left_out(options: Mapping[str, float]) -> np.ndarray:
        found = np.zeros(len(valid.ids) if target.kind == "regression" else (len(valid.ids), classes))
        for rest, part in parts:
            found[counts[part]] = predict(options, rest, x[part])
        return found

    sign = 1.0 if target.higher else -1.0
    best: tuple[float, np.ndarray, Mapping[str, float]] | None = None
    for options in draw(estimator, space, trials):
        found = left_out(options)
        score = _score(found, valid, target)
        if score is not None and (best is None or sign * score > best[0]):
            best = sign * score, found, options
    if best is None:
        return None
    _, found, options = best
    return found, predict(options, np.arange(len(counts)), columns[1]), next(iter(options.values()))


def _stacking_model(kind: str) -> tuple[Any, Space]:
    """Returns the model of stacking, and the search space of its regularisation."""
    scaler = preprocessing.StandardScaler()
    if kind == "regression":
        return pipeline.make_pipeline(scaler, linear_model.Ridge()), {"ridge__alpha": (0.01, 1000.0)}
    model = linear_model.LogisticRegression(max_iter=300)
    if kind == "multilabel":
        each = multiclass.OneVsRestClassifier(model)
        return pipeline.make_pipeline(scaler, each), {"onevsrestclassifier__estimator__C": COST}
    return pipeline.make_pipeline(scaler, model), {"logisticregression__C": COST}


def _columns(outputs: np.ndarray, valid: np.ndarray, kind: str) -> np.ndarray:
    """Returns the members' log-probabilities, log-odds or values `[n, KC]`; the mean on validation where one lacks."""
    if kind == "classification":
        outputs, valid = special.log_softmax(outputs, axis=2), special.log_softmax(valid, axis=2)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a member without any validation row
        fallback = np.nan_to_num(np.nanmean(valid, axis=1, keepdims=True))  # [K, 1, C]
    filled = np.where(np.isnan(outputs), fallback, outputs)  # [K, n, C]
    return np.moveaxis(filled, 0, 1).reshape(outputs.shape[1], -1)


def _score(found: np.ndarray, joined: Joined, target: _Target) -> float | None:
    scores = SCORES[target.kind](found, joined.targets, joined.weight)
    for group in target.groups:
        scores |= metrics.REGRESSION_SCORES[group](found, joined.targets, joined.weight)
    return scores[target.metric]


def _result(
    method: str, finished: Mapping[Cell, _Run], failed: Sequence[Cell], members: Sequence[MethodResult]
) -> MethodResult:
    settings = {run.setting for run in finished.values()} - {None}
    return MethodResult(
        method=method,
        unimodal_baseline=True,
        selected={"regularization": settings.pop() if len(settings) == 1 else "by seed"} if settings else {},
        trials=tuple(_name(method, cell) for cell in finished),
        seeds=tuple(seed for _, seed in finished),
        failed_seeds=tuple(seed for _, seed in failed),
        valid=tuple(run.valid for run in finished.values()),
        test=tuple(run.test for run in finished.values()),
        parameters=None,
        folds=tuple(fold for fold, _ in finished if fold is not None),
        failed_folds=tuple(fold for fold, _ in failed if fold is not None),
        test_over_train=statistics.fmean(row.test_over_train for row in members),
    )
