"""Shapley values of modalities over all their subsets.

M modalities
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any


def subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns all 2^M subsets in sorted order, from the empty one to all."""
    names = sorted(modalities)
    return [subset for size in range(len(names) + 1) for subset in itertools.combinations(names, size)]


def shapley(value: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Returns each modality's Shapley value (Shapley 1953): its mean gain over all orders of adding modalities.

    Σ_m φ_m = V(all) - V(none).

    Args:
      value: V of each subset that `subsets` returns: numbers, or arrays of one shape, which are attributed by element.

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
        result[m] = sum(gains)
    return result
