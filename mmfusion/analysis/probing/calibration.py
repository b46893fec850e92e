"""Whether confidence is accuracy: reliability bins, calibration error, and a temperature fitted on validation.

n examples · C classes
"""

import dataclasses

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Bins of confidence that are not empty: examples, mean confidence and accuracy of each, all `[bins]`."""

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: Σ_b count_b / n · |accuracy_b - confidence_b|."""
        return float(np.abs(self.accuracy - self.confidence) @ self.count / self.count.sum())


def reliability(logits: np.ndarray, targets: np.ndarray, *, equal_mass: bool = False) -> Reliability:
    """Bins predictions by confidence, 15 bins of equal width, or of equally many examples (Nixon et al. 2019).

    Args:
      logits: `[n, C]`, n at least 1.
      targets: class `[n]`.
      equal_mass: as many examples in each bin as can be (arXiv:1904.01685).
    """
    probabilities = np.exp(log_softmax(np.asarray(logits, np.float64), axis=1))
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    if equal_mass:
        which = np.empty(len(confidence), int)
        which[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * BINS // len(confidence)
    else:
        which = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(which, minlength=BINS)
    full = count > 0
    means = [np.bincount(which, values, BINS)[full] / count[full] for values in (confidence, right)]
    return Reliability(count[full], *means)


def nll(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> float:
    """Returns the mean negative log-likelihood in nats of logits `[n, C]` divided by a temperature."""
    scaled = log_softmax(np.asarray(logits, np.float64) / temperature, axis=1)
    return float(-scaled[np.arange(len(targets)), targets].mean())


def temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Returns the temperature that minimises the NLL (Guo et al. 2017, arXiv:1706.04599); fit it on validation.

    Args:
      logits: `[n, C]` of the validation split.
      targets: class `[n]`.
    """
    found = minimize_scalar(
        lambda log: nll(logits, targets, np.exp(log)), bounds=np.log([COLDEST, HOTTEST]), method="bounded",
        options={"xatol": 1e-6},
    )  # fmt: skip
    return float(np.exp(found.x))
