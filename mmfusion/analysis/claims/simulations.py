"""Simulations of the claims under known truth: false claims, coverage of intervals, and power."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from scipy import stats

from mmfusion.analysis.claims.crossed import on_new_data
from mmfusion.analysis.claims.differences import selected_difference
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.significance import (
    BETTER,
    EQUIVALENT,
    POWER,
    compare,
    max_t,
    mean_interval,
    seeds_needed,
    verdict,
)

SEEDS = (6, 9, 12, 20)
EXAMPLES = (300, 3_000, 10_000)
STRATEGIES = 12
COVERAGE = 0.93  # that nominal 95 % intervals must reach


@dataclasses.dataclass(frozen=True)
class Row:
    """A simulated rate and its bound.

    Attributes:
      what: what is counted.
      setting: of the simulation.
      rate: the share of simulations.
      times: their number.
      least, most: the bounds; None without one, as where a rate is shown for comparison.
    """

    what: str
    setting: str
    rate: float
    times: int
    least: float | None = None
    most: float | None = None

    @property
    def error(self) -> float:
        """Twice the standard error of a rate at the bound."""
        bound = self.rate if self.least is self.most is None else self.most if self.least is None else self.least
        assert bound is not None
        return 2 * math.sqrt(bound * (1 - bound) / self.times)

    @property
    def holds(self) -> bool:
        """Whether the rate is within its bounds, but for the error of the simulation."""
        low = self.least is None or self.rate >= self.least - self.error
        return low and (self.most is None or self.rate <= self.most + self.error)


def rows(times: int, seed: int = 0) -> Iterator[Row]:
    """Yields every row, each simulated so many times."""
    random = np.random.default_rng(seed)
    for part in (false_claims_on_this_test_set, false_claims_on_new_data, coverage, selection, equivalence, power):
        yield from part(times, random)


def false_claims_on_this_test_set(times: int, random: np.random.Generator) -> Iterator[Row]:
    """Any of 12 strategies told apart from a reference of equal mean, over seeds."""
    for n in SEEDS:
        for name, distribution in (("normal", stats.norm()), ("t3", stats.t(3))):
            scores = distribution.rvs(size=(times, STRATEGIES + 1, n), random_state=random)
            told = [max_t(each[1:] - each[:1]).min() < 0.05 for each in scores]
            setting = f"{STRATEGIES} strategies, {n} seeds, {name}"
            yield Row("false claim, this test set", setting, float(np.mean(told)), times, most=0.05)


def equal_methods(seeds: int, examples: int, random: np.random.Generator) -> np.ndarray:
    """Returns correctness `[2, S, E]` of two methods that are equally good on the population, but not on an example."""
    logits = 1.8 + 1.5 * random.normal(size=examples) + random.normal(size=(2, 1, examples))
    logits = logits + 0.15 * random.normal(size=(2, seeds, 1)) + 0.7 * random.normal(size=(2, seeds, examples))
    return (random.random((2, seeds, examples)) < 1 / (1 + np.exp(-logits))).astype(np.float64)


def false_claims_on_new_data(times: int, random: np.random.Generator) -> Iterator[Row]:
    """Two methods of equal accuracy on the population told apart, judged for new data and over seeds alone."""
    for n in SEEDS:
        for examples in EXAMPLES:
            found = np.zeros(2)
            for _ in range(times):
                first, second = equal_methods(n, examples, random)
                found += [
                    on_new_data(first - second).p < 0.05,
                    max_t((first - second).mean(axis=1)[None])[0] < 0.05,
                ]
            setting = f"{n} seeds, {examples:,} examples"
            yield Row("false claim, new data", setting, found[0] / times, times, most=0.05)
            yield Row("the same, judged over seeds alone", setting, found[1] / times, times)


def coverage(times: int, random: np.random.Generator) -> Iterator[Row]:
    """The true mean of the differences within the 95 % interval."""
    distributions = {"normal": stats.norm(), "t3": stats.t(3), "exponential": stats.expon(loc=-1)}
    for n in SEEDS[:3]:
        for name, distribution in distributions.items():
            values = distribution.rvs(size=(times, n), random_state=random)
            covered = float(np.mean([low <= 0 <= high for low, high in map(mean_interval, values)]))
            least = COVERAGE if name != "exponential" else None
            yield Row("interval covers", f"{n} seeds, {name}", covered, times, least=least)


def strategies(number: int, seeds: int, random: np.random.Generator) -> list[MethodResult]:
    """Returns equal strategies and then a baseline; the luck of a seed is in validation and test."""
    found = []
    for i in range(number + 1):
        luck = 0.01 * random.normal(size=seeds)
        valid, test = (tuple(0.8 + luck + 0.003 * random.normal(size=seeds)) for _ in range(2))
        found.append(MethodResult(f"s{i}", i == number, {}, (), tuple(range(seeds)), (), valid, test, None))
    return found


def selection(times: int, random: np.random.Generator) -> Iterator[Row]:
    """The interval of the selected difference, and a false claim that the best of 12 equal strategies helps."""
    for n in SEEDS[:3]:
        covered = told = 0
        for _ in range(times):
            *fused, alone = strategies(STRATEGIES, n, random)
            best = max(fused, key=lambda row: np.mean(row.valid))
            difference = selected_difference(fused, [alone], best, alone, True)
            assert difference.comparison is not None
            low, high = difference.comparison.interval
            covered += low <= 0 <= high
            told += difference.verdict == BETTER
        setting = f"best of {STRATEGIES} equal strategies, {n} seeds"
        yield Row("interval of the selected difference covers", setting, covered / times, times, least=COVERAGE)
        yield Row("false claim, fusion helps", setting, told / times, times, most=0.05)


def equivalence(times: int, random: np.random.Generator) -> Iterator[Row]:
    """`equivalent` of a difference at the margin, and of none."""
    for n in SEEDS[:3]:
        for mean, bounds in ((0.01, {"most": 0.05}), (0.0, {})):
            values = mean + 0.006 * random.normal(size=(times, n))
            found = [
                verdict(compare(x.tolist(), [0.0] * n), float(max_t(x[None])[0]), 0.01) == EQUIVALENT for x in values
            ]
            where = "at the margin" if mean else "of 0, deviation 0.6 of the margin"
            yield Row("equivalent", f"difference {where}, {n} seeds", float(np.mean(found)), times, **bounds)


def power(times: int, random: np.random.Generator) -> Iterator[Row]:
    """The verdict tells at the number of seeds that is said to be needed for it."""
    for effect in (0.4, 0.8, 1.5):
        for comparisons in (1, STRATEGIES - 1):
            seen = effect + np.array([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0]) * math.sqrt(5 / 6)  # deviation 1
            needed = seeds_needed(seen, comparisons)
            assert needed is not None
            told = 0
            for _ in range(times):
                family = effect + random.normal(size=(comparisons, needed))
                told += verdict(compare(family[0].tolist(), [0.0] * needed), float(max_t(family)[0])) == BETTER
            setting = f"effect {effect} deviations, family of {comparisons}: {needed} seeds"
            yield Row("power kept at the seeds promised", setting, told / times, times, least=POWER)


def table(found: list[Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = ["| what | setting | bound | rate | ± | times | holds |", "| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    for row in found:
        bound = f"≥ {row.least:g}" if row.least is not None else f"≤ {row.most:g}" if row.most is not None else "–"
        holds = "–" if row.least is row.most is None else "yes" if row.holds else "**no**"
        cells = (row.what, row.setting, bound, f"{row.rate:.3f}", f"{row.error:.3f}", f"{row.times:,}", holds)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
