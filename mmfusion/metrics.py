"""Scores over all examples of a split at once, in NumPy; plain floats for JSON, None where a score is undefined.

n examples · C classes or labels. Weights only select: rows of weight 0 (padding) drop out, all others count once,
whatever their weight.
"""

import numpy as np
from scipy import stats
from scipy.special import expit, log_softmax

from mmfusion.files import to_builtin

# Which scores may choose the best checkpoint, and whether higher is better.
METRICS = {
    "classification": {
        "accuracy": True,
        "balanced_accuracy": True,
        "macro_precision": True,
        "macro_recall": True,
        "macro_f1": True,
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

ECE_BINS = 15


def classification(logits: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> dict:
    """Returns the scores of a single-label task: those of `METRICS` but the loss, `per_class` and `confusion`.

    Macro averages are over the classes that occur as target or prediction, balanced accuracy over those that occur as
    target; a class's undefined precision counts 0. AUROC and average precision are one-vs-rest, averaged over the
    classes they are defined for, and of class 1 when there are two. Micro averages of a single-label task are its
    accuracy. Brier's score is Σ_c (p_c - y_c)², from 0 to 2 (Brier 1950). ECE has 15 bins of equal width (Guo et al.,
    2017, arXiv:1706.04599). Every score is None when no row has weight or a logit is not finite.

    Args:
      logits: `[n, C]`.
      targets: class `[n]` int, in [0, C).
      weight: `[n]`, 0 on rows that do not count.

    Raises:
      ValueError: if shapes do not fit, or a target is outside the classes.
    """
    logits, targets = _select(logits, targets, weight, ("n", "C"), ("n",))
    classes = logits.shape[1]
    if targets.size and not (targets.min() >= 0 and targets.max() < classes):
        raise ValueError(f"targets from {targets.min()} to {targets.max()}, outside the {classes} classes")
    if not len(targets) or not np.isfinite(logits).all():
        return {**_undefined("classification"), "per_class": None, "confusion": None}
    log_probabilities = log_softmax(logits, axis=1)  # [n, C]
    predictions = logits.argmax(axis=1)  # [n]
    confusion = np.bincount(targets * classes + predictions, minlength=classes**2).reshape(classes, classes)
    hits, actual, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)  # [C]
    per_class = _per_class(hits, actual, predicted)
    confidence = np.exp(log_probabilities.max(axis=1))  # [n]
    one_vs_rest = [(targets == c, log_probabilities[:, c]) for c in range(classes)]
    if classes == 2:
        one_vs_rest = [(targets == 1, logits[:, 1] - logits[:, 0])]
    return to_builtin(
        {
            "accuracy": hits.sum() / len(targets),
            "balanced_accuracy": np.mean(hits[actual > 0] / actual[actual > 0]),
            **_macro(per_class, (actual > 0) | (predicted > 0)),
            "auroc": _mean([_auroc(positive, scores) for positive, scores in one_vs_rest]),
            "average_precision": _mean([_average_precision(positive, scores) for positive, scores in one_vs_rest]),
            "nll": -np.mean(log_probabilities[np.arange(len(targets)), targets]),
            "brier": np.mean(((np.exp(log_probabilities) - np.eye(classes)[targets]) ** 2).sum(axis=1)),
            "ece": _ece(confidence, predictions == targets),
            "per_class": per_class,
            "confusion": confusion,  # rows are targets, columns predictions
        }
    )


def multilabel(logits: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> dict:
    """Returns the scores of a multi-label task at threshold 0.5: those of `METRICS` but the loss, and `per_class`.

    `accuracy` is over single labels, `subset_accuracy` over rows that are right as a whole; balanced accuracy, AUROC
    and average precision are averaged over the labels they are defined for; NLL, ECE and Brier's score, (p - y)², are
    over single labels' probabilities. Every score is None when no row has weight or a logit is not finite.

    Args:
      logits: `[n, C]`.
      targets: `[n, C]` of 0 and 1.
      weight: `[n]`, 0 on rows that do not count.

    Raises:
      ValueError: if shapes do not fit, or a target is neither 0 nor 1.
    """
    logits, targets = _select(logits, targets, weight, ("n", "C"), ("n", "C"))
    if not np.isin(targets, (0, 1)).all():
        raise ValueError("multi-label targets must be 0 or 1")
    if not len(targets) or not np.isfinite(logits).all():
        return {**_undefined("multilabel"), "per_class": None}
    targets, predictions = targets.astype(bool), logits > 0  # [n, C]
    hits, actual, predicted = (targets & predictions).sum(axis=0), targets.sum(axis=0), predictions.sum(axis=0)
    per_class = _per_class(hits, actual, predicted)
    probability = expit(logits)
    labels = range(logits.shape[1])
    return to_builtin(
        {
            "accuracy": np.mean(targets == predictions),
            "balanced_accuracy": _mean(
                [
                    (hits[c] / actual[c] + (~targets & ~predictions)[:, c].sum() / (len(targets) - actual[c])) / 2
                    for c in labels
                    if 0 < actual[c] < len(targets)
                ]
            ),
            "subset_accuracy": np.mean((targets == predictions).all(axis=1)),
            **_macro(per_class, np.ones(logits.shape[1], bool)),
            "micro_precision": _ratio(hits.sum(), predicted.sum()),
            "micro_recall": _ratio(hits.sum(), actual.sum()),
            "micro_f1": _ratio(2 * hits.sum(), actual.sum() + predicted.sum()),
            "auroc": _mean([_auroc(targets[:, c], logits[:, c]) for c in labels]),
            "average_precision": _mean([_average_precision(targets[:, c], logits[:, c]) for c in labels]),
            "nll": np.mean(np.logaddexp(0, np.where(targets, -logits, logits))),
            "brier": np.mean((probability - targets) ** 2),
            "ece": _ece(np.maximum(probability, 1 - probability).ravel(), (targets == predictions).ravel()),
            "per_class": per_class,
        }
    )


def regression(predictions: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> dict:
    """Returns the scores of a regression task: MAE, RMSE, R², Pearson's r and Spearman's, None where undefined.

    Args:
      predictions: `[n]`.
      targets: `[n]`.
      weight: `[n]`, 0 on rows that do not count.

    Raises:
      ValueError: if shapes do not fit.
    """
    predictions, targets = _select(predictions, targets, weight, ("n",), ("n",))
    targets = targets.astype(np.float64)
    if not len(targets) or not np.isfinite(predictions).all():
        return _undefined("regression")
    error = predictions - targets
    spread, spread_predicted = np.ptp(targets) > 0, np.ptp(predictions) > 0
    return to_builtin(
        {
            "mae": np.mean(np.abs(error)),
            "rmse": np.sqrt(np.mean(error**2)),
            "r2": 1 - np.mean(error**2) / np.var(targets) if spread else None,
            "pearson": np.corrcoef(predictions, targets)[0, 1] if spread and spread_predicted else None,
            "spearman": stats.spearmanr(predictions, targets).statistic if spread and spread_predicted else None,
        }
    )


def _select(scores, targets, weight, scores_axes, targets_axes):
    scores, targets, weight = np.asarray(scores, np.float64), np.asarray(targets), np.asarray(weight)
    shapes_fit = scores.ndim == len(scores_axes) and targets.shape == scores.shape[: len(targets_axes)]
    if not shapes_fit or weight.shape != scores.shape[:1]:
        expected = f"[{', '.join(scores_axes)}], [{', '.join(targets_axes)}], [n]"
        raise ValueError(f"scores {scores.shape}, targets {targets.shape}, weight {weight.shape}; expected {expected}")
    return scores[weight > 0], targets[weight > 0]


def _undefined(kind):
    return {name: None for name in METRICS[kind] if name != "loss"}


def _per_class(hits, actual, predicted):
    return {
        "precision": [_ratio(h, p) for h, p in zip(hits, predicted, strict=True)],
        "recall": [_ratio(h, a) for h, a in zip(hits, actual, strict=True)],
        "f1": [_ratio(2 * h, a + p) for h, a, p in zip(hits, actual, predicted, strict=True)],
        "support": actual,
    }


def _ratio(part, whole):
    return part / whole if whole else 0.0


def _macro(per_class, occurs):
    return {f"macro_{name}": np.mean(np.array(per_class[name])[occurs]) for name in ("precision", "recall", "f1")}


def _mean(values):
    defined = [value for value in values if value is not None]
    return np.mean(defined) if defined else None


def _auroc(positive, scores):
    """The chance that a positive scores above a negative, where ties are half (Mann & Whitney 1947)."""
    from scipy.stats import rankdata  # takes a second to import

    positives = positive.sum()
    if not 0 < positives < len(positive):
        return None
    above = rankdata(scores)[positive].sum() - positives * (positives + 1) / 2
    return above / (positives * (len(positive) - positives))


def _average_precision(positive, scores):
    from sklearn.metrics import average_precision_score  # takes a second to import

    return average_precision_score(positive, scores) if positive.any() else None


def _ece(confidence, correct):
    # Bin k holds confidences in (k / bins, (k + 1) / bins].
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gap = np.bincount(bins, weights=correct - confidence, minlength=ECE_BINS)
    return np.abs(gap).sum() / len(confidence)
