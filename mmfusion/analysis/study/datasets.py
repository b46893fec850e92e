"""The methods of a study on each of its datasets, and their scores on one scale.

M methods · S seeds. A floor is one method on all datasets, whatever its modality or model: the one that validation
selected on each.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmfusion.analysis import baselines
from mmfusion.analysis.claims import selection
from mmfusion.analysis.claims.claims import INPUT_FREE
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.outcome import Outcome

BEST_UNIMODAL, BEST_CLASSICAL = "best single modality", "best classical model"
ENSEMBLE = "ensemble"  # how the names of ensembles of single modalities begin
CLASSICAL = {model.name for models in baselines.MODELS.values() for model in models}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The methods of an ablation as those of a study.

    Attributes:
      name: of the dataset in the study.
      outcome: of the ablation.
      methods: name in the study -> its result, of those with a score.
      strategies: the names of the fusion strategies among them.
      chance: the test score of the baseline without inputs; None where the metric cannot score it.
    """

    name: str
    outcome: Outcome
    methods: dict[str, MethodResult]
    strategies: tuple[str, ...]
    chance: float | None

    def runs(self, method: str) -> list[dict[str, Any]]:
        """Returns the `result.json` of each run of a method; a floor that is made of other runs has none."""
        results = self.outcome.results
        return [results[name] for name in self.methods[method].trials if name in results]

    @property
    def seeds(self) -> list[int]:
        """The seeds on which at least one strategy has a score."""
        return sorted({seed for name in self.strategies for seed in self.methods[name].seeds})

    @property
    def scale(self) -> float | None:
        """The range from chance to a perfect score, negative where lower is better; None without both."""
        perfect = 1.0 if self.outcome.higher else 0.0
        is_loss = self.outcome.metric.rpartition("/")[2] == "loss"  # it has no best value
        if self.chance is None or is_loss or (perfect > self.chance) != self.outcome.higher:
            return None
        return perfect - self.chance

    def scores(self, methods: Sequence[str]) -> np.ndarray:
        """Returns test scores `[M, S]`, signed so that higher is better; NaN for a seed that a method lacks."""
        table, seeds = np.full((len(methods), len(self.seeds)), np.nan), self.seeds
        sign = 1.0 if self.outcome.higher else -1.0
        for row, method in zip(table, methods, strict=True):
            found = dict(zip(self.methods[method].seeds, self.methods[method].test, strict=True))
            row[:] = [sign * found.get(seed, np.nan) for seed in seeds]
        return table

    def normalised(self, methods: Sequence[str]) -> np.ndarray | None:
        """Returns test scores `[M, S]` with chance at 0 and a perfect score at 1; None without a scale."""
        if self.scale is None or self.chance is None:
            return None
        sign = 1.0 if self.outcome.higher else -1.0
        return (sign * self.scores(methods) - self.chance) / self.scale

    def valid(self, method: str) -> float:
        """Returns the mean validation score of a method, signed so that higher is better."""
        return statistics.fmean(self.methods[method].valid) * (1.0 if self.outcome.higher else -1.0)


def read(name: str, outcome: Outcome) -> Dataset:
    """Returns the methods of a finished ablation as those of a study.

    Strategies and ensembles keep their names. The single modalities and the classical models become a floor each, and
    the baseline without inputs is chance.

    Args:
      name: of the dataset in the study.
      outcome: of the ablation.
    """
    methods: dict[str, MethodResult] = {}
    floors: dict[str, list[MethodResult]] = {BEST_UNIMODAL: [], BEST_CLASSICAL: []}
    chance, strategies = None, []
    for result in outcome.methods:
        model = result.method.partition(", ")[0]
        if not result.test or not result.valid:
            continue
        if result.fusion:
            methods[result.method] = result
            strategies.append(result.method)
        elif result.method.startswith(ENSEMBLE):
            methods[result.method] = result
        elif not result.trials and result.method in INPUT_FREE:
            chance = result.mean
        elif not result.trials and model in CLASSICAL:
            floors[BEST_CLASSICAL].append(result)
        elif result.unimodal_baseline:
            floors[BEST_UNIMODAL].append(result)
    for floor, candidates in floors.items():
        best = selection.best(candidates, outcome.higher, fewest_failures_first=False)
        if best is not None:
            methods[floor] = best
    return Dataset(name, outcome, methods, tuple(strategies), chance)


def common_methods(datasets: Sequence[Dataset]) -> list[str]:
    """Returns the methods with a score on every dataset, strategies first."""
    first = datasets[0]
    names = [*first.strategies, *(name for name in first.methods if name not in first.strategies)]
    return [name for name in names if all(name in dataset.methods for dataset in datasets)]
