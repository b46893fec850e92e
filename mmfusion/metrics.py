"""Metrics over all examples of a split: floats for JSON, None where a metric is undefined.

n examples · C classes or labels. Weights only select: rows of weight 0 (padding) are dropped, all others count once.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epy

from mmfusion.files import to_builtin

with epy.lazy_imports():  # a second that training needs only as it evaluates
    from scipy import special, stats

# Metrics that may choose the best checkpoint, and whether higher is better.
METRICS = {
    "classification": {
        "accuracy": True,
        "balanced_accuracy": True,
        "macro_precision": True,
        "macro_recall": True,
        "macro_f1": True,
        "weighted_f1": True,
        "auroc": True,
        "average_precision": True,
        "nll": False,
        "brier": False,
        "ece": False,
        "loss": False,
    },
    "multilabel": {
        "accuracy": True,
        "balanced_accuracy": True,
        "subset_accuracy": True,
        "macro_precision": True,
        "macro_recall": True,
        "macro_f1": True,
        "micro_precision": True,
        "micro_recall": True,
        "micro_f1": True,
        "auroc": True,
        "average_precision": True,
        "nll": False,
        "brier": False,
        "ece": False,
        "loss": False,
    },
    "regression": {"mae": False, "rmse": False, "r2": True, "pearson": True, "spearman": True, "loss": False},
}

# Further metrics of a regression task, by the name that its option `metrics` has for the group.
REGRESSION_GROUPS = {"sentiment": {"acc2": True, "acc2_nonzero": True, "acc5": True, "acc7": True}}

ECE_BINS = 15
CONFUSION_CLASSES = 100  # of more classes there is no confusion matrix
LISTED_CLASSES = 20  # of more classes, what has a value per class is left out of the log


def classification(logits: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """Returns the metrics of a single-label task: those of `METRICS` except the loss, `per_class` and `confusion`.

    Macro averages are over the classes that occur as target or prediction, balanced accuracy is over those that occur
    as target; an undefined precision counts 0. AUROC and average precision are one-vs-rest, averaged over the classes
    for which they are defined, and those of class 1 where there are two. Weighted F1 is the mean of the classes' F1,
    weighted by their rows. Micro averages of a single-label task equal
    its accuracy. The Brier score is Σ_c (p_c - y_c)², from 0 to 2 (Brier 1950). ECE has 15 bins of equal width (Guo et
    al., 2017, arXiv:1706.04599). `confusion` is None of more than 100 classes. Every metric is None where no row has
    weight or a logit is not finite.

    Args:
      logits: `[n, C]`.
      targets: class `[n]` int, in [0, C).
      weight: `[n]`, 0 on rows that do not count.

    Raises:
      ValueError: shapes do not fit, or a target is outside the classes.
    """
    logits, targets = _select(logits, targets, weight, ("n", "C"), ("n",))
    classes = logits.shape[1]
    if targets.size and not (targets.min() >= 0 and targets.max() < classes):
        raise ValueError(f"targets from {targets.min()} to {targets.max()}, outside the {classes} classes")
    if not len(targets) or not np.isfinite(logits).all():
        return {**_undefined("classification"), "per_class": None, "confusion": None}
    log_probabilities = special.log_softmax(logits, axis=1)  # [n, C]
    probabilities, one_hot = np.exp(log_probabilities), np.eye(classes)[targets]  # [n, C]
    predictions = logits.argmax(axis=1)  # [n]
    labels = np.arange(classes)
    precision, recall, f1, support = _precision_recall_f1(targets, predictions, labels=labels)
    occurs = np.isin(labels, targets) | np.isin(labels, predictions)
    confusion = None
    if classes <= CONFUSION_CLASSES:  # rows: targets, columns: predictions
        counts = np.bincount(targets * classes + predictions, minlength=classes**2)
        confusion = counts.reshape(classes, classes)
    ranked = (one_hot, log_probabilities)
    if classes == 2:
        ranked = (one_hot[:, 1:], logits[:, 1:] - logits[:, :1])
    return to_builtin(
        {
            "accuracy": np.mean(predictions == targets),
            "balanced_accuracy": np.mean(recall[support > 0]),
            "macro_precision": np.mean(precision[occurs]),
            "macro_recall": np.mean(recall[occurs]),
            "macro_f1": np.mean(f1[occurs]),
            "weighted_f1": np.average(f1, weights=support),
            **_ranking(*ranked),
            "nll": -np.mean(log_probabilities[np.arange(len(targets)), targets]),
            "brier": np.mean(((probabilities - one_hot) ** 2).sum(axis=1)),
            "ece": _ece(probabilities.max(axis=1), predictions == targets),
            "per_class": {"precision": precision, "recall": recall, "f1": f1, "support": support},
            "confusion": confusion,
        }
    )


def multilabel(logits: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """Returns the metrics of a multi-label task at threshold 0.5: those of `METRICS` except the loss, and `per_class`.

    `accuracy` is over single labels, `subset_accuracy` over rows with all labels correct; balanced accuracy, AUROC and
    average precision are averaged over the labels for which they are defined; NLL, ECE and the Brier score, (p - y)²,
    are over the probabilities of single labels. A target between 0 and 1 counts as 1 from 0.5 on, except in NLL and the
    Brier score. Every metric is None where no row has weight or a logit is not finite.

    Args:
      logits: `[n, C]`.
      targets: `[n, C]` in [0, 1].
      weight: `[n]`, 0 on rows that do not count.

    Raises:
      ValueError: shapes do not fit, or a target is outside [0, 1].
    """
    logits, targets = _select(logits, targets, weight, ("n", "C"), ("n", "C"))
    if not ((targets >= 0) & (targets <= 1)).all():
        raise ValueError("multi-label targets must be in [0, 1]")
    if not len(targets) or not np.isfinite(logits).all():
        return {**_undefined("multilabel"), "per_class": None}
    probabilities = special.expit(logits)  # [n, C]
    nll = np.mean(np.logaddexp(0, logits) - targets * logits)
    brier = np.mean((probabilities - targets) ** 2)
    targets, predictions = (targets >= 0.5).astype(int), (logits > 0).astype(int)  # [n, C]

    per_label = [
        _precision_recall_f1(target, prediction, average="binary")[:3]
        for target, prediction in zip(targets.T, predictions.T, strict=True)
    ]
    precision, recall, f1 = np.array(per_label).T  # [C]
    micro = _precision_recall_f1(targets.ravel(), predictions.ravel(), average="binary")
    support, negatives = targets.sum(axis=0), (1 - targets).sum(axis=0)  # [C]
    both = (support > 0) & (negatives > 0)
    specificity = ((1 - targets) * (1 - predictions)).sum(axis=0)[both] / negatives[both]
    return to_builtin(
        {
            "accuracy": np.mean(targets == predictions),
            "balanced_accuracy": np.mean((recall[both] + specificity) / 2) if both.any() else None,
            "subset_accuracy": np.mean((targets == predictions).all(axis=1)),
            "macro_precision": np.mean(precision),
            "macro_recall": np.mean(recall),
            "macro_f1": np.mean(f1),
            "micro_precision": micro[0],
            "micro_recall": micro[1],
            "micro_f1": micro[2],
            **_ranking(targets, logits),
            "nll": nll,
            "brier": brier,
            "ece": _ece(np.maximum(probabilities, 1 - probabilities).ravel(), (targets == predictions).ravel()),
            "per_class": {"precision": precision, "recall": recall, "f1": f1, "support": support},
        }
    )


def regression(predictions: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """Returns the metrics of a regression task: MAE, RMSE, R², Pearson's r and Spearman's, None where undefined.

    Args:
      predictions: `[n]`.
      targets: `[n]`.
      weight: `[n]`, 0 on rows that do not count.

    Raises:
      ValueError: shapes do not fit.
    """
    predictions, targets = _select(predictions, targets, weight, ("n",), ("n",))
    targets = targets.astype(np.float64)
    if not len(targets) or not np.isfinite(predictions).all():
        return _undefined("regression")
    error = predictions - targets
    varies, both_vary = np.ptp(targets) > 0, np.ptp(targets) > 0 and np.ptp(predictions) > 0
    return to_builtin(
        {
            "mae": np.mean(np.abs(error)),
            "rmse": np.sqrt(np.mean(error**2)),
            "r2": 1 - np.mean(error**2) / np.var(targets) if varies else None,
            "pearson": np.corrcoef(predictions, targets)[0, 1] if both_vary else None,
            "spearman": stats.spearmanr(predictions, targets)[0] if both_vary else None,
        }
    )


def sentiment(predictions: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """Returns the accuracies that are reported of sentiment in [-3, 3], as of MOSI and MOSEI.

    `acc7` and `acc5` compare predictions and targets clipped to [-3, 3] and [-2, 2] and rounded, halves to even (Tsai
    et al. 2019, arXiv:1906.00295, `eval_metrics.py`). `acc2_nonzero` compares positive with not positive on the rows
    whose target is not 0 (the same, and `eval_affect` of MultiBench, Liang et al. 2021, arXiv:2107.07502); `acc2`
    compares negative with not negative on all rows (Zadeh et al. 2018, the first use on MOSEI). Targets are rounded to
    4 decimals first, as those that were standardised in float32 are not exactly 0 or a half.

    Args:
      predictions: `[n]`.
      targets: `[n]`.
      weight: `[n]`, 0 on rows that do not count.

    Raises:
      ValueError: shapes do not fit.
    """
    predictions, targets = _select(predictions, targets, weight, ("n",), ("n",))
    targets = np.round(targets.astype(np.float64), 4)
    if not len(targets) or not np.isfinite(predictions).all():
        return dict.fromkeys(REGRESSION_GROUPS["sentiment"])

    def rounded_accuracy(bound: int) -> Any:
        return np.mean(np.round(np.clip(predictions, -bound, bound)) == np.round(np.clip(targets, -bound, bound)))

    nonzero = targets != 0
    signs_agree = (predictions > 0) == (targets > 0)
    return to_builtin(
        {
            "acc2": np.mean((predictions < 0) == (targets < 0)),
            "acc2_nonzero": np.mean(signs_agree[nonzero]) if nonzero.any() else None,
            "acc5": rounded_accuracy(2),
            "acc7": rounded_accuracy(3),
        }
    )


REGRESSION_SCORES = {"sentiment": sentiment}


def without_class_lists(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Returns scores without `per_class` and `confusion` of tasks that have more than 20 classes."""
    long = [
        name.removesuffix("per_class")
        for name, value in scores.items()
        if name.rpartition("/")[2] == "per_class" and value and len(value["support"]) > LISTED_CLASSES
    ]
    left_out = {prefix + kind for prefix in long for kind in ("per_class", "confusion")}
    return {name: value for name, value in scores.items() if name not in left_out}


