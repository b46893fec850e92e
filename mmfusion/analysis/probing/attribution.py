"""Attribution of a score to modalities by permutation: the perceptual score.

n examples
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np


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
