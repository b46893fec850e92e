"""What each modality is worth: Shapley values over subsets, and what permuting one costs.

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
    """Returns each modality's Shapley value (Shapley 1953): its mean gain over the orders in which modalities come.

    Σ_m φ_m = V(all) - V(none).

    Args:
      value: score V of each subset that `subsets` gives.

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
    """Returns, for each modality, the share of the score that is lost when its rows are permuted (Gat et al. 2021).

    arXiv:2106.01691: (score - mean permuted score) / score.

    Args:
      score: takes for each modality which row `[n]` stands in for each, returns a score where higher is better.
      modalities: their names.
      rows: n.
      repeats: permutations of each modality.
      seed: of the permutations.

    Raises:
      ValueError: the score of the rows as they are is not above 0.
    """
    same = {m: np.arange(rows) for m in modalities}
    whole = score(same)
    if not whole > 0:
        raise ValueError(f"the share lost of a score of {whole} is not defined")
    random = np.random.default_rng(seed)
    lost = {m: [score(same | {m: random.permutation(rows)}) for _ in range(repeats)] for m in sorted(modalities)}
    return {m: float((whole - np.mean(scores)) / whole) for m, scores in lost.items()}
