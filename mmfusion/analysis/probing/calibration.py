"""Calibration of a classifier: reliability bins and the expected calibration error.

n examples · C classes
"""

import dataclasses

import numpy as np
from scipy.special import log_softmax

BINS = 15


@dataclasses.dataclass(frozen=True)
class Reliability:
    """The non-empty bins of confidence: number of examples, mean confidence and accuracy, all `[bins]`."""

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: Σ_b count_b / n · |accuracy_b - confidence_b|."""
        return float(np.abs(self.accuracy - self.confidence) @ self.count / self.count.sum())


def reliability(logits: np.ndarray, targets: np.ndarray, *, equal_mass: bool = False) -> Reliability:
    """Returns predictions binned by confidence: 15 bins of equal width or of equal mass (Nixon et al. 2019).

    Args:
      logits: `[n, C]`, n at least 1.
      targets: class `[n]`.
      equal_mass: whether bins have equal numbers of examples, up to rounding (arXiv:1904.01685).
    """
    probabilities = np.exp(log_softmax(np.asarray(logits, np.float64), axis=1))
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    if equal_mass:
        bins = np.empty(len(confidence), int)
        bins[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * BINS // len(confidence)
    else:
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    filled = count > 0
    means = [np.bincount(bins, values, BINS)[filled] / count[filled] for values in (confidence, correct)]
    return Reliability(count[filled], *means)
