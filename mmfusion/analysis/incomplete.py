"""What each modality adds where others are missing, and what training with missing modalities protects from."""

import itertools
import math
from collections.abc import Mapping

import numpy as np

Protection = tuple[float, float]  # within the trained rate, and beyond it


def additions(subsets: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """Returns what each modality adds to each set of others, by (set, modality).

    A model is monotone where none of them is negative (Li et al. 2025, arXiv:2507.19264).

    Args:
      subsets: the score, higher is better, by the modalities that are present, joined by `+`; "" for none.
    """
    names = max(subsets, key=len).split("+")
    found = {}
    for size in range(len(names)):
        for kept in itertools.combinations(names, size):
            for m in names:
                if m not in kept:
                    more = [name for name in names if name in (*kept, m)]
                    found["+".join(kept), m] = subsets["+".join(more)] - subsets["+".join(kept)]
    return found


def evenness(contributions: Mapping[str, float]) -> float:
    """Returns how evenly modalities contribute, from 0 (one alone) to 1 (all the same); NaN if none contributes.

    It is the entropy of their shares, divided by its maximum; a negative contribution counts as none. It answers the
    question of the Modality Equity Index (arXiv:2603.09874) from Shapley values, which are means over all sets of
    missing modalities, and is not that index.
    """
    values = np.maximum(list(contributions.values()), 0.0)
    if len(values) < 2 or not values.sum() > 0:
        return math.nan
    shares = values[values > 0] / values.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(values))) + 0.0  # no negative zero


def protection(trained: Mapping[float, Mapping[float, float]]) -> dict[float, Protection]:
    """Returns what each rate of training gains over training without missing modalities, by rate.

    The first value is the mean gain over the test rates above 0 up to the trained one, the second over those beyond it,
    to which protection often does not extend (arXiv:2605.15235); NaN without such a rate.

    Args:
      trained: rate in training -> rate in test -> the score, higher is better; one of the rates in training is 0.
    """
    found = {}
    for rate in sorted(trained.keys() - {0.0}):
        gains = {at: score - trained[0.0][at] for at, score in trained[rate].items() if at > 0}
        within, beyond = ([gain for at, gain in gains.items() if (at <= rate) is inside] for inside in (True, False))
        found[rate] = tuple(float(np.mean(values)) if values else math.nan for values in (within, beyond))
    return found
