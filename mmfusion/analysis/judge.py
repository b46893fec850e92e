"""What the runs of a plan say: the value that validation chooses for each method, differences with evidence, claims.

Test scores are read once everything has been chosen.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion import config as configs
from mmfusion.analysis.plan import Cell
from mmfusion.analysis.statistics import Comparison, compare, holm, seeds_to_tell, verdict
from mmfusion.errors import UserError

REFERENCE = "concat"  # what a strategy has to beat to be worth its name


@dataclasses.dataclass(frozen=True)
class Row:
    """A method at the values that validation chose for it.

    Attributes:
      method, floor: as in the plan.
      chosen: the values, by config key.
      runs: the cells of those seeds that ended in a number.
      seeds: these, in order.
      lost: the seeds that failed or whose scores are undefined.
      valid, test: the metric of those seeds.
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

    @property
    def mean(self) -> float:
        """Mean test score; NaN where no seed ended."""
        return statistics.fmean(self.test) if self.test else math.nan


@dataclasses.dataclass(frozen=True)
class Difference:
    """A method against another over the seeds that both ended.

    Attributes:
      method, other: their names.
      comparison: of their test scores, turned so that more is better; None with fewer than two pairs.
      p: corrected for the number of methods compared.
      verdict: better, worse, cannot tell.
      seeds_needed: pairs that would tell a difference like the one seen; None where that is no number of use.
    """

    method: str
    other: str
    comparison: Comparison | None
    p: float | None
    verdict: str
    seeds_needed: int | None


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
        ended = [c for c in best if number(c, "valid") is not None and number(c, "test") is not None]
        found.append(
            Row(
                method=method,
                floor=best[0].floor,
                chosen=best[0].tried,
                runs=tuple(c.name for c in ended),
                seeds=tuple(c.config["seed"] for c in ended),
                lost=tuple(c.config["seed"] for c in best if c not in ended),
                valid=tuple(number(c, "valid") for c in ended),
                test=tuple(number(c, "test") for c in ended),
                parameters=results[ended[0].name]["parameters"] if ended else None,
            )
        )
    return found


def differences(found: Sequence[Row], other: Row, higher: bool) -> list[Difference]:
    """Compares methods with another one, seed by seed; p values are corrected for their number (Holm).

    Args:
      found: the methods.
      other: that each is compared with.
      higher: whether more is better.
    """
    pairs = []
    for row in found:
        theirs, ours = dict(zip(other.seeds, other.test, strict=True)), dict(zip(row.seeds, row.test, strict=True))
        both = sorted(set(theirs) & set(ours))
        sign = 1.0 if higher else -1.0
        pairs.append(([sign * ours[s] for s in both], [sign * theirs[s] for s in both]))
    compared = [compare(a, b) if len(a) > 1 else None for a, b in pairs]
    corrected = iter(holm([one.p for one in compared if one]))
    count = sum(one is not None for one in compared)
    result = []
    for row, one, (a, b) in zip(found, compared, pairs, strict=True):
        p = next(corrected) if one else None
        said = verdict(one, p) if one else "cannot tell"
        needed = seeds_to_tell([x - y for x, y in zip(a, b, strict=True)], count) if one else None
        result.append(Difference(row.method, other.method, one, p, said, needed if said == "cannot tell" else None))
    return result


def best(found: Sequence[Row], higher: bool) -> Row | None:
    """Returns the row with the best mean validation score of those that lost the fewest seeds; None of none."""
    ended = [row for row in found if row.valid]
    sign = 1.0 if higher else -1.0
    return max(ended, key=lambda row: (-len(row.lost), sign * statistics.fmean(row.valid)), default=None)
