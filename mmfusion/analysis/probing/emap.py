"""Empirical multimodally-additive projection (EMAP) of a model, which has no cross-modal interaction.

n examples · C outputs
"""

import numpy as np


def emap(table: np.ndarray) -> np.ndarray:
    """Returns the additive projection of a model's logits (Hessel & Lee 2020, arXiv:2010.06572), `[n, C]`.

    f̂(a_i, b_i) = mean_j f(a_i, b_j) + mean_j f(a_j, b_i) - mean_jk f(a_j, b_k) is the least-squares approximation of f
    by a sum g(a) + h(b) over all pairs. With more than two modalities, b stands for all modalities but a.

    Args:
      table: logits `[n, n, C]` of a_i paired with b_j.

    Raises:
      ValueError: the table is not `[n, n, C]`.
    """
    table = np.asarray(table, np.float64)
    if table.ndim != 3 or table.shape[0] != table.shape[1]:
        raise ValueError(f"the table must have the shape [n, n, C], got {table.shape}")
    return table.mean(axis=1) + table.mean(axis=0) - table.mean(axis=(0, 1))
