"""Temperature scaling of logits, and split-conformal quantiles.

n examples · C classes
"""

import math

import numpy as np
from etils import epy

with epy.lazy_imports():
    from scipy import optimize, special

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


def nll(logits: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> float:
    """Returns the mean negative log-likelihood in nats of logits divided by a temperature.

    Args:
      logits: `[n, C]`.
      targets: class `[n]` for a softmax over the classes; or `[n, C]` in [0, 1] for a sigmoid of each label, in which
        case the mean is over labels, too.
      temperature: a positive number.
    """
    scaled = np.asarray(logits, np.float64) / temperature
    if np.ndim(targets) == 2:
        return float(np.mean(np.logaddexp(0, scaled) - targets * scaled))
    return float(-special.log_softmax(scaled, axis=1)[np.arange(len(targets)), targets].mean())


def temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Returns the temperature that minimises the NLL on validation (Guo et al. 2017, arXiv:1706.04599).

    Args:
      logits: `[n, C]` of the validation split.
      targets: see `nll`.
    """
    found = optimize.minimize_scalar(
        lambda log: nll(logits, targets, np.exp(log)), method="bounded",
        bounds=np.log([MIN_TEMPERATURE, MAX_TEMPERATURE]),
        options={"xatol": 1e-6},
    )  # fmt: skip
    return float(np.exp(found.x))


def conformal_quantile(scores: np.ndarray, coverage: float) -> float:
    """Returns the ceil((n + 1) coverage)-th smallest of n scores, infinity if that is more than n.

    The score of a further example, exchangeable with those n, is at most that with a probability of at least `coverage`
    (Lei et al. 2018, arXiv:1604.04173; Angelopoulos & Bates 2021, arXiv:2107.07511).

    Args:
      scores: `[n]`, higher is a worse prediction.
      coverage: above 0 and below 1.
    """
    rank = _rank(len(scores), coverage)
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank <= len(scores) else math.inf


def examples_needed(coverage: float) -> int:
    """Returns the smallest n for which `conformal_quantile` is finite."""
    n = max(math.floor(coverage / (1 - coverage)) - 1, 1)
    while _rank(n, coverage) > n:
        n += 1
    return n


def _rank(n: int, coverage: float) -> int:
    return math.ceil((n + 1) * coverage - 1e-9)  # 10 x 0.7 is a little more than 7
