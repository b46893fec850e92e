"""The numbers behind a report's figures: means over seeds of results and probes, in the metric's own direction.

Trials that were not probed and undefined numbers are left out of the means.
"""

import collections
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Trial
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.probing.calibration import BINS, Reliability
from mmfusion.analysis.probing.corruption import effective_robustness, relative_robustness

LATE_FUSION = "late_mean"  # the reference of effective robustness


class Span(NamedTuple):
    """The mean over seeds, and the lowest and highest of them."""

    mean: float
    low: float
    high: float


class Curve(NamedTuple):
    """A score at each step, as the mean over seeds with the lowest and highest."""

    steps: list[int]
    spans: list[Span]


def span(values: Iterable[float | None]) -> Span:
    """Returns the mean, minimum and maximum of the defined values; NaN without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return Span(statistics.fmean(known), min(known), max(known)) if known else Span(math.nan, math.nan, math.nan)


def probes_of(result: MethodResult, outcome: Outcome) -> list[dict[str, Any]]:
    """Returns the probes of a method's trials."""
    return [outcome.probes[name] for name in result.trials if name in outcome.probes]


def probe_metric(outcome: Outcome) -> tuple[str, int]:
    """Returns the metric of the probes, and -1 where lower is better and the probes hold its negative, else 1."""
    probe = next(iter(outcome.probes.values()))
    return probe["metric"], probe["sign"]


def absences(methods: Sequence[MethodResult], outcome: Outcome, kind: str) -> dict[str, dict[str, float]]:
    """Returns by method the mean metric with modalities missing.

    Args:
      methods: their results.
      outcome: of the ablation.
      kind: `subsets`, by the modalities present, joined by `+`, or `missing`, by the rate at which they are missing.
    """
    _, sign = probe_metric(outcome)
    found = {}
    for result in methods:
        runs = [run[kind] for run in probes_of(result, outcome) if run.get(kind)]
        if runs:
            found[result.method] = {key: sign * span(run[key] for run in runs).mean for key in runs[0]}
    return found


def contributions(methods: Sequence[MethodResult], outcome: Outcome, kind: str) -> dict[str, dict[str, Span]]:
    """Returns by method the contribution of each modality, of kind `shapley` or `perceptual`; higher is better."""
    found = {}
    for result in methods:
        runs = [run[kind] for run in probes_of(result, outcome) if run[kind]]
        if runs:
            found[result.method] = {m: span(run[m] for run in runs) for m in runs[0]}
    return found


def interactions(methods: Sequence[MethodResult], outcome: Outcome) -> dict[str, dict[str, tuple[float, float]]]:
    """Returns by modality and method the mean metric of the model, and of its additive projection."""
    _, sign = probe_metric(outcome)
    found: dict[str, dict[str, tuple[float, float]]] = collections.defaultdict(dict)
    for result in methods:
        runs = probes_of(result, outcome)
        for m in runs[0]["interaction"] if runs else ():
            whole, additive = (
                sign * span(x for run in runs for x in run["interaction"][m][what]).mean
                for what in ("whole", "additive")
            )
            found[m][result.method] = whole, additive
    return dict(found)


def corruptions(methods: Sequence[MethodResult], outcome: Outcome) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Returns by (modality, corruption) and method the mean metric at each severity."""
    _, sign = probe_metric(outcome)
    found: dict[tuple[str, str], dict[str, list[float]]] = collections.defaultdict(dict)
    for result in methods:
        runs = probes_of(result, outcome)
        for m, kinds in runs[0]["corruption"].items() if runs else ():
            for kind in kinds:
                at = zip(*(run["corruption"][m][kind] for run in runs), strict=True)
                found[m, kind][result.method] = [sign * span(scores).mean for scores in at]
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
    late = curves.get(LATE_FUSION)
    return {
        method: (
            relative_robustness(severities, scores),
            sign * effective_robustness(severities, scores, late) if late else None,
        )
        for method, scores in curves.items()
    }


def calibrations(result: MethodResult, outcome: Outcome, task: str) -> list[dict[str, Any]]:
    """Returns the calibration on one task of each of a method's examined seeds."""
    return [run["calibration"][task] for run in probes_of(result, outcome) if task in run["calibration"]]


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


def training(result: MethodResult, trials: Mapping[str, Trial], directory: Path, metric: str) -> Curve:
    """Returns the validation metric of a method's seeds at each step that was validated."""
    by_step: dict[int, list[float]] = collections.defaultdict(list)
    for name in result.trials:
        for step, value in _validations(runner.trial_directory(directory, trials[name]) / "metrics.jsonl", metric):
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


def speed(result: MethodResult, outcome: Outcome) -> float:
    """Returns the mean training examples per second of a method's runs; NaN where it is not known."""
    return span(
        outcome.results[name].get("examples_per_second") for name in result.trials if name in outcome.results
    ).mean


def step_cost(result: MethodResult, outcome: Outcome, what: str) -> float:
    """Returns the mean `flops` an example, or bytes of `memory`, of a method's train step; NaN where not known."""
    return span(run.get("cost", {}).get(what) for run in probes_of(result, outcome)).mean


def provenance(outcome: Outcome) -> dict[str, list[str]]:
    """Returns the data, versions and devices of the results, with the number of trials where they differ."""
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
        what: [f"{value} ({n} trials)" if len(counts) > 1 else value for value, n in counts.most_common()]
        for what, counts in found.items()
    }
