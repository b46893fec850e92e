"""Information of any number of sources about a label: unique to one, redundant, and synergistic, from covariances.

n examples · M sources · F features of a source · C classes
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from mmfusion.analysis.features import dense, features, one_thread
from mmfusion.data.dataset import Dataset

RIDGE = 1e-6  # added to unit variances, so that a constant feature has no information instead of an undefined one


@dataclasses.dataclass(frozen=True)
class SourcesDecomposition:
    """Information about the label in bits: unique to each source, redundant, synergistic; the sum is I(all; label)."""

    unique: dict[str, float]
    redundant: float
    synergy: float


def decompose(sources: Mapping[str, np.ndarray], label: np.ndarray) -> SourcesDecomposition:
    """Decomposes the information of jointly Gaussian sources about a label.

    P' is the distribution in which each source is with the label as it is, and the sources are independent given the
    label. What source m has alone is I'(m; label | others), the synergy is I(all; label) - I'(all; label), and the rest
    is redundant; all are logarithms of determinants of covariances. This follows the description of Lyu, Clark and
    Raviv 2026 (arXiv:2605.09919: measures from conditional independence) and may differ from their estimators.

    Args:
      sources: `[n, F]` by name, each with its own F.
      label: `[n, T]`.
    """
    names = list(sources)
    blocks = [_standardised(sources[name]) for name in names] + [_standardised(label)]
    ends = np.cumsum([0, *(block.shape[1] for block in blocks)])
    where = [slice(*pair) for pair in itertools.pairwise(ends)]
    own = np.cov(np.hstack(blocks), rowvar=False, bias=True) + RIDGE * np.eye(ends[-1])
    independent = own.copy()
    target = where[-1]
    for i, first in enumerate(where[:-1]):
        for second in (*where[:i], *where[i + 1 : -1]):
            independent[first, second] = own[first, target] @ np.linalg.solve(own[target, target], own[target, second])
    every = list(range(len(names)))
    unique = {}
    for i, name in enumerate(names):
        others = [j for j in every if j != i]
        alone = _information(own, where, [i], [len(names)])
        unique[name] = max(0.0, alone - _information(independent, where, [i], others))
    whole = _information(own, where, every, [len(names)])
    synergy = whole - _information(independent, where, every, [len(names)])
    return SourcesDecomposition(unique, whole - synergy - sum(unique.values()), synergy)


@one_thread
def of_dataset(
    dataset: Dataset, task: str, seed: int = 0, max_rows: int = 20_000, components: int = 16
) -> tuple[SourcesDecomposition, SourcesDecomposition]:
    """Returns the decomposition of the modalities' features, and that of permuted classes, which measures the bias.

    Args:
      dataset: a dataset with two modalities or more; its train split is used.
      task: a single-label target, read as the indicators of its classes.
      seed: seed of the subsample and the permutation.
      max_rows: the maximum number of training rows.
      components: the number of principal components that a modality is reduced to.
    """
    found = features(dataset, task, seed, max_rows)
    sources = {
        m: _components(dense({"train": own["train"]}, seed, reduce=True)["train"], components)
        for m, own in sorted(found.tables.items())
    }
    classes = found.targets["train"]
    permuted = np.random.default_rng(seed).permutation(classes)
    first, second = (decompose(sources, np.eye(classes.max() + 1)[labels][:, 1:]) for labels in (classes, permuted))
    return first, second


def _components(table: np.ndarray, count: int) -> np.ndarray:
    centred = np.asarray(table, np.float64) - table.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    return centred @ vectors[:, np.argsort(-values)[:count]]  # [n, count]


def _standardised(table: np.ndarray) -> np.ndarray:
    table = np.asarray(table, np.float64) - np.mean(table, axis=0)
    return table / np.maximum(table.std(axis=0), 1e-12)


def _information(covariance: np.ndarray, where: Sequence[slice], first: Sequence[int], second: Sequence[int]) -> float:
    """Returns the mutual information of two groups of blocks of a Gaussian, in bits."""

    def log_determinant(blocks: Sequence[int]) -> float:
        index = np.concatenate([np.arange(where[i].start, where[i].stop) for i in blocks])
        return np.linalg.slogdet(covariance[np.ix_(index, index)])[1]

    total = log_determinant(first) + log_determinant(second) - log_determinant([*first, *second])
    return float(total / (2 * np.log(2)))
