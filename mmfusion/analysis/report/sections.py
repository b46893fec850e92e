"""The sections of a report: figures, tables and examples, or the reason why a section is unavailable."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import REFERENCE
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.probing import attention
from mmfusion.analysis.probing.attention import ExampleView
from mmfusion.analysis.report import aggregation, confidence, curves, missing_table, plots
from mmfusion.analysis.report.context import MAX_PLOTTED, ReportContext
from mmfusion.analysis.report.example_views import ExampleCard, example_card
from mmfusion.analysis.report.tables import FUSED, Table, Text, comparisons, differences, large, number
from mmfusion.errors import UserError
from mmfusion.models.fusion import FUSIONS
from mmfusion.registry import lookup

MAX_OPEN_ROWS = 16  # longer tables are collapsed
RUNS = "lines span the lowest to the highest run"


class SectionUnavailable(Exception):
    """Raised if a section has no content, with the reason in one line."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the report.

    Attributes:
      figure: the figure as SVG.
      caption: the caption of the figure or the examples.
      table: the table below the figure.
      table_title: the title of the table.
      expanded: whether the table is initially expanded.
      examples: test examples.
      unavailable: the reason for having no content, or "".
    """

    figure: str = ""
    caption: str = ""
    table: Table | None = None
    table_title: str = ""
    expanded: bool = True
    examples: tuple[ExampleCard, ...] = ()
    unavailable: str = ""


def sections(context: ReportContext) -> dict[str, Section]:
    """Returns the sections by title, in report order."""
    found = {}
    for title, make in SECTIONS.items():
        try:
            found[title] = make(context)
        except SectionUnavailable as reason:
            found[title] = Section(unavailable=f"Not available: {reason}.")
    return found


def _differences(context: ReportContext) -> Section:
    sign = "" if context.outcome.higher else ", signed so that positive is better"
    panels = {other: {d.method: d for d in found} for other, found in comparisons(context.outcome).items()}
    if not panels:
        raise SectionUnavailable(f"no two methods can be compared over {context.over}")
    metric = context.outcome.metric
    figure = plots.forest([result.method for result in context.fused], panels, f"difference in test {metric}")
    caption = (
        f"Differences in test {metric}{sign}, from {' and from '.join(panels)}, paired by {context.over[:-1]}: mean "
        f"and {context.interval}. Right of 0 the strategy is better. A verdict requires more than the interval (see "
        "How methods are selected and compared). An arrow with a number lies beyond the axis."
    )
    return Section(figure, caption, differences(context.outcome), "All differences with their tests", expanded=False)


def _cost(context: ReportContext) -> Section:
    outcome = context.outcome
    intervals = {line.result.method: line.interval for line in context.groups.get(FUSED, ())}
    found = {
        result.method: curves.CostPoint(
            result.mean, intervals[result.method], result.parameters, aggregation.speed(result, outcome)
        )
        for result in context.fused
        if result.parameters
    }
    if not found:
        raise SectionUnavailable("no fusion strategy has a score")
    devices = "; ".join(aggregation.provenance(outcome).get("Device", []))
    caption = (
        f"Test {outcome.metric} (mean and {context.interval} over {context.over}) against the number of parameters, "
        f"and against training speed{f' on {devices}' if devices else ''}. An open triangle lies beyond the axis."
    )
    if any(method not in context.styles for method in found):
        caption += f" Coloured: the {MAX_PLOTTED} best on validation, and {REFERENCE}."
    heads = (
        Text("Method"),
        Text("Parameters"),
        Text("Speed", "training examples/s"),
        Text("FLOPs", "of a train step, per example"),
        Text("Memory", "of a train step"),
    )
    rows = [
        (
            Text(result.method),
            Text(f"{result.parameters:,}"),
            Text(large(aggregation.speed(result, outcome))),
            Text(large(aggregation.step_cost(result, outcome, "flops"))),
            Text(large(aggregation.step_cost(result, outcome, "memory"), "B")),
        )
        for result in context.fused
        if result.method in found
    ]
    figure = curves.cost(found, context.styles, outcome.metric)
    return Section(figure, caption, Table(heads, {FUSED: rows}), "Cost, mean over runs", len(rows) <= MAX_OPEN_ROWS)


def _missing(context: ReportContext) -> Section:
    probe = _require_probes(context, modalities=2)
    metric, sign = aggregation.probe_metric(context.outcome)
    present = {
        method: {kept.replace("+", " + ") or "none": value for kept, value in found.items()}
        for method, found in aggregation.absences(context.fused, context.outcome, "subsets").items()
    }
    missing = {
        method: {f"{100 * float(rate):.0f} %": value for rate, value in found.items()}
        for method, found in aggregation.absences(context.fused, context.outcome, "missing").items()
    }
    alone = aggregation.absences(context.fused, context.outcome, "imbalanced")
    panels = {"only these present": present}
    caption = (
        f"Test {metric} with modalities missing, mean over runs: with only the modalities of a column present in all "
        "test examples"
    )
    if missing:
        panels["each missing at this rate"] = missing
        caption += f"; and with each modality missing at random at the given rate, on {probe['rows']:,} of them"
    if alone:
        panels["only this missing, at 75 %"] = alone
        caption += "; and with one modality missing in 75 % of these, and the others never"
    caption += ". Darker is better; the shades run from the worst to the best."
    figure, expanded = plots.heat_maps(panels, metric, sign > 0), len(context.fused) <= MAX_OPEN_ROWS
    return Section(figure, caption, missing_table.table(context), missing_table.title(context), expanded)


def _contribution(context: ReportContext) -> Section:
    _require_probes(context, modalities=2)
    metric, sign = aggregation.probe_metric(context.outcome)
    titles = {
        "shapley": f"Shapley value ({'gain' if sign > 0 else 'fall'} in {metric})",
        "perceptual": "perceptual score (share of the score)",
    }
    panels = {
        title: found
        for kind, title in titles.items()
        if (found := aggregation.contributions(context.fused, context.outcome, kind))
    }
    caption = (
        "Contribution of each modality. Shapley value: its mean gain over the orders in which modalities are added; "
        "the values of a method sum to the gain of all modalities over none."
    )
    if len(panels) > 1:
        caption += " Perceptual score: the share of the score that is lost when the modality is permuted over examples."
    return Section(plots.bars(panels), f"{caption} Bars are means over runs; {RUNS}.")


def _interaction(context: ReportContext) -> Section:
    _require_probes(context, modalities=2)
    metric, _ = aggregation.probe_metric(context.outcome)
    names = list(context.modalities)
    parts = f"{names[0]} and of {names[1]}" if len(names) == 2 else "one modality and of the rest"
    caption = (
        f"Test {metric} of the model, and of its empirical additive projection (EMAP), the least-squares fit by a sum "
        f"of functions of {parts}; mean over runs and samples of test examples. The gap is due to cross-modal "
        "interaction."
    )
    return Section(plots.interaction(aggregation.interactions(context.fused, context.outcome), metric), caption)


def _corruption(context: ReportContext) -> Section:
    probe = _require_probes(context)
    metric, sign = aggregation.probe_metric(context.outcome)
    severities = probe["severities"]
    caption = (
        f"Test {metric} with one modality corrupted, mean over runs, on {probe['corrupted']:,} test examples that are "
        f"the same for all methods.{context.plotted_note}"
    )
    areas = {
        corruption: aggregation.robustness(found, severities, sign)
        for corruption, found in aggregation.corruptions(context.fused, context.outcome).items()
    }
    heads = [Text("Method"), *(Text(f"{m}: {kind}".replace("_", " ")) for m, kind in areas)]
    rows = [
        (Text(result.method), *(_area(found.get(result.method)) for found in areas.values()))
        for result in context.fused
    ]
    title = f"Relative robustness: the area under a curve{'' if sign > 0 else ' (lower is better)'}"
    if any(result.method == aggregation.LATE_FUSION for result in context.fused):
        title += (
            f"; below it, effective robustness: the area above the curve of {aggregation.LATE_FUSION}, both shifted to "
            "start at the same score"
        )
    drawn = aggregation.corruptions(context.plotted, context.outcome)
    figure = curves.corruption(drawn, severities, context.styles, metric)
    return Section(figure, caption, Table(tuple(heads), {FUSED: rows}), title, len(rows) <= MAX_OPEN_ROWS)


def _area(found: tuple[float, float | None] | None) -> Text:
    relative, effective = found or (None, None)
    return Text(number(relative), number(effective, "+") if effective is not None else "")


def _calibration(context: ReportContext) -> Section:
    tasks = list(_require_probes(context)["calibration"])
    calibrated = [r for r in context.ranked if any(aggregation.calibrations(r, context.outcome, t) for t in tasks)]
    if not calibrated:
        raise SectionUnavailable("no target is a single label")
    best, panels, groups, count = calibrated[0], {}, {}, 0
    for task in tasks:
        prefix = f"{task}, " if len(tasks) > 1 else ""
        runs = aggregation.calibrations(best, context.outcome, task)
        count = len(runs)
        for when in ("before", "after"):
            error = number(aggregation.span(run[when]["ece"] for run in runs).mean)
            panels[f"{prefix}{when} scaling: ECE {error}"] = aggregation.pooled(runs, when)
        groups[task] = [
            _calibration_cells(result, aggregation.calibrations(result, context.outcome, task))
            for result in context.fused
        ]
    heads = [Text("Method"), Text("Temperature")]
    heads += [Text(name, when) for name in ("ECE", "ECE, equal mass", "NLL") for when in ("before", "after")]
    caption = (
        f"Reliability of {best.method}, the best on validation, before and after its logits are divided by the "
        f"temperature fitted on validation: accuracy in 15 bins of confidence, over all {count} runs together, and "
        "below it the share of examples. On the dashed line, confidence equals accuracy."
    )
    title = "Temperature, and calibration before and after scaling; mean over runs"
    table, expanded = Table(tuple(heads), groups), len(context.fused) <= MAX_OPEN_ROWS
    return Section(curves.reliability(panels), caption, table, title, expanded)


def _calibration_cells(result: MethodResult, runs: Sequence[Mapping[str, Any]]) -> tuple[Text, ...]:
    names = ("ece", "ece_equal_mass", "nll")
    values = [[run["temperature"] for run in runs]]
    values += [[run[when][name] for run in runs] for name in names for when in ("before", "after")]
    return Text(result.method), *(Text(number(aggregation.span(value).mean)) for value in values)


def _confidence(context: ReportContext) -> Section:
    tasks = list(_require_probes(context)["calibration"])
    if not tasks:
        raise SectionUnavailable("no target is a single label")
    task = tasks[0] if len(tasks) == 1 else context.outcome.metric.rpartition("/")[0]
    if task not in tasks:
        raise SectionUnavailable(f"the target of {context.outcome.metric} is no single label")
    caption = (
        "Selective prediction: the error rate on test if only this share of the examples is predicted, those with the "
        f"greatest probability of a class; mean over runs. A lower curve is better.{context.plotted_note}"
    )
    title = (
        "AURC, the mean error rate over all shares (lower is better), and the AUROC of telling test examples that are "
        "corrupted at severity 1 from the others by their confidence (0.5 is chance); mean over runs"
    )
    figure = confidence.curves(confidence.risks(context.plotted, context.outcome, task), context.styles)
    expanded = len(context.fused) <= MAX_OPEN_ROWS
    return Section(figure, caption, confidence.table(context, task), title, expanded)


def _examples(context: ReportContext) -> Section:
    if not context.ranked:
        raise SectionUnavailable("no fusion strategy has a score")
    targets = context.plan.trials[0].config["data"]["targets"]
    if len(targets) > 1:
        raise SectionUnavailable(f"examples are shown for one target, and there are {len(targets)}")
    try:
        result, views = _example_views(context)
    except (UserError, OSError) as error:
        raise SectionUnavailable(f"no run could be opened ({error})") from error
    (target,) = targets.values()
    cards = tuple(example_card(view, context.modalities, target["kind"] == "classification") for view in views)
    role = "the best" if result is context.ranked[0] else "the best with attention"
    fold = f", fold {result.folds[0]}" if result.folds else ""
    model = f"{result.method} ({role} on validation, seed {result.seeds[0]}{fold})"
    if any(view.attention for view in views):
        caption = (
            f"Attention of {model} on {len(cards)} test examples drawn at random: the weight that each token receives, "
            "averaged over heads and queries, relative to the largest in its modality."
        )
    else:
        caption = f"Predictions of {model} on test examples drawn at random. No strategy here has attention to show."
    return Section(caption=caption, examples=cards)


def _example_views(context: ReportContext) -> tuple[MethodResult, list[ExampleView]]:
    """Returns examples of the best method with attention, or of the best method if none has attention."""
    best, *others = context.ranked
    views = _open(context, best)
    if any(view.attention for view in views):
        return best, views
    for result in others:
        if _fusion_class(context, result).declares.family == "attention":
            attending = _open(context, result)
            return (result, attending) if any(view.attention for view in attending) else (best, views)
    return best, views


def _fusion_class(context: ReportContext, result: MethodResult) -> Any:
    name = context.trials[result.trials[0]].config["model"]["fusion"]["name"]
    return lookup(FUSIONS, name, "config.model.fusion.name")


def _open(context: ReportContext, result: MethodResult) -> list[ExampleView]:
    return attention.examples(runner.trial_directory(context.directory, context.trials[result.trials[0]]))


def _training(context: ReportContext) -> Section:
    metric = context.outcome.metric
    found = {}
    for result in context.plotted:
        curve = aggregation.training(result, context.trials, context.directory, metric)
        if curve.steps:
            found[result.method] = curve
    if not found:
        raise SectionUnavailable("no run has validations in its metrics.jsonl")
    caption = f"Validation {metric} during training: mean over runs; bands span the lowest to the highest run."
    return Section(curves.training(found, context.styles, metric), caption + context.plotted_note)


def _require_probes(context: ReportContext, modalities: int = 1) -> Mapping[str, Any]:
    """Returns a probe; raises SectionUnavailable without probes or with fewer modalities."""
    if len(context.modalities) < modalities:
        raise SectionUnavailable("there is one modality")
    for result in context.fused:
        if probes := aggregation.probes_of(result, context.outcome):
            return probes[0]
    raise SectionUnavailable("no run was probed")


SECTIONS = {
    "Differences": _differences,
    "Cost": _cost,
    "Missing modalities": _missing,
    "Contribution": _contribution,
    "Interaction": _interaction,
    "Corruption": _corruption,
    "Calibration": _calibration,
    "Confidence": _confidence,
    "Examples": _examples,
    "Training": _training,
}
