"""The numbers of a study, from the finished ablations of its datasets to `study.json`."""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from mmfusion.analysis.ablation.plan import REFERENCE
from mmfusion.analysis.claims.differences import Difference
from mmfusion.analysis.claims.significance import SEEDS
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.report.aggregation import speed
from mmfusion.analysis.study import aggregates
from mmfusion.analysis.study.aggregates import Estimate
from mmfusion.analysis.study.comparisons import DATASETS, Friedman, friedman, judge
from mmfusion.analysis.study.datasets import BEST_UNIMODAL, ENSEMBLE, Dataset, common_methods, read

LATE_TRANSFORMER = "late_transformer"
THRESHOLDS = np.linspace(0, 1, 101)


@dataclasses.dataclass(frozen=True)
class Row:
    """A method over all datasets.

    Attributes:
      method: its name.
      is_strategy: whether it is a fusion strategy, not a floor.
      rank: its mean rank by mean test score; 1 is best.
      valid_rank: the same by validation score, by which the best is selected.
      middle: the interquartile mean of normalised test scores; None without a normalised dataset.
      mean: the mean over datasets of the mean normalised test score.
      profile: the share of runs above each of `THRESHOLDS`, and the ends of its interval `[3, T]`.
      improvement: reference -> P(a run of the method > one of the reference).
      parameters, step_time: geometric means over datasets of the ratio to the first reference; None if unknown.
      seconds: the sum over datasets of the mean time of a run; None if unknown.
      last_step: the share of runs whose best step is the last of the schedule; None if unknown.
    """

    method: str
    is_strategy: bool
    rank: Estimate
    valid_rank: float
    middle: Estimate | None
    mean: float | None
    profile: np.ndarray | None
    improvement: dict[str, Estimate]
    parameters: float | None
    step_time: float | None
    seconds: float | None
    last_step: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """A study of the datasets that are finished.

    Attributes:
      datasets: those with a score of every method in `rows`, in the study's order.
      planned: the number of datasets of the study.
      without: the datasets that are finished without a score -> the reason.
      left_out: methods without a score on every dataset -> the datasets that lack it.
      references: the methods that the strategies are compared with.
      best: the strategy that validation selected, by mean rank.
      rows: the methods, best mean rank first.
      test: of the ranks of all methods.
      over_datasets: strategies against references, paired by dataset, normalised scores.
      over_seeds: dataset -> strategies against references, paired by seed.
      equivalence: the margin, as a share of the score of the other method, or of the normalised scale.
      tune: the number of tuning trials of each method; 0: none.
    """

    datasets: tuple[Dataset, ...]
    planned: int
    without: dict[str, str]
    left_out: dict[str, list[str]]
    references: tuple[str, ...]
    best: str
    rows: tuple[Row, ...]
    test: Friedman | None
    over_datasets: tuple[Difference, ...]
    over_seeds: dict[str, tuple[Difference, ...]]
    equivalence: float
    tune: int = 0

    @property
    def normalised(self) -> list[Dataset]:
        """The datasets whose scores can be normalised."""
        return [dataset for dataset in self.datasets if dataset.scale is not None]

    @property
    def strategies(self) -> list[str]:
        """The fusion strategies, best mean rank first."""
        return [row.method for row in self.rows if row.is_strategy]

    def row(self, method: str) -> Row:
        """Returns a method's row."""
        return next(row for row in self.rows if row.method == method)

    def against(self, reference: str) -> list[Difference]:
        """Returns the comparisons over datasets with a reference."""
        return [judged for judged in self.over_datasets if judged.other == reference]


