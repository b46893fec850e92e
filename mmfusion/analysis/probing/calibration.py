"""Calibration of a classifier: reliability bins, expected calibration error, and temperature scaling.

n examples · C classes
"""

import dataclasses

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

BINS = 15
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


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


def nll(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> float:
    """Returns the mean negative log-likelihood in nats of logits `[n, C]` divided by a temperature."""
    scaled = log_softmax(np.asarray(logits, np.float64) / temperature, axis=1)
    return float(-scaled[np.arange(len(targets)), targets].mean())


def temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Returns the temperature that minimises the NLL on validation (Guo et al. 2017, arXiv:1706.04599).

    Args:
      logits: `[n, C]` of the validation split.
      targets: class `[n]`.
    """
    found = minimize_scalar(
        lambda log: nll(logits, targets, np.exp(log)), method="bounded",
        bounds=np.log([MIN_TEMPERATURE, MAX_TEMPERATURE]),
        options={"xatol": 1e-6},
    )  # fmt: skip
    return float(np.exp(found.x))
