"""What the confidence of each method is worth: the error rate by coverage, and the detection of corrupted inputs."""

import statistics
from collections.abc import Mapping, Sequence

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.probing.confidence import COVERAGES
from mmfusion.analysis.report import aggregation
from mmfusion.analysis.report.context import ReportContext
from mmfusion.analysis.report.tables import FUSED, Table, Text, number
from mmfusion.analysis.report.theme import RC_PARAMS, WIDE, Style, legend, svg


def risks(methods: Sequence[MethodResult], outcome: Outcome, task: str) -> dict[str, list[float]]:
    """Returns the mean error rate at each coverage, by method."""
    found = {}
    for result in methods:
        runs = [run["selective"]["risks"] for run in aggregation.calibrations(result, outcome, task)]
        if runs:
            found[result.method] = [statistics.fmean(values) for values in zip(*runs, strict=True)]
    return found


@matplotlib.rc_context(RC_PARAMS)
def curves(found: Mapping[str, Sequence[float]], styles: Mapping[str, Style]) -> Markup:
    """Plots the error rate against the share of examples that are predicted, the most confident first."""
    figure = Figure(figsize=(WIDE, 3.4))
    ax = figure.subplots()
    for method, values in reversed(list(found.items())):
        colour, mark = styles[method]
        ax.plot(COVERAGES, values, color=colour, marker=mark, markersize=3.6, markevery=2)
    ax.set_xlabel("share of the test examples that is predicted")
    ax.set_ylabel("error rate")
    ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    ax.set_xlim(0, 1.02)
    ax.set_ylim(bottom=0)
    legend(figure, list(found), styles)
    return svg(figure, "Error rate by coverage")


def table(context: ReportContext, task: str) -> Table:
    """Returns per method the area under its curve, the error rates at three coverages, and the AUROCs of detection."""
    coverages = (0.5, 0.8, 1.0)
    kinds = list(dict.fromkeys((m, name) for result in context.fused for m, name in _detections(result, context)))
    heads = [Text("Method"), Text("AURC"), *(Text("Error rate", f"at {100 * share:.0f} %") for share in coverages)]
    heads += [Text("AUROC", f"{m}: {name}".replace("_", " ")) for m, name in kinds]
    rows = []
    for result in context.fused:
        runs = [run["selective"] for run in aggregation.calibrations(result, context.outcome, task)]
        cells = [aggregation.span(run["area"] for run in runs).mean]
        cells += [aggregation.span(run["risks"][COVERAGES.index(share)] for run in runs).mean for share in coverages]
        detected = _detections(result, context)
        cells += [detected.get(kind) for kind in kinds]
        rows.append((Text(result.method), *(Text(number(value)) for value in cells)))
    return Table(tuple(heads), {FUSED: rows})


def _detections(result: MethodResult, context: ReportContext) -> dict[tuple[str, str], float]:
    """Returns the mean AUROC of detecting each corruption, by (modality, corruption)."""
    runs = [run["detection"] for run in aggregation.probes_of(result, context.outcome)]
    return {
        (m, name): aggregation.span(run[m][name] for run in runs).mean
        for m, kinds in (runs[0] if runs else {}).items()
        for name in kinds
    }
