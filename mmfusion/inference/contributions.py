"""Contributions of the modalities to single predictions, from exact evaluations without some of them.

n rows · C classes · M modalities
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mmfusion.inference.shapley import shapley, subsets

MAX_SHAPLEY = 4  # modalities; more take 2^M evaluations

Subset = tuple[str, ...]


def needed_subsets(modalities: Sequence[str]) -> list[Subset]:
    """Returns the subsets of modalities to evaluate, in sorted order and the last with all: 2^M up to four modalities,
    and M + 1 for more."""
    names = tuple(sorted(modalities))
    if len(names) <= MAX_SHAPLEY:
        return subsets(names)
    return [*(_without(names, m) for m in names), names]


def contributions(value: Mapping[Subset, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the contribution `[n]` of each modality.

    Up to four modalities it is the exact Shapley value (Shapley 1953), the mean gain over all orders of adding
    modalities: the contributions of a row sum to V(all) - V(none). With more it is V(all) - V(all others), the loss
    when the modality is absent, which has no such sum. A modality that is absent in a row contributes 0.

    Args:
      value: V `[n]` of each subset of `needed_subsets`.
    """
    names = max(value, key=len)
    if len(names) <= MAX_SHAPLEY:
        return shapley(value)
    return {m: value[names] - value[_without(names, m)] for m in names}


def _without(names: Subset, modality: str) -> Subset:
    return tuple(name for name in names if name != modality)
