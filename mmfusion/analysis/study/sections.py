"""The sections of a study's report: tables of datasets and methods, and the figures."""

import numpy as np

from mmfusion.analysis.ablation.plan import REFERENCE
from mmfusion.analysis.claims.differences import Difference
from mmfusion.analysis.report import plots
from mmfusion.analysis.report.sections import Section
from mmfusion.analysis.report.tables import NONE, Table, Text, number, probability
from mmfusion.analysis.report.theme import Style, method_styles
from mmfusion.analysis.study import figures
from mmfusion.analysis.study.aggregates import Estimate
from mmfusion.analysis.study.datasets import Dataset
from mmfusion.analysis.study.summary import Row, Summary

MAX_PLOTTED = 8  # coloured methods, in addition to concat
STRATEGIES, FLOORS = "Fusion strategies", "Floors"
RESAMPLED = "95 % intervals of the bootstrap over seeds within datasets"


def datasets(summary: Summary) -> Table:
    """Returns a row per dataset: the best strategy by validation, its score, and those of the floors."""
    heads = (
        Text("Dataset"),
        Text("Metric"),
        Text("Chance"),
        Text("Best strategy", "on validation"),
        Text("Test", "its mean"),
        *(Text(f"Against {other}", "normalised difference") for other in summary.references),
        Text("Examples", "test"),
    )
    return Table(heads, {"": [_dataset_cells(d, summary) for d in summary.datasets]}, ("Dataset", "Best strategy"))


def _dataset_cells(dataset: Dataset, summary: Summary) -> tuple[Text, ...]:
    best = dataset.outcome.claims.best
    best = best if best in summary.strategies else max(summary.strategies, key=dataset.valid)
    judged = {(j.method, j.other): j for j in summary.over_seeds[dataset.name]}
    counts = [result["data"].get("examples", {}) for result in dataset.outcome.results.values() if "data" in result]
    examples = counts[0].get("test") if counts else None
    return (
        Text(dataset.name),
        Text(dataset.outcome.metric),
        Text(number(dataset.chance)),
        Text(best),
        Text(number(dataset.methods[best].mean)),
        *(_judged(judged.get((best, other)), abs(dataset.scale or 1.0)) for other in summary.references),
        Text(NONE if examples is None else f"{examples:,}"),
    )


def _judged(judged: Difference | None, scale: float = 1.0) -> Text:
    if judged is None or judged.comparison is None or judged.p is None:
        return Text(NONE)
    return Text(number(judged.comparison.difference / scale, "+"), probability(judged.p), verdict=judged.verdict)


def sections(summary: Summary) -> dict[str, Section]:
    """Returns the sections by title, in report order."""
    rows, styles = summary.rows, _styles(summary)
    found = {"Over all datasets": _overall(summary), "On each dataset": _scores(summary)}
    if summary.over_datasets:
        found["Differences over datasets"] = _differences(summary)
    if any(row.profile is not None for row in rows):
        caption = (
            "Performance profiles: the share of runs, averaged over datasets, with a normalised score above τ, and "
            f"{RESAMPLED}, point by point. A curve above another at every τ is better throughout.{_drawn(summary)}"
        )
        found["Performance profiles"] = Section(figures.profiles(rows, styles), caption)
    if summary.references:
        found["Probability of improvement"] = _improvement(summary)
    if summary.test:
        found["Critical differences"] = _critical(summary)
    if any(row.middle and row.parameters and row.step_time for row in rows):
        found["Cost"] = _cost(summary, styles)
    return found


def _styles(summary: Summary) -> dict[str, Style]:
    """Returns the styles of the floors and references, and of the best strategies on validation."""
    kept = [row.method for row in summary.rows if not row.is_strategy or row.method in summary.references]
    kept = [name for name in kept if name != REFERENCE][: MAX_PLOTTED - 1]
    best = sorted(summary.strategies, key=lambda name: summary.row(name).valid_rank)
    kept += [name for name in best if name not in (*kept, REFERENCE)][: MAX_PLOTTED - len(kept)]
    methods = [row.method for row in summary.rows if row.method in kept]
    styles = method_styles(methods)
    return styles if REFERENCE in summary.strategies else {name: styles[name] for name in methods}


def _drawn(summary: Summary) -> str:
    styles = _styles(summary)
    if all(row.method in styles for row in summary.rows):
        return ""
    return " Coloured: the floors, the references, and the best strategies on validation."


def _overall(summary: Summary) -> Section:
    caption = (
        "Mean rank over datasets by mean test score, and interquartile mean of normalised scores over all runs, both "
        f"with {RESAMPLED}. Floors are open circles."
    )
    heads = (
        Text("Method"),
        Text("Mean rank", "95 % interval"),
        Text("Interquartile mean", "95 % interval"),
        Text("Mean", "of normalised scores"),
        Text("Datasets won", "of its group"),
    )
    groups: dict[str, list[tuple[Text, ...]]] = {}
    for row in summary.rows:
        cells = (
            Text(row.method, "best on validation" if row.method == summary.best else ""),
            _estimate(row.rank, 2),
            _estimate(row.middle, 3),
            Text(_rounded(row.mean, 3)),
            Text(str(_won(row, summary))),
        )
        groups.setdefault(STRATEGIES if row.is_strategy else FLOORS, []).append(cells)
    return Section(figures.aggregates(summary.rows), caption, Table(heads, groups), "All methods")


def _won(row: Row, summary: Summary) -> int:
    """Returns on how many datasets a method has the best mean test score of the strategies, or of the floors."""
    rivals = [other.method for other in summary.rows if other.is_strategy == row.is_strategy]
    return sum(
        rivals[int(np.nanmean(dataset.scores(rivals), axis=-1).argmax())] == row.method for dataset in summary.datasets
    )


