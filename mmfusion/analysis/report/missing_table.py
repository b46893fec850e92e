"""The table of missing modalities: what they add to each other, and what training without some protects from."""

import math
import re
import statistics
from collections.abc import Mapping

from mmfusion.analysis import incomplete
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.incomplete import Protection
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.report import aggregation
from mmfusion.analysis.report.context import ReportContext
from mmfusion.analysis.report.tables import FUSED, NONE, Table, Text, number

TRAINED = re.compile(r" ?\bdata\.missing=(\S+)")  # in the name of a method
TITLE = "Whether adding a modality ever lowers the score, and how evenly modalities contribute (1: all the same)"
PROTECTION = "; what training with missing modalities gains over training without"


def table(context: ReportContext) -> Table:
    """Returns a row per method; it has columns of gains if methods differ in `data.missing`, 0 among them."""
    heads = [
        Text("Method"),
        Text("Additions that lower the score", "of all additions, over runs"),
        Text("Largest fall", "mean over runs"),
        Text("Evenness", "of the Shapley values"),
    ]
    gains = _protections(context)
    if gains:
        heads += [Text("Gain", "at test rates up to the trained one"), Text("Gain beyond", "at higher test rates")]
    rows = []
    for result in context.fused:
        runs = [run for run in aggregation.probes_of(result, context.outcome) if None not in run["subsets"].values()]
        cells = [Text(result.method), *_addition_cells([incomplete.additions(run["subsets"]) for run in runs])]
        cells.append(Text(number(aggregation.span(incomplete.evenness(run["shapley"]) for run in runs).mean)))
        if gains:
            cells += [Text(number(gain, "+")) for gain in gains.get(result.method, (None, None))]
        rows.append(tuple(cells))
    return Table(tuple(heads), {FUSED: rows})


def title(context: ReportContext) -> str:
    """Returns the table's title."""
    return TITLE + (PROTECTION if _protections(context) else "")


def _addition_cells(runs: list[dict[tuple[str, str], float]]) -> tuple[Text, Text]:
    if not runs:
        return Text(NONE), Text(NONE)
    falls, count = sum(gain < 0 for run in runs for gain in run.values()), sum(map(len, runs))
    least = min(statistics.fmean(run[case] for run in runs) for case in runs[0])
    return Text(f"{falls} of {count}"), Text(number(max(0.0, -least)))


def _protections(context: ReportContext) -> Mapping[str, Protection]:
    """Returns what training with missing modalities gains over training without, by method."""
    grids: dict[str, dict[float, tuple[str, dict[float, float]]]] = {}
    for result in context.fused:
        rate, scores = TRAINED.search(result.method), _by_rate(result, context.outcome)
        if rate and scores:
            grids.setdefault(TRAINED.sub("", result.method), {})[float(rate[1])] = result.method, scores
    return {
        grid[rate][0]: gains
        for grid in grids.values()
        if 0.0 in grid
        for rate, gains in incomplete.protection({rate: scores for rate, (_, scores) in grid.items()}).items()
    }


def _by_rate(result: MethodResult, outcome: Outcome) -> dict[float, float]:
    """Returns the mean score by the rate at which modalities are missing in test, higher is better."""
    runs = [run["missing"] for run in aggregation.probes_of(result, outcome) if run.get("missing")]
    means = {float(rate): aggregation.span(run[rate] for run in runs).mean for rate in runs[0]} if runs else {}
    return {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
