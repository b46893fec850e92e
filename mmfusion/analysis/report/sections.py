"""The sections of a report: for each a figure, a table or examples, or a line that says why it is left out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import REFERENCE
from mmfusion.analysis.claims.selection import Row
from mmfusion.analysis.probing import attention
from mmfusion.analysis.probing.attention import Shown
from mmfusion.analysis.report import curves, evidence, plots
from mmfusion.analysis.report.cards import Card, card
from mmfusion.analysis.report.study import MOST, Study
from mmfusion.analysis.report.tables import FUSED, Table, Text, comparisons, differences, large, number
from mmfusion.errors import UserError
from mmfusion.models.fusion import FUSIONS
from mmfusion.registry import lookup

SHORT = 16  # rows of a table that is in sight at once
SEEDS = "lines span the seeds, from the lowest to the highest"


class Missing(Exception):
    """What a section would show is not there; says why in one line."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the evidence.

    Attributes:
      figure, caption: drawn, and in words.
      table, about: below the figure, and what it shows.
      opened: whether the table is in sight.
      cards: test examples.
      left_out: why there is none of these, or "".
    """

    figure: str = ""
    caption: str = ""
    table: Table | None = None
    about: str = ""
    opened: bool = True
    cards: tuple[Card, ...] = ()
    left_out: str = ""


def sections(study: Study) -> dict[str, Section]:
    """Returns the sections by title, in the order of the report."""
    found = {}
    for title, make in MAKERS.items():
        try:
            found[title] = make(study)
        except Missing as why:
            found[title] = Section(left_out=f"Left out: {why}.")
    return found


def _differences(study: Study) -> Section:
    turned = "" if study.outcome.higher else ", turned so that more is better"
    panels = {other: {one.method: one for one in found} for other, found in comparisons(study.outcome).items()}
    if not panels:
        raise Missing("there is nothing that the strategies could be compared with over seeds")
    figure = plots.forest([row.method for row in study.fused], panels, f"difference in test {study.outcome.metric}")
    caption = (
        f"Differences in test {study.outcome.metric}{turned}, from {' and from '.join(panels)}, paired by seed: mean "
        "and 95 % BCa interval. Right of 0 the strategy is better. A verdict asks for more than the interval (see How "
        "methods are chosen); an arrow with a number is beyond the axis."
    )
    return Section(figure, caption, differences(study.outcome), "All differences with their tests", opened=False)


def _cost(study: Study) -> Section:
    intervals = {line.row.method: line.interval for line in study.groups.get(FUSED, ())}
    found = {
        row.method: curves.Priced(row.mean, intervals[row.method], row.parameters, evidence.speed(row, study.outcome))
        for row in study.fused
        if row.parameters
    }
    if not found:
        raise Missing("no fusion strategy ended in a number")
    devices = "; ".join(evidence.provenance(study.outcome).get("Device", []))
    caption = (
        f"Test {study.outcome.metric} (mean and 95 % BCa interval over seeds) against the model's parameters, and "
        f"against its training speed{f' on {devices}' * bool(devices)}. An open triangle is beyond the axis."
    )
    if len(found) > len([method for method in found if method in study.look]):
        caption += f" Coloured: the {MOST} best on validation and {REFERENCE}."
    heads = [
        Text("Method"),
        Text("Parameters"),
        Text("Speed", "training examples/s"),
        Text("FLOPs", "of a train step, per example"),
        Text("Memory", "of a train step"),
    ]
    rows = [
        (
            Text(row.method),
            Text(f"{row.parameters:,}"),
            Text(large(evidence.speed(row, study.outcome))),
            Text(large(evidence.step_cost(row, study.outcome, "flops"))),
            Text(large(evidence.step_cost(row, study.outcome, "memory"), "B")),
        )
        for row in study.fused
        if row.method in found
    ]
    table = Table(tuple(heads), {FUSED: rows})
    figure = curves.cost(found, study.look, study.outcome.metric)
    return Section(figure, caption, table, "Cost, mean over seeds", len(rows) <= SHORT)


def _missing(study: Study) -> Section:
    one = _need_examined(study, modalities=2)
    metric, sign = evidence.measured(study.outcome)
    present = {
        method: {kept.replace("+", " + ") or "none": value for kept, value in found.items()}
        for method, found in evidence.absences(study.fused, study.outcome, "subsets").items()
    }
    lost = {
        method: {f"{100 * float(rate):.0f} %": value for rate, value in found.items()}
        for method, found in evidence.absences(study.fused, study.outcome, "missing").items()
    }
    panels = {"only these present": present} | ({"each lost in a share of the examples": lost} if lost else {})
    more = f"; and with each lost at random in a share of {one['rows']:,} of them" if lost else ""
    caption = (
        f"Test {metric} where modalities are missing, mean over seeds: with only those of a column present in all test "
        f"examples{more}. The darker the better; shades run from the worst to the best."
    )
    return Section(plots.heat_maps(panels, metric, sign > 0), caption)


def _contribution(study: Study) -> Section:
    _need_examined(study, modalities=2)
    metric, sign = evidence.measured(study.outcome)
    titles = {
        "shapley": f"Shapley value ({'gain' if sign > 0 else 'fall'} in {metric})",
        "perceptual": "perceptual score (share of the score)",
    }
    panels = {
        title: found
        for kind, title in titles.items()
        if (found := evidence.contributions(study.fused, study.outcome, kind))
    }
    perceptual = (
        " Perceptual score: the share of the score that is lost when each example is given another one's modality."
    )
    caption = (
        "What each modality contributes. Shapley value: its mean gain over the orders in which modalities come; the "
        f"values of a method sum to the gain of all modalities over none.{perceptual * (len(panels) > 1)} Bars are "
        f"means over seeds, {SEEDS}."
    )
    return Section(plots.bars(panels), caption)


def _interaction(study: Study) -> Section:
    _need_examined(study, modalities=2)
    metric, _ = evidence.measured(study.outcome)
    found = evidence.interactions(study.fused, study.outcome)
    parts = list(study.modalities)
    of = f"a function of {parts[0]} and a function of {parts[1]}" if len(parts) == 2 else "a part of one and the rest"
    caption = (
        f"Test {metric} as it is, and of the empirical additive projection (EMAP), the nearest sum of {of}; mean over "
        "seeds and draws of test examples. What lies between the two comes from the interaction of modalities."
    )
    return Section(plots.interaction(found, metric), caption)


def _corruption(study: Study) -> Section:
    one = _need_examined(study)
    metric, sign = evidence.measured(study.outcome)
    severities = one["severities"]
    every = evidence.corruptions(study.fused, study.outcome)
    drawn = evidence.corruptions(study.drawn, study.outcome)
    caption = (
        f"Test {metric} as one modality is spoiled, mean over seeds, on {one['corrupted']:,} test examples that are "
        f"the same for all.{study.only}"
    )
    areas = {place: evidence.robustness(found, severities, sign) for place, found in every.items()}
    late = any(row.method == evidence.LATE for row in study.fused)
    heads = [Text("Method"), *(Text(f"{m}: {kind}".replace("_", " ")) for m, kind in areas)]
    rows = [(Text(row.method), *(_area(found.get(row.method)) for found in areas.values())) for row in study.fused]
    about = f"Relative robustness: the area under a curve{'' if sign > 0 else ' (less is better)'}"
    about += f"; below it, effective robustness: the area above {evidence.LATE}'s, shifted to start equal" * late
    figure = curves.corruption(drawn, severities, study.look, metric)
    return Section(figure, caption, Table(tuple(heads), {FUSED: rows}), about, len(rows) <= SHORT)


def _area(found: tuple[float, float | None] | None) -> Text:
    relative, effective = found or (None, None)
    return Text(number(relative), number(effective, "+") if effective is not None else "")


def _calibration(study: Study) -> Section:
    one = _need_examined(study)
    tasks = list(one["calibration"])
    best = next((r for r in study.ranked if any(evidence.calibrations(r, study.outcome, t) for t in tasks)), None)
    if best is None:
        raise Missing("no target is one class of several")
    panels, groups = {}, {}
    for task in tasks:
        of = f"{task}, " * (len(tasks) > 1)
        runs = evidence.calibrations(best, study.outcome, task)
        for when in ("before", "after"):
            error = number(evidence.span(run[when]["ece"] for run in runs).mean)
            panels[f"{of}{when} scaling: ECE {error}"] = evidence.pooled(runs, when)
        groups[task] = [_calibrated(row, evidence.calibrations(row, study.outcome, task)) for row in study.fused]
    heads = [Text("Method"), Text("Temperature")]
    heads += [Text(name, when) for name in ("ECE", "ECE, equal mass", "NLL") for when in ("before", "after")]
    caption = (
        f"Reliability of {best.method}, the best on validation, before and after its logits are divided by the "
        f"temperature fitted on validation: accuracy in 15 bins of confidence, of all {len(runs)} seeds taken "
        "together, and below it the share of examples. On the broken line confidence is accuracy."
    )
    about = "Temperature, and calibration before and after it; mean over seeds"
    return Section(curves.reliability(panels), caption, Table(tuple(heads), groups), about, len(study.fused) <= SHORT)


def _calibrated(row: Row, runs: Sequence[Mapping[str, Any]]) -> tuple[Text, ...]:
    names = ("ece", "ece_equal_mass", "nll")
    values = [[run["temperature"] for run in runs]]
    values += [[run[when][name] for run in runs] for name in names for when in ("before", "after")]
    return Text(row.method), *(Text(number(evidence.span(value).mean)) for value in values)


def _examples(study: Study) -> Section:
    if not study.ranked:
        raise Missing("no fusion strategy ended in a number")
    targets = study.plan.cells[0].config["data"]["targets"]
    if len(targets) > 1:
        raise Missing(f"examples are shown of one target, and there are {len(targets)}")
    try:
        row, shown = _shown(study)
    except (UserError, OSError) as error:
        raise Missing(f"no run could be opened ({error})") from error
    classes = next(iter(targets.values()))["kind"] == "classification"
    found = tuple(card(one, study.modalities, classes) for one in shown)
    seed, best = row.seeds[0], row is study.ranked[0]
    who = f"{row.method}, {'the best' if best else 'the best with attention'} on validation, seed {seed}"
    if any(one.attention for one in shown):
        caption = (
            f"Where {who}, looks on {len(found)} test examples drawn at random: the attention that each token "
            "receives, the mean over heads and queries, relative to the most in its modality."
        )
    else:
        caption = f"Test examples drawn at random with what {who}, predicts. No strategy here has attention to show."
    return Section(caption=caption, cards=found)


def _shown(study: Study) -> tuple[Row, list[Shown]]:
    """Returns the best method's examples, or those of the best one that attends, if the best one does not."""
    best, *others = study.ranked
    shown = _open(study, best)
    attending = (row for row in others if _fusion_class(study, row).declares.family == "attention")
    if not any(one.attention for one in shown) and (row := next(attending, None)):
        instead = _open(study, row)
        if any(one.attention for one in instead):
            return row, instead
    return best, shown


