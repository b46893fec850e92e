"""What a comparison is and how it ended: rows of times or of memory, of which less is always better."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.benchmark.contender import NOT_MEASURED, Contender, Options, measure

OURS = "mmfusion"


@dataclasses.dataclass(frozen=True)
class Goal:
    """How fast our side should be.

    Attributes:
      bound: of the ratio, the other's value divided by ours, at least; of our own value, at most, without `against`.
      against: names of contenders, of which the best counts; empty: none.
    """

    bound: float
    against: tuple[str, ...] = ()

    def text(self, unit: str) -> str:
        """Returns the goal in words."""
        if not self.against:
            return f"≤ {self.bound:g} {unit.split()[0]}"
        return f"≥ {self.bound:.2g}× {'the best peer' if len(self.against) > 2 else ' and '.join(self.against)}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row.

    Attributes:
      name: of the row, in its group.
      unit: of every value; less is better.
      contenders: ours is called `OURS`.
      goals: of our side.
      scale: factor from the contenders' values to the unit.
      memory: unit `MB` row of the peak memory, in addition, with these goals; None: no such row.
      limit: from all results to the value that the machine allows, in the unit; None: none is known.
    """

    name: str
    unit: str
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...] = ()
    scale: float = 1.0
    memory: tuple[Goal, ...] | None = None
    limit: Callable[[Mapping[str, Any]], float] | None = None


def run(comparison: Comparison, options: Options) -> list[dict[str, Any]]:
    """Measures a comparison and returns its rows as JSON values."""
    results = measure(comparison.contenders, options)
    limit = None
    if comparison.limit is not None and not any("error" in results[name] for name in (OURS, "limits")):
        limit = comparison.limit(results)
    results.pop("limits", None)  # the machine's own rates are no contender
    columns = scaled(results, comparison.scale)
    made = [row(comparison.name, comparison.unit, columns, comparison.goals, limit)]
    if comparison.memory is not None:
        peaks = {
            name: {"values": [result["peak_mb"]]} if "peak_mb" in result else {"values": [], "error": result["error"]}
            for name, result in results.items()
        }
        made.append(row(f"peak memory, {comparison.name}", "MB", peaks, comparison.memory))
    return made


def run_contenders(contenders: Sequence[Contender], options: Options, scale: float) -> dict[str, dict[str, Any]]:
    """Returns the results of `measure` with their values times `scale`."""
    return scaled(measure(contenders, options), scale)


def scaled(results: Mapping[str, Any], scale: float) -> dict[str, dict[str, Any]]:
    """Returns results with their values times `scale`."""
    return {name: {**result, "values": [value * scale for value in result["values"]]}
            for name, result in results.items()}  # fmt: skip


def row(
    name: str, unit: str, columns: Mapping[str, Any], goals: Sequence[Goal] = (), limit: float | None = None
) -> dict[str, Any]:
    """Returns a row as JSON values, judged against its goals."""
    return {
        "name": name,
        "unit": unit,
        "columns": dict(columns),
        "limit": limit,
        "goals": [{"text": goal.text(unit), "reached": reached(goal, columns)} for goal in goals],
    }


def median(column: Mapping[str, Any] | None) -> float | None:
    """Returns the median of a column's rounds; None if it has none."""
    return statistics.median(column["values"]) if column and column["values"] else None


def spread(column: Mapping[str, Any]) -> float:
    """Returns half the range of the rounds, as a share of their median."""
    values = column["values"]
    return (max(values) - min(values)) / 2 / statistics.median(values)


def best(columns: Mapping[str, Any], names: Sequence[str] = ()) -> str | None:
    """Returns the name of the fastest column but ours, among `names` if given; None if none was measured."""
    found = {name: median(column) for name, column in columns.items() if name != OURS and (not names or name in names)}
    measured = {name: value for name, value in found.items() if value is not None}
    return min(measured, key=lambda name: measured[name]) if measured else None


def ratio(columns: Mapping[str, Any], name: str | None) -> float | None:
    """Returns how many times as fast as a column ours is; None if either was not measured."""
    ours, other = median(columns.get(OURS)), median(columns.get(name or ""))
    return other / ours if ours and other is not None else None


def reached(goal: Goal, columns: Mapping[str, Any]) -> bool | str:
    """Returns whether a goal is reached, or `NOT_MEASURED`."""
    if not goal.against:
        ours = median(columns.get(OURS))
        return NOT_MEASURED if ours is None else ours <= goal.bound
    found = ratio(columns, best(columns, goal.against))
    return NOT_MEASURED if found is None else found >= goal.bound


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