def _select(
    scores: np.ndarray, targets: np.ndarray, weight: np.ndarray, scores_axes: tuple, targets_axes: tuple
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows with weight, scores in float64; raises ValueError where shapes do not fit."""
    scores, targets, weight = np.asarray(scores, np.float64), np.asarray(targets), np.asarray(weight)
    shapes_fit = scores.ndim == len(scores_axes) and targets.shape == scores.shape[: len(targets_axes)]
    if not shapes_fit or weight.shape != scores.shape[:1]:
        expected = f"[{', '.join(scores_axes)}], [{', '.join(targets_axes)}], [n]"
        raise ValueError(f"scores {scores.shape}, targets {targets.shape}, weight {weight.shape}; expected {expected}")
    return scores[weight > 0], targets[weight > 0]


def _undefined(kind: str) -> dict[str, None]:
    return {name: None for name in METRICS[kind] if name != "loss"}


def _precision_recall_f1(targets: np.ndarray, predictions: np.ndarray, **options: Any) -> Any:
    """Returns (precision, recall, F1, support); an undefined precision or recall is 0."""
    from sklearn.metrics import precision_recall_fscore_support  # takes a second to import

    options["zero_division"] = 0.0
    return precision_recall_fscore_support(targets, predictions, **options)


def _ranking(targets: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Returns AUROC and average precision, each averaged over the labels for which it is defined; None where none is.

    Args:
      targets: `[n, C]` of 0 and 1.
      scores: `[n, C]`.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # takes a second to import

    auroc, precision = [], []
    for target, score in zip(targets.T, scores.T, strict=True):
        if target.any():
            precision.append(average_precision_score(target, score))
            if not target.all():
                auroc.append(roc_auc_score(target, score))
    return {
        "auroc": np.mean(auroc) if auroc else None,
        "average_precision": np.mean(precision) if precision else None,
    }


def _ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Returns the expected calibration error; bin k holds confidences in (k / bins, (k + 1) / bins]."""
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gap = np.bincount(bins, weights=correct - confidence, minlength=ECE_BINS)
    return np.abs(gap).sum() / len(confidence)
