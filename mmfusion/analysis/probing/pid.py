"""Partial information decomposition: what two sources tell of a label alone, both, and only together, in bits.

A values of the first source · B of the second · C classes · n examples
"""

import dataclasses

import numpy as np
from scipy.special import rel_entr
from sklearn.cluster import KMeans

from mmfusion.analysis.baselines import features
from mmfusion.data.dataset import Dataset

TINY = 1e-300
CLUSTERS = 20  # that a modality's features are reduced to, as many values has a source


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """Information about the label in bits: redundant, unique to each source, synergistic; their sum is I(X1, X2; Y)."""

    redundant: float
    unique_1: float
    unique_2: float
    synergy: float


def decompose(joint: np.ndarray, tolerance: float = 1e-8, most: int = 5_000) -> Decomposition:
    """Decomposes what two discrete sources tell of a label (Bertschinger et al. 2014, arXiv:1311.2852).

    As in Liang et al. 2023 (arXiv:2302.12247): Q* = argmax H_q(Y | X1, X2) over q with q(x1, y) = p(x1, y) and
    q(x2, y) = p(x2, y). Found by alternating projections: q is fitted to the marginals from r, r becomes the sum of q
    over y; each step lowers Σ_y p(y) D(q(·|y) || r), whose minimum over r is the information that q has.

    Args:
      joint: P(x1, x2, y) `[A, B, C]`, not negative; it is scaled to sum to 1.
      tolerance: bits by which two steps must differ to go on.
      most: steps.

    Raises:
      ValueError: the table has no mass, another shape, or a negative or undefined entry.
    """
    p = np.asarray(joint, np.float64)
    if p.ndim != 3 or not np.isfinite(p).all() or p.min(initial=0) < 0 or not p.sum() > 0:
        raise ValueError("a table P(x1, x2, y) of finite probabilities that are not negative is needed")
    p = p / p.sum()
    q = _nearest_with_marginals(p, tolerance, most)
    first, second = _information(p.sum(axis=1)), _information(p.sum(axis=0))
    both = _information(p.reshape(-1, p.shape[2]))
    least = _information(q.reshape(-1, p.shape[2]))
    redundant = first + second - least
    return Decomposition(*(max(0.0, v) for v in (redundant, first - redundant, second - redundant, both - least)))


def of_dataset(
    dataset: Dataset, task: str, seed: int = 0, most_rows: int = 20_000
) -> tuple[Decomposition, Decomposition]:
    """Returns what the clusters of two modalities' simple features tell of a class, and what chance makes of it.

    As Liang et al. 2023 do, each modality is reduced to the cluster (k-means) that its features belong to. Few examples
    a cell feign information; the second decomposition, of the same table with the classes permuted, says how much.

    Args:
      dataset: of two modalities, taken in the order of their names; its train split is looked at.
      task: a single-label target.
      seed: of the rows drawn, the clusters and the permutation.
      most_rows: of train that are used.
    """
    tables, targets = features(dataset, task, seed, most_rows)
    first, second = (
        KMeans(
            min(CLUSTERS, own["train"].shape[0]),
            n_init=2,  # pyright: ignore[reportArgumentType]
            random_state=seed,
        ).fit_predict(own["train"])
        for _, own in sorted(tables.items())
    )
    classes = targets["train"]

    def table(labels: np.ndarray) -> np.ndarray:
        joint = np.zeros((first.max() + 1, second.max() + 1, labels.max() + 1))
        np.add.at(joint, (first, second, labels), 1)
        return joint

    return decompose(table(classes)), decompose(table(np.random.default_rng(seed).permutation(classes)))


def _nearest_with_marginals(p: np.ndarray, tolerance: float, most: int) -> np.ndarray:
    rows, columns = p.sum(axis=1, keepdims=True), p.sum(axis=0, keepdims=True)  # [A, 1, C], [1, B, C]
    label = p.sum(axis=(0, 1), keepdims=True)  # [1, 1, C]
    q = rows * columns / np.maximum(label, TINY)  # independent given the label
    before = np.inf
    for _ in range(most):
        q = np.broadcast_to(q.sum(axis=2, keepdims=True), p.shape)
        q = _fitted(q * label, rows, columns)
        now = _information(q.reshape(-1, p.shape[2]))
        if abs(before - now) < tolerance:
            break
        before = now
    return q


def _fitted(q: np.ndarray, rows: np.ndarray, columns: np.ndarray, tolerance: float = 1e-9) -> np.ndarray:
    """Scales rows and columns in turns until both sums are right, which is the projection of q (Csiszár 1975)."""
    for _ in range(1_000):
        q = q * (rows / np.maximum(q.sum(axis=1, keepdims=True), TINY))
        sums = q.sum(axis=0, keepdims=True)
        if np.abs(sums - columns).max() < tolerance:
            break
        q = q * (columns / np.maximum(sums, TINY))
    return q


def _information(joint: np.ndarray) -> float:
    """Returns I(X; Y) in bits of P(x, y) `[A, C]`."""
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    return float(rel_entr(joint, independent).sum() / np.log(2))
