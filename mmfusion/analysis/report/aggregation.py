"""Aggregates results and probes over seeds for the figures of a report, in the metric's own direction.

Trials that were not probed and undefined values are left out of the means.
"""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.history import validations
from mmfusion.analysis.ablation.plan import Trial
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.probing.calibration import BINS, Reliability
from mmfusion.analysis.probing.corruption import effective_robustness, relative_robustness

LATE_FUSION = "late_mean"  # the reference of effective robustness


class Span(NamedTuple):
    """The mean, minimum and maximum over seeds."""

    mean: float
    low: float
    high: float


class Curve(NamedTuple):
    """The mean, minimum and maximum over seeds of a score at each step."""

    steps: list[int]
    spans: list[Span]


def span(values: Iterable[float | None]) -> Span:
    """Returns the mean, minimum and maximum of the defined values; NaN if there are none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return Span(statistics.fmean(known), min(known), max(known)) if known else Span(math.nan, math.nan, math.nan)


def probes_of(result: MethodResult, outcome: Outcome) -> list[dict[str, Any]]:
    """Returns the probes of a method's trials."""
    return [outcome.probes[name] for name in result.trials if name in outcome.probes]


def probe_metric(outcome: Outcome) -> tuple[str, int]:
    """Returns the metric of the probes, and their sign: -1 if lower is better and they are negated, otherwise 1."""
    probe = next(iter(outcome.probes.values()))
    return probe["metric"], probe["sign"]


def absences(methods: Sequence[MethodResult], outcome: Outcome, kind: str) -> dict[str, dict[str, float]]:
    """Returns the mean metric with missing modalities, by method.

    Args:
      methods: the methods' results.
      outcome: the ablation's outcome.
      kind: `subsets`, keyed by the present modalities joined by `+`, or `missing`, keyed by the rate of absence.
    """
    _, sign = probe_metric(outcome)
    found = {}
    for result in methods:
        runs = [run[kind] for run in probes_of(result, outcome) if run.get(kind)]
        if runs:
            found[result.method] = {key: sign * span(run[key] for run in runs).mean for key in runs[0]}
    return found


def contributions(methods: Sequence[MethodResult], outcome: Outcome, kind: str) -> dict[str, dict[str, Span]]:
    """Returns the contribution of each modality by method; kind is `shapley` or `perceptual`, higher is better."""
    found = {}
    for result in methods:
        runs = [run[kind] for run in probes_of(result, outcome) if run[kind]]
        if runs:
            found[result.method] = {m: span(run[m] for run in runs) for m in runs[0]}
    return found


def interactions(methods: Sequence[MethodResult], outcome: Outcome) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns the mean metric of the model and of its additive projection, by modality and method."""
    _, sign = probe_metric(outcome)
    found: dict[str, dict[str, tuple[float, float]]] = collections.defaultdict(dict)
    for result in methods:
        runs = probes_of(result, outcome)
        for m in runs[0]["interaction"] if runs else ():
            whole, additive = (
                sign * span(x for run in runs for x in run["interaction"][m][key]).mean for key in ("whole", "additive")
            )
            found[m][result.method] = whole, additive
    return dict(found)


def corruptions(methods: Sequence[MethodResult], outcome: Outcome) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Returns the mean metric at each severity, by (modality, corruption) and method."""
    _, sign = probe_metric(outcome)
    found: dict[tuple[str, str], dict[str, list[float]]] = collections.defaultdict(dict)
    for result in methods:
        runs = probes_of(result, outcome)
        for m, kinds in runs[0]["corruption"].items() if runs else ():
            for kind in kinds:
                by_severity = zip(*(run["corruption"][m][kind] for run in runs), strict=True)
                found[m, kind][result.method] = [sign * span(scores).mean for scores in by_severity]
    return dict(found)


def robustness(
    curves: Mapping[str, Sequence[float]], severities: Sequence[float], sign: int
) -> dict[str, tuple[float, float | None]]:
    """Returns the relative and, if late fusion is among the methods, the effective robustness, by method.

    Args:
      curves: method -> the metric at each severity.
      severities: from 0 to 1.
      sign: -1 if a lower metric is better; effective robustness is signed so that higher is better.
    """
    late = curves.get(LATE_FUSION)
    return {
        method: (
            relative_robustness(severities, scores),
            sign * effective_robustness(severities, scores, late) if late else None,
        )
        for method, scores in curves.items()
    }


def calibrations(result: MethodResult, outcome: Outcome, task: str) -> list[dict[str, Any]]:
    """Returns the calibration of each probed seed of a method on one task."""
    return [run["calibration"][task] for run in probes_of(result, outcome) if task in run["calibration"]]


def pooled(runs: Sequence[Mapping[str, Any]], when: str) -> Reliability:
    """Returns the bins pooled over seeds, `before` or `after` temperature scaling."""
    names = ("count", "confidence", "accuracy")
    count, confidence, accuracy = (
        np.concatenate([np.asarray(run[when]["bins"][name], np.float64) for run in runs]) for name in names
    )
    bins = bin_of(confidence)
    total = np.bincount(bins, count, BINS)
    filled = total > 0
    means = [np.bincount(bins, count * values, BINS)[filled] / total[filled] for values in (confidence, accuracy)]
    return Reliability(total[filled], *means)


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Returns the bin index of a bin's mean confidence, robust to rounding at the bin's upper end."""
    return np.clip(np.ceil(confidence * BINS - 1e-9).astype(int) - 1, 0, BINS - 1)


def training(result: MethodResult, trials: Mapping[str, Trial], directory: Path, metric: str) -> Curve:
    """Returns the validation metric over a method's seeds at each validation step."""
    by_step: dict[int, list[float]] = collections.defaultdict(list)
    for name in result.trials:
        for step, value in validations(runner.trial_directory(directory, trials[name]), metric):
            by_step[step].append(value)
    steps = sorted(by_step)
    return Curve(steps, [span(by_step[step]) for step in steps])


def speed(result: MethodResult, outcome: Outcome) -> float:
    """Returns the mean training examples per second of a method's runs; NaN if unknown."""
    return span(
        outcome.results[name].get("examples_per_second") for name in result.trials if name in outcome.results
    ).mean


def step_cost(result: MethodResult, outcome: Outcome, kind: str) -> float:
    """Returns the mean `flops` per example, or bytes of `memory`, of a method's train step; NaN if unknown."""
    return span(run.get("cost", {}).get(kind) for run in probes_of(result, outcome)).mean


def provenance(outcome: Outcome) -> dict[str, list[str]]:
    """Returns the data, versions and devices of the results, with the number of trials if they differ."""
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
        label: [f"{value} ({n} trials)" if len(counts) > 1 else value for value, n in counts.most_common()]
        for label, counts in found.items()
    }
