"""Partial information decomposition: unique, redundant and synergistic information about a label, in bits.

A values of the first source · B values of the second source · C classes · n examples
"""

import dataclasses

import numpy as np
from scipy.special import rel_entr
from sklearn.cluster import KMeans

from mmfusion.analysis.features import features, one_thread
from mmfusion.data.dataset import Dataset

TINY = 1e-300
CLUSTERS = 20  # number of k-means clusters per modality, the values of a source


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """Information about the label in bits: redundant, unique to each source, synergistic; their sum is I(X1, X2; Y)."""

    redundant: float
    unique_1: float
    unique_2: float
    synergy: float


def decompose(joint: np.ndarray, tolerance: float = 1e-8, max_steps: int = 5_000) -> Decomposition:
    """Decomposes the information of two discrete sources about a label (Bertschinger et al. 2014, arXiv:1311.2852).

    As in Liang et al. 2023 (arXiv:2302.12247), Q* = argmax H_q(Y | X1, X2) over q with q(x1, y) = p(x1, y) and
    q(x2, y) = p(x2, y). It is found by alternating projections: q is fitted to the marginals starting from r, and r is
    set to the sum of q over y. Each step lowers Σ_y p(y) D(q(·|y) || r), whose minimum over r is I_q(X1, X2; Y).

    Args:
      joint: P(x1, x2, y) `[A, B, C]`, non-negative; it is normalised to sum to 1.
      tolerance: the iteration stops when the information changes by less than this, in bits.
      max_steps: the maximum number of iterations.

    Raises:
      ValueError: the table sums to 0, has another shape, or a negative or non-finite entry.
    """
    p = np.asarray(joint, np.float64)
    if p.ndim != 3 or not np.isfinite(p).all() or p.min(initial=0) < 0 or not p.sum() > 0:
        raise ValueError("the table must be P(x1, x2, y) with finite, non-negative entries that do not sum to 0")
    p = p / p.sum()
    q = _projection(p, tolerance, max_steps)
    first, second = _information(p.sum(axis=1)), _information(p.sum(axis=0))
    both = _information(p.reshape(-1, p.shape[2]))
    least = _information(q.reshape(-1, p.shape[2]))
    redundant = first + second - least
    return Decomposition(*(max(0.0, v) for v in (redundant, first - redundant, second - redundant, both - least)))


@one_thread
def of_dataset(
    dataset: Dataset, task: str, seed: int = 0, max_rows: int = 20_000
) -> tuple[Decomposition, Decomposition]:
    """Returns the decomposition of two modalities' clustered features, and that of permuted labels.

    As in Liang et al. 2023, each modality is reduced to the k-means cluster of its features. The estimate is biased
    upwards with few examples per cell; the second decomposition, with permuted classes, measures the bias.

    Args:
      dataset: a dataset with two modalities, in the order of their names; its train split is used.
      task: a single-label target.
      seed: seed of the subsample, the clusters and the permutation.
      max_rows: the maximum number of training rows.
    """
    found = features(dataset, task, seed, max_rows)
    first, second = (
        KMeans(
            min(CLUSTERS, own["train"].shape[0]),
            n_init=2,  # pyright: ignore[reportArgumentType]
            random_state=seed,
        ).fit_predict(own["train"])
        for _, own in sorted(found.tables.items())
    )
    classes = found.targets["train"]

    def table(labels: np.ndarray) -> np.ndarray:
        joint = np.zeros((first.max() + 1, second.max() + 1, labels.max() + 1))
        np.add.at(joint, (first, second, labels), 1)
        return joint

    return decompose(table(classes)), decompose(table(np.random.default_rng(seed).permutation(classes)))


def _projection(p: np.ndarray, tolerance: float, max_steps: int) -> np.ndarray:
    rows, columns = p.sum(axis=1, keepdims=True), p.sum(axis=0, keepdims=True)  # [A, 1, C], [1, B, C]
    label = p.sum(axis=(0, 1), keepdims=True)  # [1, 1, C]
    q = rows * columns / np.maximum(label, TINY)  # independent given the label
    previous = np.inf
    for _ in range(max_steps):
        q = np.broadcast_to(q.sum(axis=2, keepdims=True), p.shape)
        q = _fitted(q * label, rows, columns)
        information = _information(q.reshape(-1, p.shape[2]))
        if abs(previous - information) < tolerance:
            break
        previous = information
    return q


def _fitted(q: np.ndarray, rows: np.ndarray, columns: np.ndarray, tolerance: float = 1e-9) -> np.ndarray:
    """Scales rows and columns alternately until both marginals match: the I-projection of q (Csiszár 1975)."""
    for _ in range(1_000):
        q = q * (rows / np.maximum(q.sum(axis=1, keepdims=True), TINY))
        sums = q.sum(axis=0, keepdims=True)
        if np.abs(sums - columns).max() < tolerance:
            break
        q = q * (columns / np.maximum(sums, TINY))
    return q


def _information(joint: np.ndarray) -> float:
    """Returns I(X; Y) of P(x, y) `[A, C]`, in bits."""
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    return float(rel_entr(joint, independent).sum() / np.log(2))