def _scores(summary: Summary) -> Section:
    methods = [row.method for row in summary.rows]
    columns = {d.name: np.array([d.methods[name].mean for name in methods]) for d in summary.datasets}
    metrics = dict.fromkeys(dataset.outcome.metric for dataset in summary.datasets)
    caption = (
        f"Mean test {', '.join(metrics)} over seeds. Darker is better; the shades of a column run from worst to best. "
        "The table has the verdict of each strategy on each dataset, over seeds."
    )
    heads = (Text("Method"), *(Text(dataset.name) for dataset in summary.datasets))
    groups = {}
    for other in summary.references:
        found = {name: {j.method: j for j in js if j.other == other} for name, js in summary.over_seeds.items()}
        groups[f"Against {other}"] = [
            (Text(method), *(_judged(found[d.name].get(method), abs(d.scale or 1.0)) for d in summary.datasets))
            for method in summary.strategies
            if method != other
        ]
    table = Table(heads, groups) if groups else None
    name = "Differences on each dataset, normalised, and p corrected for all strategies"
    figure = figures.scores(methods, columns, [dataset.outcome.higher for dataset in summary.datasets])
    return Section(figure, caption, table, name, expanded=False)


def _differences(summary: Summary) -> Section:
    heads = (
        Text("Method"),
        Text("Difference", "95 % interval"),
        Text("p", "corrected"),
        Text("P(A>B)", "share of datasets"),
        Text("Datasets", "better, equivalent, worse, cannot tell"),
        Text("Verdict", "over datasets"),
    )
    groups = {}
    for other in summary.references:
        found = sorted(summary.against(other), key=lambda j: -j.comparison.difference if j.comparison else 0.0)
        groups[f"Against {other}"] = [_difference_cells(judged, summary) for judged in found]
    panels = {other: {judged.method: judged for judged in summary.against(other)} for other in summary.references}
    figure = plots.forest(summary.strategies, panels, "difference of normalised scores")
    caption = (
        "Differences of mean normalised scores, paired by dataset: mean and 95 % Student's t interval over datasets. "
        "Right of 0 the strategy is better."
    )
    return Section(figure, caption, Table(heads, groups), "All differences with their tests", expanded=False)


def _difference_cells(judged: Difference, summary: Summary) -> tuple[Text, ...]:
    on = [
        j
        for found in summary.over_seeds.values()
        for j in found
        if (j.method, j.other) == (judged.method, judged.other)
    ]
    counts = [sum(j.verdict == verdict for j in on) for verdict in ("better", "equivalent", "worse", "cannot tell")]
    numbers = (Text(NONE),) * 3
    if judged.comparison and judged.p is not None:
        interval = tuple(number(end, "+") for end in judged.comparison.interval)
        numbers = (
            Text(number(judged.comparison.difference, "+"), interval=interval),
            Text(probability(judged.p)),
            Text(f"{judged.comparison.better:.2f}"),
        )
    tally = Text(" · ".join(map(str, counts)))
    return (Text(judged.method), *numbers, tally, Text(judged.verdict, verdict=judged.verdict))


def _improvement(summary: Summary) -> Section:
    heads = (Text("Method"), *(Text(f"Over {other}", "95 % interval") for other in summary.references))
    rows = [
        (Text(row.method), *(_estimate(row.improvement.get(other), 2) for other in summary.references))
        for row in summary.rows
    ]
    caption = (
        "Probability that a run of the method scores higher on test than a run of the reference on the same dataset, "
        f"averaged over datasets (a tie counts one half), and {RESAMPLED}. At 0.5 neither is better."
    )
    figure = figures.improvement(summary.rows, summary.references)
    return Section(figure, caption, Table(heads, {"": rows}), "All probabilities", expanded=False)


def _critical(summary: Summary) -> Section:
    assert summary.test
    n, k = len(summary.datasets), len(summary.rows)
    caption = (
        f"Mean ranks of {k} methods on {n} datasets. A bar joins methods that Nemenyi's test does not tell apart at "
        f"0.05; Friedman's test of equal ranks has p = {summary.test.p:.3g} (Demšar 2006). The diagram uses ranks "
        "alone, neither how far methods are apart nor how runs vary, and corrects for all pairs: with few datasets it "
        "tells only large differences."
    )
    return Section(figures.critical_difference(summary.rows, summary.test), caption)


def _cost(summary: Summary, styles: dict[str, Style]) -> Section:
    base = summary.references[0] if summary.references and summary.references[0] in summary.strategies else ""
    base = base or summary.strategies[0]
    heads = (
        Text("Method"),
        Text("Parameters", f"relative to {base}"),
        Text("Time of a step", f"relative to {base}"),
        Text("Training", "one run of each dataset, s"),
    )
    rows = [
        (
            Text(row.method),
            Text(_rounded(row.parameters, 2)),
            Text(_rounded(row.step_time, 2)),
            Text(NONE if row.seconds is None else f"{row.seconds:,.0f}"),
        )
        for row in summary.rows
    ]
    caption = (
        "Interquartile mean of normalised scores against parameters and the time of a training step, both relative to "
        f"{base}: geometric means over datasets.{_drawn(summary)} Times are of runs that may have shared their machine."
    )
    return Section(figures.cost(summary.rows, styles, base), caption, Table(heads, {"": rows}), "Cost of all methods")


def _estimate(estimate: Estimate | None, digits: int) -> Text:
    if estimate is None:
        return Text(NONE)
    return Text(
        _rounded(estimate.value, digits), interval=tuple(_rounded(end, digits) for end in estimate.interval or ())
    )


def _rounded(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")