def _fusion_class(study: Study, row: Row) -> type:
    return lookup(FUSIONS, _fusion(study, row), "config.model.fusion.name")


def _open(study: Study, row: Row) -> list[Shown]:
    return attention.examples(runner.cell_directory(study.directory, study.cells[row.runs[0]]))


def _fusion(study: Study, row: Row) -> str:
    return study.cells[row.runs[0]].config["model"]["fusion"]["name"]


def _training(study: Study) -> Section:
    metric = study.outcome.metric
    found = {row.method: evidence.training(row, study.cells, study.directory, metric) for row in study.drawn}
    found = {method: curve for method, curve in found.items() if curve.steps}
    if not found:
        raise Missing("no run has validations in its metrics.jsonl")
    caption = f"Validation {metric} in training: mean over seeds; bands span them, from the lowest to the highest."
    return Section(curves.training(found, study.look, metric), caption + study.only)


def _need_examined(study: Study, modalities: int = 1) -> Mapping[str, Any]:
    """Returns what was found of one run; raises Missing where there is none, or there are fewer modalities."""
    if len(study.modalities) < modalities:
        raise Missing("there is one modality")
    found = next((runs[0] for row in study.fused if (runs := evidence.examined(row, study.outcome))), None)
    if found is None:
        raise Missing("no run was examined")
    return found


MAKERS = {
    "Differences": _differences,
    "Cost": _cost,
    "Missing modalities": _missing,
    "Contribution": _contribution,
    "Interaction": _interaction,
    "Corruption": _corruption,
    "Calibration": _calibration,
    "Examples": _examples,
    "Training": _training,
}
