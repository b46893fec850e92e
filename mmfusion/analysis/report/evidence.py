"""The numbers behind a report's figures: means over seeds of what cells left, turned back to the metric's own way.

Methods are rows of one order. Cells that were not examined, and undefined numbers, count for nothing.
"""

import collections
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfusion.analysis.ablate import Outcome
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Cell
from mmfusion.analysis.claims.selection import Row
from mmfusion.analysis.probing.calibration import BINS, Reliability
from mmfusion.analysis.probing.corruption import effective_robustness, relative_robustness

LATE = "late_mean"  # what effective robustness is measured from


class Span(NamedTuple):
    """The mean over seeds, with the lowest and the highest of them."""

    mean: float
    low: float
    high: float


class Curve(NamedTuple):
    """A score at each step: its mean over seeds, the lowest and the highest."""

    steps: list[int]
    spans: list[Span]


def span(values: Iterable[float | None]) -> Span:
    """Returns the mean and the ends of the values that are defined; NaN of none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return Span(statistics.fmean(known), min(known), max(known)) if known else Span(math.nan, math.nan, math.nan)


def examined(row: Row, outcome: Outcome) -> list[dict[str, Any]]:
    """Returns what was found of each of a method's seeds that was examined."""
    return [outcome.examined[name] for name in row.runs if name in outcome.examined]


def measured(outcome: Outcome) -> tuple[str, int]:
    """Returns the metric that cells were examined by, and -1 where less of it is better and it was turned."""
    one = next(iter(outcome.examined.values()))
    return one["metric"], one["sign"]


def absences(rows: Sequence[Row], outcome: Outcome, kind: str) -> dict[str, dict[str, float]]:
    """Returns by method the mean metric where modalities are missing.

    Args:
      rows: the methods.
      outcome: of the ablation.
      kind: `subsets`, by the modalities that are present, joined by `+`, or `missing`, by the rate they are lost at.
    """
    _, sign = measured(outcome)
    found = {}
    for row in rows:
        runs = [run[kind] for run in examined(row, outcome) if run.get(kind)]
        if runs:
            found[row.method] = {key: sign * span(run[key] for run in runs).mean for key in runs[0]}
    return found


def contributions(rows: Sequence[Row], outcome: Outcome, kind: str) -> dict[str, dict[str, Span]]:
    """Returns by method what each modality contributes, more is better: of kind `shapley` or `perceptual`."""
    found = {}
    for row in rows:
        runs = [run[kind] for run in examined(row, outcome) if run[kind]]
        if runs:
            found[row.method] = {m: span(run[m] for run in runs) for m in runs[0]}
    return found


def interactions(rows: Sequence[Row], outcome: Outcome) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns by modality and method the mean metric as it is, and that of the additive projection."""
    _, sign = measured(outcome)
    found: dict[str, dict[str, tuple[float, float]]] = collections.defaultdict(dict)
    for row in rows:
        runs = examined(row, outcome)
        for m in runs[0]["interaction"] if runs else ():
            found[m][row.method] = tuple(
                sign * span(x for run in runs for x in run["interaction"][m][what]).mean
                for what in ("whole", "additive")
            )
    return dict(found)


def corruptions(rows: Sequence[Row], outcome: Outcome) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Returns by (modality, corruption) and method the mean metric at each severity."""
    _, sign = measured(outcome)
    found: dict[tuple[str, str], dict[str, list[float]]] = collections.defaultdict(dict)
    for row in rows:
        runs = examined(row, outcome)
        for m, kinds in runs[0]["corruption"].items() if runs else ():
            for kind in kinds:
                at = zip(*(run["corruption"][m][kind] for run in runs), strict=True)
                found[m, kind][row.method] = [sign * span(scores).mean for scores in at]
    return dict(found)


def robustness(
    curves: Mapping[str, Sequence[float]], severities: Sequence[float], sign: int
) -> dict[str, tuple[float, float | None]]:
    """Returns by method the relative robustness and, where late fusion is among them, the effective one.

    Args:
      curves: method -> the metric at each severity.
      severities: from 0 to 1.
      sign: -1 where less of the metric is better; more of effective robustness always is.
    """
    late = curves.get(LATE)
    return {
        method: (
            relative_robustness(severities, scores),
            sign * effective_robustness(severities, scores, late) if late else None,
        )
        for method, scores in curves.items()
    }


def calibrations(row: Row, outcome: Outcome, task: str) -> list[dict[str, Any]]:
    """Returns the calibration on one task of each of a method's examined seeds."""
    return [run["calibration"][task] for run in examined(row, outcome) if task in run["calibration"]]


def pooled(runs: Sequence[Mapping[str, Any]], when: str) -> Reliability:
    """Returns the bins of all seeds taken together, `before` or `after` the temperature."""
    names = ("count", "confidence", "accuracy")
    count, confidence, accuracy = (
        np.concatenate([np.asarray(run[when]["bins"][name], np.float64) for run in runs]) for name in names
    )
    which = bin_of(confidence)
    total = np.bincount(which, count, BINS)
    full = total > 0
    means = [np.bincount(which, count * values, BINS)[full] / total[full] for values in (confidence, accuracy)]
    return Reliability(total[full], *means)


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Returns the number of the bin that a mean confidence is of; rounding puts none beyond its bin's upper end."""
    return np.clip(np.ceil(confidence * BINS - 1e-9).astype(int) - 1, 0, BINS - 1)


def training(row: Row, cells: Mapping[str, Cell], directory: Path, metric: str) -> Curve:
    """Returns the validation metric of a method's seeds at each step that was validated."""
    by_step: dict[int, list[float]] = collections.defaultdict(list)
    for name in row.runs:
        for step, value in _validations(runner.cell_directory(directory, cells[name]) / "metrics.jsonl", metric):
            by_step[step].append(value)
    steps = sorted(by_step)
    return Curve(steps, [span(by_step[step]) for step in steps])


def _validations(path: Path, metric: str) -> list[tuple[int, float]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:  # a torn line
            continue
        if values.get("split") == "valid" and values.get(metric) is not None:
            found.append((values["step"], values[metric]))
    return found


def speed(row: Row, outcome: Outcome) -> float:
    """Returns the mean training examples per second of a method's runs; NaN where it is not known."""
    return span(outcome.results[name].get("examples_per_second") for name in row.runs if name in outcome.results).mean


def step_cost(row: Row, outcome: Outcome, what: str) -> float:
    """Returns the mean `flops` an example, or bytes of `memory`, of a method's train step; NaN where not known."""
    return span(run.get("cost", {}).get(what) for run in examined(row, outcome)).mean


def provenance(outcome: Outcome) -> dict[str, list[str]]:
    """Returns what results were made with: each different value once, with its number of cells if there are several."""
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for result in outcome.results.values():
        data, versions = result.get("data", {}), result.get("versions", {})
        if data:
            found["Data"][f"{data['name']}, fingerprint {data['fingerprint']}"] += 1
        if versions:
            found["Versions"][", ".join(f"{name} {version}" for name, version in versions.items())] += 1
        if "device" in result:
            found["Device"][result["device"]] += 1
    return {
        what: [f"{value} ({n} cells)" if len(counts) > 1 else value for value, n in counts.most_common()]
        for what, counts in found.items()
    }