def summarise(
    outcomes: Mapping[str, Outcome], planned: int, equivalence: float = 0.01, tune: int = 0
) -> Summary | None:
    """Returns the numbers of a study; None if no dataset has a score of a strategy.

    Args:
      outcomes: dataset -> the outcome of its finished ablation, in the study's order.
      planned: the number of datasets of the study.
      equivalence: the share of a score, or of the normalised scale, below which methods count as equivalent.
      tune: the number of tuning trials of each method; 0: none.
    """
    found = [read(name, outcome) for name, outcome in outcomes.items()]
    without = {one.name: "no run of a fusion strategy has a score" for one in found if not one.strategies}
    datasets = [one for one in found if one.strategies]
    methods = common_methods(datasets) if datasets else []
    strategies = [name for name in methods if datasets and name in datasets[0].strategies]
    if not strategies:
        return None
    every = dict.fromkeys(name for dataset in datasets for name in dataset.methods)
    left_out = {
        name: [dataset.name for dataset in datasets if name not in dataset.methods]
        for name in every
        if name not in methods
    }
    references = _references(datasets, methods)
    rows = _rows(datasets, methods, strategies, references)
    normalised = [dataset for dataset in datasets if dataset.scale is not None]
    scores = _means(normalised, methods) if normalised else {}
    over_datasets = [judge(scores, strategies, other, equivalence, DATASETS) for other in references if scores]
    return Summary(
        datasets=tuple(datasets),
        planned=planned,
        without=without,
        left_out=left_out,
        references=references,
        best=min(strategies, key=lambda name: next(row.valid_rank for row in rows if row.method == name)),
        rows=tuple(rows),
        test=friedman({row.method: row.rank.value for row in rows}, len(datasets)),
        over_datasets=tuple(itertools.chain.from_iterable(over_datasets)),
        over_seeds={dataset.name: _over_seeds(dataset, strategies, references, equivalence) for dataset in datasets},
        equivalence=equivalence,
        tune=tune,
    )


def _references(datasets: Sequence[Dataset], methods: Sequence[str]) -> tuple[str, ...]:
    """Returns concat, the late-fusion transformer, and the best of the single modalities and of their ensembles.

    The best ensemble is that of the best mean rank by validation score.
    """
    ensembles = [name for name in methods if name.startswith(ENSEMBLE)]
    best = sorted(ensembles, key=dict(zip(methods, _valid_ranks(datasets, methods), strict=True)).__getitem__)[:1]
    return tuple(name for name in (REFERENCE, LATE_TRANSFORMER, *best, BEST_UNIMODAL) if name in methods)


def _valid_ranks(datasets: Sequence[Dataset], methods: Sequence[str]) -> np.ndarray:
    return aggregates.mean_ranks([np.array([[dataset.valid(name)] for name in methods]) for dataset in datasets])


def _rows(
    datasets: Sequence[Dataset], methods: Sequence[str], strategies: Sequence[str], references: Sequence[str]
) -> list[Row]:
    raw = [dataset.scores(methods) for dataset in datasets]
    normalised = [table for dataset in datasets if (table := dataset.normalised(methods)) is not None]
    ranks, valid_ranks = aggregates.estimates(raw, aggregates.mean_ranks), _valid_ranks(datasets, methods)
    improvement = {
        other: aggregates.estimates(raw, functools.partial(aggregates.improvements, reference=methods.index(other)))
        for other in references
    }
    middle = means = profiles = [None] * len(methods)
    if normalised:
        middle = aggregates.estimates(normalised, aggregates.interquartile_means)
        means = aggregates.means(normalised).tolist()
        values, low, high = aggregates.spans(normalised, lambda tables: aggregates.profiles(tables, THRESHOLDS))
        profiles = np.stack([values if end is None else end for end in (values, low, high)], axis=1)  # [M, 3, T]
    base = references[0] if references and references[0] in strategies else strategies[0]
    rows = [
        Row(
            method=name,
            is_strategy=name in strategies,
            rank=ranks[i],
            valid_rank=float(valid_ranks[i]),
            middle=middle[i],
            mean=means[i],
            profile=profiles[i],
            improvement={other: found[i] for other, found in improvement.items() if other != name},
            parameters=_ratio([(_parameters(d, name), _parameters(d, base)) for d in datasets]),
            step_time=_ratio([(_speed(d, base), _speed(d, name)) for d in datasets]),
            seconds=_seconds(datasets, name),
            last_step=_last_step(datasets, name),
        )
        for i, name in enumerate(methods)
    ]
    return sorted(rows, key=lambda row: row.rank.value)


