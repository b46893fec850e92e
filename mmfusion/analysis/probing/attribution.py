"""Attribution of a score to modalities: Shapley values over subsets, and the perceptual score by permutation.

n examples · C classes · M modalities
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns all 2^M subsets in sorted order, from the empty one to all."""
    names = sorted(modalities)
    return [subset for size in range(len(names) + 1) for subset in itertools.combinations(names, size)]


def shapley(value: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    """Returns each modality's Shapley value (Shapley 1953): its mean gain over all orders of adding modalities.

    Σ_m φ_m = V(all) - V(none).

    Args:
      value: score V of each subset that `subsets` returns.

    Raises:
      ValueError: a subset is missing.
    """
    names = max(value, key=len, default=())
    if missing := [subset for subset in subsets(names) if subset not in value]:
        raise ValueError(f"Shapley values need every subset; missing {missing}")
    result = {}
    for m in names:
        gains = [
            math.factorial(len(without)) * math.factorial(len(names) - len(without) - 1) / math.factorial(len(names))
            * (value[tuple(sorted((*without, m)))] - value[without])
            for without in subsets(names) if m not in without
        ]  # fmt: skip
        result[m] = math.fsum(gains)
    return result


def perceptual(
    score: Callable[[Mapping[str, np.ndarray]], float], modalities: Sequence[str], rows: int, repeats: int, seed: int
) -> dict[str, float]:
    """Returns for each modality the share of the score lost when its rows are permuted (Gat et al. 2021).

    arXiv:2106.01691: (score - mean permuted score) / score.

    Args:
      score: maps the row indices `[n]` of each modality to a score; higher is better.
      modalities: names of the modalities.
      rows: n.
      repeats: the number of permutations per modality.
      seed: seed of the permutations.

    Raises:
      ValueError: the score without permutation is not above 0.
    """
    identity = {m: np.arange(rows) for m in modalities}
    full = score(identity)
    if not full > 0:
        raise ValueError(f"the score is {full}; it must be above 0")
    random = np.random.default_rng(seed)
    permuted = {
        m: [score(identity | {m: random.permutation(rows)}) for _ in range(repeats)] for m in sorted(modalities)
    }
    return {m: float((full - np.mean(scores)) / full) for m, scores in permuted.items()}
