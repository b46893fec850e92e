"""What a classifier's confidence is worth: predicting on fewer examples, and detecting inputs that are unlike training.

The confidence of a prediction is the largest probability of a class (Hendrycks and Gimpel 2017, arXiv:1610.02136).

n examples · C classes
"""

import dataclasses

import numpy as np
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

COVERAGES = tuple(round(0.05 * i, 2) for i in range(1, 21))


@dataclasses.dataclass(frozen=True)
class RiskCoverage:
    """The error rate among the most confident predictions.

    Attributes:
      risks: the error rate at each of `COVERAGES`, the share of examples that are predicted.
      area: the area under the risk-coverage curve (AURC), the mean error rate over all numbers of examples. 0 is
        perfect; for an uninformative confidence it is the error rate.
    """

    risks: tuple[float, ...]
    area: float


def confidence(logits: np.ndarray) -> np.ndarray:
    """Returns the largest probability `[n]` of logits `[n, C]`."""
    return softmax(np.asarray(logits, np.float64), axis=1).max(axis=1)


def risk_coverage(logits: np.ndarray, targets: np.ndarray) -> RiskCoverage:
    """Returns the error rate by the share of examples that are predicted (Geifman and El-Yaniv 2017, arXiv:1705.08500).

    Equally confident examples count as in a random order, so that the result does not depend on their order.

    Args:
      logits: `[n, C]`, n at least 1.
      targets: class `[n]`.
    """
    wrong = (np.argmax(logits, axis=1) != targets).astype(np.float64)
    _, level, count = np.unique(-confidence(logits), return_inverse=True, return_counts=True)
    expected = (np.bincount(level, wrong) / count)[np.sort(level)]  # the mean error of the examples equally confident
    risks = np.cumsum(expected) / np.arange(1, len(wrong) + 1)
    at = [max(1, round(share * len(risks))) - 1 for share in COVERAGES]
    return RiskCoverage(tuple(risks[at].tolist()), float(risks.mean()))


def detection(logits: np.ndarray, unlike: np.ndarray) -> float:
    """Returns the AUROC of telling inputs that are unlike training by their lower confidence; 0.5 is chance.

    Args:
      logits: `[n, C]` of test examples.
      unlike: `[n', C]` of inputs that are unlike training.
    """
    scores = -np.concatenate([confidence(logits), confidence(unlike)])
    return float(roc_auc_score(np.repeat([0, 1], [len(logits), len(unlike)]), scores))
