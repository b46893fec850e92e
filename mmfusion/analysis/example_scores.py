"""The score of every test example in every run, of metrics that are means over examples."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import special

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Plan
from mmfusion.training import outputs


def _probability(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    return special.log_softmax(np.float64(logits), axis=1)[np.arange(len(target)), target]


def _brier(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    return ((special.softmax(np.float64(logits), axis=1) - np.eye(logits.shape[1])[target]) ** 2).sum(axis=1)


def _correct(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    return (logits.argmax(axis=1) == target).astype(np.float64)


# (kind of target, metric) -> the function of outputs [n, ...] and targets [n, ...] whose mean is the metric
MEANS: dict[tuple[str, str], Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ("classification", "accuracy"): _correct,
    ("classification", "nll"): lambda logits, target: -_probability(logits, target),
    ("classification", "brier"): _brier,
    ("regression", "mae"): lambda value, target: np.abs(np.float64(value) - target),
}


def of_runs(plan: Plan, directory: Path, metric: str) -> dict[str, np.ndarray]:
    """Returns the scores `[E]` of the test examples that all runs have, in the order of their ids, by trial.

    It is empty where the metric is no mean over examples, with folds, and without the outputs of all finished runs.

    Args:
      plan: of the ablation.
      directory: its directory.
      metric: `METRIC`, or `TASK/METRIC` of several tasks.
    """
    prefix, _, name = metric.rpartition("/")
    targets = plan.trials[0].config["data"]["targets"]
    task = prefix or next(iter(targets))
    score = MEANS.get((targets[task]["kind"], name))
    if score is None:
        return {}
    ids: dict[str, np.ndarray] = {}
    scores: dict[str, np.ndarray] = {}
    for trial in plan.trials:
        folder = runner.trial_directory(directory, trial)
        arrays = outputs.read(folder) if (folder / runner.RESULT).exists() else {}
        if arrays:
            kept = arrays[f"test/{task}/weight"] > 0
            ids[trial.name] = arrays["test/id"][kept]
            scores[trial.name] = score(*(arrays[f"test/{task}/{key}"][kept] for key in ("output", "target")))
    return _common(ids, scores)


def _common(ids: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the scores of the examples that all have."""
    every: Sequence[np.ndarray] = list(ids.values())
    if not every:
        return {}
    common = every[0]
    for other in every[1:]:
        common = np.intersect1d(common, other, assume_unique=True)
    return {name: scores[name][np.isin(ids[name], common, assume_unique=True)] for name in ids}
