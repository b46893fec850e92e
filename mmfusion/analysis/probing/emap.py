"""How much a model's score comes from modalities together: its empirical additive projection.

n examples · C outputs
"""

import numpy as np


def emap(table: np.ndarray) -> np.ndarray:
    """Returns the additive projection of a model's logits (Hessel & Lee 2020, arXiv:2010.06572), `[n, C]`.

    f̂(a_i, b_i) = mean_j f(a_i, b_j) + mean_j f(a_j, b_i) - mean_jk f(a_j, b_k): of all functions g(a) + h(b) the one
    nearest to f over all pairs. Of more than two modalities, b is all but one.

    Args:
      table: logits `[n, n, C]` of a_i with b_j.

    Raises:
      ValueError: the table is not square.
    """
    table = np.asarray(table, np.float64)
    if table.ndim != 3 or table.shape[0] != table.shape[1]:
        raise ValueError(f"a table of all pairs [n, n, C] is needed, got {table.shape}")
    return table.mean(axis=1) + table.mean(axis=0) - table.mean(axis=(0, 1))