def _means(datasets: Sequence[Dataset], methods: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the mean normalised score `[D]` of each method."""
    tables = [table for dataset in datasets if (table := dataset.normalised(methods)) is not None]
    return dict(zip(methods, np.stack([np.nanmean(table, axis=-1) for table in tables], axis=-1), strict=True))


def _over_seeds(
    dataset: Dataset, strategies: Sequence[str], references: Sequence[str], equivalence: float
) -> tuple[Difference, ...]:
    methods = list(dict.fromkeys((*strategies, *references)))
    scores = dict(zip(methods, dataset.scores(methods), strict=True))
    margins = {other: equivalence * abs(dataset.methods[other].mean) for other in references}
    found = [judge(scores, strategies, other, margins[other], SEEDS) for other in references]
    return tuple(itertools.chain.from_iterable(found))


def _parameters(dataset: Dataset, method: str) -> float | None:
    return dataset.methods[method].parameters


def _speed(dataset: Dataset, method: str) -> float | None:
    value = speed(dataset.methods[method], dataset.outcome)
    return value if math.isfinite(value) and value > 0 else None


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> float | None:
    """Returns the geometric mean of the ratios; None if a value is unknown."""
    logs = [math.log(first / second) for first, second in pairs if first and second]
    return math.exp(statistics.fmean(logs)) if len(logs) == len(pairs) else None


def _seconds(datasets: Sequence[Dataset], method: str) -> float | None:
    """Returns the sum over datasets of the mean time of a run; None if it is unknown for one."""
    total = 0.0
    for dataset in datasets:
        found = [seconds for run in dataset.runs(method) if (seconds := run.get("seconds"))]
        if not found:
            return None
        total += statistics.fmean(found)
    return total


def _last_step(datasets: Sequence[Dataset], method: str) -> float | None:
    """Returns the share of runs whose best step is the last of the schedule, so that longer training may be better."""
    runs = [run for dataset in datasets for run in dataset.runs(method)]
    found = [run["best_step"] == run["config"]["steps"] for run in runs if "best_step" in run and "config" in run]
    return sum(found) / len(found) if found else None


def content(summary: Summary) -> dict:
    """Returns the content of `study.json`."""
    return {
        "datasets": [_dataset_content(dataset, summary) for dataset in summary.datasets],
        "finished": len(summary.datasets) + len(summary.without),
        "planned": summary.planned,
        "without": summary.without,
        "left_out": summary.left_out,
        "references": summary.references,
        "best": summary.best,
        "equivalence": summary.equivalence,
        "tune": summary.tune,
        "thresholds": THRESHOLDS,
        "methods": [dataclasses.asdict(row) for row in summary.rows],
        "friedman": dataclasses.asdict(summary.test) if summary.test else None,
        "over_datasets": [dataclasses.asdict(judged) for judged in summary.over_datasets],
        "over_seeds": {name: [dataclasses.asdict(j) for j in found] for name, found in summary.over_seeds.items()},
    }


def _dataset_content(dataset: Dataset, summary: Summary) -> dict:
    methods = [row.method for row in summary.rows]
    normalised = dataset.normalised(methods)
    return {
        "name": dataset.name,
        "metric": dataset.outcome.metric,
        "higher_is_better": dataset.outcome.higher,
        "chance": dataset.chance,
        "seeds": dataset.seeds,
        "best": dataset.outcome.claims.best,
        "methods": {
            method: {
                "as": dataset.methods[method].method,
                "test": dataset.methods[method].test,
                "seeds": dataset.methods[method].seeds,
                "mean": dataset.methods[method].mean,
                "selected": dataset.methods[method].selected,
                "normalised": None if normalised is None else float(np.nanmean(normalised[i])),
            }
            for i, method in enumerate(methods)
        },
    }
