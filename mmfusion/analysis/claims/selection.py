"""What the runs of a plan say: the value that validation chooses for each method, differences with evidence, claims.

Test scores are read once everything has been chosen.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import REFERENCE, Cell
from mmfusion.analysis.claims.significance import Comparison, compare, holm, seeds_to_tell, sign_flip_of_chosen, verdict
from mmfusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """A method at the values that validation chose for it.

    Attributes:
      method, fusion, variation, floor: as in the plan.
      chosen: the values, by config key.
      runs: the cells of those seeds that ended in a number.
      seeds: these, in order.
      lost: the seeds that failed or whose scores are undefined.
      valid: the metric of the seeds with one on validation.
      test: the metric of `seeds`.
      parameters: of the model.
    """

    method: str
    floor: bool
    chosen: dict[str, Any]
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    lost: tuple[int, ...]
    valid: tuple[float, ...]
    test: tuple[float, ...]
    parameters: int | None
    fusion: str = ""
    variation: str = ""

    @property
    def mean(self) -> float:
        """Mean test score; NaN where no seed ended."""
        return statistics.fmean(self.test) if self.test else math.nan

    @property
    def is_reference(self) -> bool:
        """Whether it is what strategies are compared with."""
        return self.fusion == REFERENCE


@dataclasses.dataclass(frozen=True)
class Difference:
    """A method against another over the seeds that both ended.

    Attributes:
      method, other: their names.
      comparison: of their test scores, turned so that more is better; None with fewer than two pairs.
      p: corrected for the number of methods compared.
      verdict: better, worse, cannot tell.
      seeds_needed: pairs that would tell a difference like the one seen; None where that is no number of use.
      lost: seeds on which one of them failed, which the comparison leaves out.
    """

    method: str
    other: str
    comparison: Comparison | None
    p: float | None
    verdict: str
    seeds_needed: int | None
    lost: tuple[int, ...] = ()


def references(found: Sequence[Row]) -> dict[str, Row]:
    """Returns what each method that fuses is held against: `concat` otherwise alike; of one strategy its first form."""
    fused = [row for row in found if not row.floor]
    if len({row.fusion for row in fused}) == 1:
        return {row.method: fused[0] for row in fused[1:]}
    own = {row.variation: row for row in fused if row.is_reference}
    return {row.method: own[row.variation] for row in fused if row.variation in own and not row.is_reference}


def direction(cells: Sequence[Cell], metric: str) -> bool:
    """Returns whether more of the metric is better.

    Raises:
      UserError: the runs have no such metric.
    """
    have = configs.selectable(configs.from_json(cells[0].config))
    if metric not in have:
        raise UserError(f"--metric={metric}: choose {', '.join(have)}")
    return have[metric]


def rows(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]], metric: str) -> list[Row]:
    """Returns a row a method, in the plan's order, each at the values with the best mean validation score.

    A seed that failed or has no number counts as worse than any number, for each value alike.

    Args:
      cells: of the plan.
      results: cell name -> what `result.json` holds; cells that failed are missing.
      metric: that chooses and is compared.
    """
    higher = direction(cells, metric)
    by_method: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, {}).setdefault(repr(cell.tried), []).append(cell)

    def number(cell: Cell, split: str) -> float | None:
        value = results.get(cell.name, {}).get(split, {}).get(metric)
        return value if value is not None and math.isfinite(value) else None

    def rank(tried: list[Cell]) -> tuple[int, float]:
        scores = [score for cell in tried if (score := number(cell, "valid")) is not None]
        mean = statistics.fmean(scores) if scores else 0.0
        return len(scores), mean if higher else -mean

    found = []
    for method, each in by_method.items():
        best = max(each.values(), key=rank)  # the first of equals
        valid = [score for cell in best if (score := number(cell, "valid")) is not None]
        ended = [c for c in best if number(c, "valid") is not None and number(c, "test") is not None]
        found.append(
            Row(
                method=method,
                floor=best[0].floor,
                chosen=best[0].tried,
                runs=tuple(c.name for c in ended),
                seeds=tuple(c.config["seed"] for c in ended),
                lost=tuple(c.config["seed"] for c in best if c not in ended),
                valid=tuple(valid),
                test=tuple(number(c, "test") for c in ended),
                parameters=results[ended[0].name]["parameters"] if ended else None,
                fusion=best[0].fusion,
                variation=best[0].variation,
            )
        )
    return found


def differences(pairs: Sequence[tuple[Row, Row]], higher: bool) -> list[Difference]:
    """Compares methods with others, seed by seed; p values are corrected for the number of pairs (Holm).

    Args:
      pairs: a method, and the one that it is compared with.
      higher: whether more is better.
    """
    scores = [_paired(row, other, higher) for row, other in pairs]
    compared = [compare(a, b) if len(a) > 1 else None for a, b in scores]
    corrected = iter(holm([one.p for one in compared if one]))
    count = sum(one is not None for one in compared)
    return [
        _difference(row, other, one, next(corrected) if one else None, *both, count)
        for (row, other), one, both in zip(pairs, compared, scores, strict=True)
    ]


def chosen_difference(found: Sequence[Row], others: Sequence[Row], row: Row, other: Row, higher: bool) -> Difference:
    """Compares a method that was chosen of several with another that was, too; p holds whatever chose them.

    Args:
      found: the methods that `row` was chosen of.
      others: those that `other` was chosen of.
      row, other: that are compared.
      higher: whether more is better.
    """
    a, b = _paired(row, other, higher)
    if len(a) < 2:
        return _difference(row, other, None, None, a, b, 1)
    every = [(one, two) for one in found for two in others]
    seeds = sorted({seed for one, two in every for seed in set(one.seeds) & set(two.seeds)})
    sign = 1.0 if higher else -1.0
    table = np.full((len(every), len(seeds)), np.nan)
    for i, (one, two) in enumerate(every):
        ours, theirs = (dict(zip(x.seeds, x.test, strict=True)) for x in (one, two))
        for j, seed in enumerate(seeds):
            if seed in ours and seed in theirs:
                table[i, j] = sign * (ours[seed] - theirs[seed])
    p = sign_flip_of_chosen(table, next(i for i, (one, two) in enumerate(every) if one is row and two is other))
    return _difference(row, other, compare(a, b), p, a, b, len(found))


def best(found: Sequence[Row], higher: bool, *, failing_last: bool = True) -> Row | None:
    """Returns the row with the best mean validation score; None of none.

    Args:
      found: the methods.
      higher: whether more is better.
      failing_last: whether methods that failed on fewer seeds come first; else only those that failed on most do not.
    """
    sign = 1.0 if higher else -1.0
    most = max((len(row.valid) for row in found), default=0)

    def rank(row: Row) -> tuple[int, float]:
        ended = len(row.valid) if failing_last else 2 * len(row.valid) >= most
        return ended, sign * statistics.fmean(row.valid)

    return max((row for row in found if row.valid), key=rank, default=None)


def _paired(row: Row, other: Row, higher: bool) -> tuple[list[float], list[float]]:
    """Returns the test scores of the seeds that both ended, turned so that more is better."""
    sign = 1.0 if higher else -1.0
    ours, theirs = (dict(zip(one.seeds, one.test, strict=True)) for one in (row, other))
    both = sorted(set(ours) & set(theirs))
    return [sign * ours[seed] for seed in both], [sign * theirs[seed] for seed in both]


def _difference(
    row: Row,
    other: Row,
    one: Comparison | None,
    p: float | None,
    ours: Sequence[float],
    theirs: Sequence[float],
    count: int,
) -> Difference:
    said = verdict(one, p) if one else "cannot tell"
    needed = None
    if one and said == "cannot tell":
        needed = seeds_to_tell([a - b for a, b in zip(ours, theirs, strict=True)], count)
    lost = tuple(sorted({*row.lost, *other.lost}))
    return Difference(row.method, other.method, one, p, said, needed, lost)
