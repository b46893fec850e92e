"""The score of every test example in every run, of metrics that are means over examples."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

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


class Examples(NamedTuple):
    """The score `[n]` of each example of a test split, by its id `[n]`; ids are in order."""

    ids: np.ndarray
    scores: np.ndarray


def of_runs(
    plan: Plan, directory: Path, metric: str, more: Mapping[str, Mapping[str, np.ndarray]] | None = None
) -> dict[str, Examples]:
    """Returns the scores of the test examples of each finished run that kept its outputs, by trial.

    It is empty where the metric is no mean over examples.

    Args:
      plan: of the ablation.
      directory: its directory.
      metric: `METRIC`, or `TASK/METRIC` of several tasks.
      more: name -> arrays as in `outputs.npz`, of what has no run of its own.
    """
    prefix, _, name = metric.rpartition("/")
    targets = plan.trials[0].config["data"]["targets"]
    task = prefix or next(iter(targets))
    score = MEANS.get((targets[task]["kind"], name))
    if score is None:
        return {}
    folders = {trial.name: runner.trial_directory(directory, trial) for trial in plan.trials}
    every = {
        name: outputs.read(folder) if (folder / runner.RESULT).exists() else {} for name, folder in folders.items()
    }
    found = {}
    for name, arrays in {**every, **(more or {})}.items():
        if arrays:
            kept = arrays[f"test/{task}/weight"] > 0
            scores = score(*(arrays[f"test/{task}/{key}"][kept] for key in ("output", "target")))
            found[name] = Examples(arrays["test/id"][kept], scores)
    return found


def common(found: Mapping[str, Examples]) -> dict[str, np.ndarray]:
    """Returns the scores `[E]` of the examples that all have, in the order of their ids; none with folds."""
    every = list(found.values())
    if not every:
        return {}
    ids = every[0].ids
    for other in every[1:]:
        ids = np.intersect1d(ids, other.ids, assume_unique=True)
    return {name: each.scores[np.isin(each.ids, ids, assume_unique=True)] for name, each in found.items()}
