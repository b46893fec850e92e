"""The tables of a report (methods, differences, verdicts) as text for HTML, Markdown and LaTeX."""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence

from mmfusion.analysis.ablation.plan import REFERENCE, Plan
from mmfusion.analysis.claims.crossed import NewData
from mmfusion.analysis.claims.differences import Difference
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.significance import interquartile_mean
from mmfusion.analysis.ensembles import MEAN, STACKED
from mmfusion.analysis.outcome import Outcome

NONE = "–"
LATE = "undertrained"
MAX_NAMED = 4  # at this number of failed seeds and above, only their number is given
FUSED, UNIMODAL, CLASSICAL = "Fusion strategies", "Unimodal baselines", "Classical baselines"
ENSEMBLES = "Ensembles of unimodal runs"
PUBLISHED = "Published scores"  # not measured here
ARROWS = {"better": r"$\uparrow$", "worse": r"$\downarrow$", "equivalent": r"$\approx$", "cannot tell": "?"}
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "−": "$-$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Text:
    """The content of a table cell: a name, value or verdict, and an interval or remark in small print."""

    main: str
    remark: str = ""
    interval: tuple[str, ...] = ()
    verdict: str = ""

    @property
    def below(self) -> str:
        """The small print."""
        return " to ".join(self.interval) or self.remark


@dataclasses.dataclass(frozen=True)
class Table:
    """Column heads, and rows in groups; the columns in `text_columns` have text instead of values."""

    heads: tuple[Text, ...]
    groups: dict[str, list[tuple[Text, ...]]]
    text_columns: tuple[str, ...] = ("Method", "Selected", "Verdict")


@dataclasses.dataclass(frozen=True)
class Line:
    """A method of the main table.

    Attributes:
      result: of the method.
      interval: of the mean test score over seeds or folds; None with fewer than two, and for classical baselines.
      against: its differences, by the name of the method that it is compared with.
    """

    result: MethodResult
    interval: tuple[float, float] | None
    against: dict[str, Difference]


def number(value: float | None, sign: str = "") -> str:
    """Returns a score with four decimals, as in the claims; `sign="+"` adds a plus sign to positive values."""
    if value is None or not math.isfinite(value):
        return NONE
    digits = 1 if abs(value) >= 1000 else 4
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}".replace("-", "−")  # the sum turns -0.0 into 0.0


def score(value: float | None, interval: Sequence[float] | None, sign: str = "") -> Text:
    """Returns a score with its interval, if any."""
    return Text(number(value, sign), interval=tuple(number(end, sign) for end in interval or ()))


def lines(outcome: Outcome, plan: Plan) -> dict[str, list[Line]]:
    """Returns the methods by non-empty group, best mean test score first, methods without a score last."""
    planned = {trial.method for trial in plan.trials}
    against: dict[str, dict[str, Difference]] = {}
    for other, differences in comparisons(outcome).items():
        for difference in differences:
            against.setdefault(difference.method, {})[other] = difference
    published = [MethodResult(name, False, {}, (), (), (), (), (s,), None) for name, s in outcome.published.items()]
    sign = -1 if outcome.higher else 1
    groups: dict[str, list[Line]] = {FUSED: [], UNIMODAL: [], ENSEMBLES: [], CLASSICAL: [], PUBLISHED: []}
    for result in sorted((*outcome.methods, *published), key=lambda r: (not r.test, sign * r.mean if r.test else 0)):
        group = UNIMODAL if result.unimodal_baseline else FUSED
        if not result.seeds and not result.failed_seeds:
            group = PUBLISHED
        elif result.method in (MEAN, STACKED):
            group = ENSEMBLES
        elif result.method not in planned:
            group = CLASSICAL
        has_interval = group != CLASSICAL or result.folds
        interval = result.interval if has_interval else None
        groups[group].append(Line(result, interval, against.get(result.method, {})))
    return {group: found for group, found in groups.items() if found}


def comparisons(outcome: Outcome) -> dict[str, Sequence[Difference]]:
    """Returns the differences by the method compared with: the reference, and the best unimodal baseline.

    With several variations of the strategies, each method is compared with the `concat` of its variation.
    """
    found = {}
    for differences in (outcome.claims.against_reference, outcome.claims.against_unimodal):
        others = sorted({difference.other for difference in differences})
        if others:
            found[others[0] if len(others) == 1 else f"{REFERENCE} of the same variation"] = differences
    return found


def compared_with(outcome: Outcome) -> list[str]:
    """Returns the names of the methods compared with."""
    return list(comparisons(outcome))


def methods(outcome: Outcome, plan: Plan, groups: Mapping[str, Sequence[Line]], others: Sequence[str]) -> Table:
    """Returns the main table, with the differences from `others` next to the scores."""
    heads = [
        Text("Method"),
        Text(f"Test {outcome.metric}", "mean, 95 % interval"),
        Text("Middle half", "mean"),
        Text("Worst", "run"),
        Text("Valid", "mean"),
        Text("Selected"),
        Text("Parameters"),
        Text("Runs"),
    ]
    for other in others:
        heads += [Text(f"Against {other}", "difference"), Text("Verdict", "p, corrected")]
    widths = _widths(plan)
    body = {g: [_method_cells(line, g, outcome, others, widths) for line in found] for g, found in groups.items()}
    return Table(tuple(heads), body)


def differences(outcome: Outcome) -> Table:
    """Returns the evidence of the verdicts: each difference with its test, and the seeds needed to detect it."""
    heads = [
        Text("Method"),
        Text("Difference", "95 % interval"),
        Text("p", "corrected"),
        Text("New data", "95 % interval, p"),
        Text("P(A>B)"),
        Text("Pairs"),
        Text("Seeds needed"),
        Text("Verdict"),
    ]
    body: dict[str, list[tuple[Text, ...]]] = {}
    for other, found in comparisons(outcome).items():
        by_size = sorted(found, key=lambda d: -d.comparison.difference if d.comparison else math.inf)
        body[f"Against {other}"] = [_difference_cells(difference) for difference in by_size]
    return Table(tuple(heads), body)


def _difference_cells(difference: Difference) -> tuple[Text, ...]:
    comparison = difference.comparison
    numbers = (Text(NONE),) * 5
    if comparison and difference.p is not None:
        numbers = (
            score(comparison.difference, comparison.interval, "+"),
            Text(probability(difference.p)),
            _new_data(difference.new_data),
            Text(f"{comparison.better:.2f}"),
            Text(str(comparison.n)),
        )
    needed = Text(str(difference.seeds_needed) if difference.seeds_needed else NONE)
    remark = LATE if difference.undertrained else ""
    return (Text(difference.method), *numbers, needed, Text(difference.verdict, remark, verdict=difference.verdict))


def _new_data(found: NewData | None) -> Text:
    if found is None:
        return Text(NONE)
    low, high = (number(end, "+") for end in found.interval)
    return Text(number(found.difference, "+"), f"{low} to {high}, p {probability(found.p)}")


def _method_cells(
    line: Line, group: str, outcome: Outcome, others: Sequence[str], widths: dict[str, int]
) -> tuple[Text, ...]:
    result = line.result
    roles = {difference.other: "reference" for difference in outcome.claims.against_reference}
    roles |= {difference.other: "best unimodal baseline" for difference in outcome.claims.against_unimodal}
    roles[outcome.claims.best] = "best on validation"
    late = [LATE] * any(one.method == result.method for one in outcome.claims.undertrained)
    remark = ", ".join([*filter(None, [roles.get(result.method)]), *late])
    selected = {**result.selected, **({"width": widths[result.method]} if result.method in widths else {})}
    first, *rest = [f"{key.rpartition('.')[2]} {short(value)}" for key, value in selected.items()] or [""]
    valid = number(statistics.fmean(result.valid) if result.valid else None)
    cells = [Text(result.method, remark), score(result.mean, line.interval)]
    if group in (CLASSICAL, PUBLISHED):  # they have no seeds
        cells += [
            Text(""),
            Text(""),
            Text(valid if result.valid else ""),
            Text(first, ", ".join(rest)),
            Text(""),
            Text(""),
        ]
    else:
        worst = (min if outcome.higher else max)(result.test, default=None)
        parameters = NONE if result.parameters is None else f"{result.parameters:,}"
        middle = interquartile_mean(result.units) if result.test else None
        cells += [
            Text(number(middle)),
            Text(number(worst)),
            Text(valid),
            Text(first, ", ".join(rest)),
            Text(parameters),
        ]
        cells.append(Text(str(len(result.seeds)), _failed(result)))
    for other in others:
        cells += _comparison_cells(line.against.get(other))
    return tuple(cells)


def _failed(result: MethodResult) -> str:
    seeds = result.failed_seeds
    if not seeds:
        return ""
    if result.failed_folds or len(seeds) >= MAX_NAMED:
        return f"{len(seeds)} failed"
    return f"failed: {', '.join(map(str, seeds))}"


def _comparison_cells(difference: Difference | None) -> tuple[Text, Text]:
    if difference is None:
        return Text(""), Text("")
    if difference.comparison is None or difference.p is None:
        return Text(NONE), Text(difference.verdict, "too few pairs", verdict=difference.verdict)
    size = score(difference.comparison.difference, difference.comparison.interval, "+")
    remark = LATE if difference.undertrained else probability(difference.p)
    return size, Text(difference.verdict, remark, verdict=difference.verdict)


def large(value: float, unit: str = "") -> str:
    """Returns a quantity with an SI prefix from k to T."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {name}{unit}"
    return f"{value:.0f} {unit}".strip() if math.isfinite(value) else NONE


def probability(p: float) -> str:
    """Returns a p value as text."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def short(value: object) -> str:
    """Returns a config value as text, without trailing zeros."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _widths(plan: Plan) -> dict[str, int]:
    """Returns the width of each method; empty if all are equal."""
    widths = {trial.method: trial.config["model"]["width"] for trial in plan.trials}
    return widths if len(set(widths.values())) > 1 else {}


def markdown(table: Table) -> str:
    """Returns a table in Markdown, with its groups below each other."""
    heads = [_plain(head, ", ") for head in table.heads]
    rows = [heads, ["---" if head.main in table.text_columns else "---:" for head in table.heads]]
    for group, body in table.groups.items():
        rows += [[f"**{group}**", *[""] * (len(heads) - 1)]] if len(table.groups) > 1 else []
        rows += [[_plain(cell, ": " if cell.verdict else ", ") for cell in row] for row in body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text: Text, joint: str) -> str:
    return escape_markdown(joint.join(filter(None, [text.main, text.below])))


def escape_markdown(text: str) -> str:
    """Returns the text escaped for Markdown, inside tables as well."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text)


def latex(table: Table, caption: str) -> str:
    r"""Returns a LaTeX table with `booktabs`; verdicts become arrows next to the differences."""
    kept = [i for i, head in enumerate(table.heads) if head.main not in ("Selected", "Verdict")]
    body = [" & ".join(_tex(table.heads[i].main) for i in kept) + r" \\", r"\midrule"]
    for n, (group, rows) in enumerate(table.groups.items()):
        if len(table.groups) > 1:
            if n:
                body.append(r"\addlinespace")
            body += [rf"\multicolumn{{{len(kept)}}}{{l}}{{\emph{{{_tex(group)}}}}} \\"]
        for row in rows:
            body.append(" & ".join(_tex_cell(row, i) for i in kept) + r" \\")
    return "\n".join(
        [
            "% Needs \\usepackage{booktabs}.",
            r"\begin{table}",
            r"  \centering",
            r"  \small",
            rf"  \caption{{{_tex(caption)} $\uparrow$ better, $\downarrow$ worse, $\approx$ equivalent, "
            "? cannot tell.}",
            r"  \label{tab:ablation}",
            rf"  \begin{{tabular}}{{l{'r' * (len(kept) - 1)}}}",
            r"    \toprule",
            *(f"    {line}" for line in body),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _tex_cell(row: Sequence[Text], i: int) -> str:
    cell = row[i]
    verdict = row[i + 1].verdict if i + 1 < len(row) else ""  # the column after a difference
    interval = rf" {{\scriptsize [{', '.join(map(_tex, cell.interval))}]}}" if cell.interval else ""
    return f"{_tex(cell.main)}{interval}{' ' + ARROWS[verdict] if verdict else ''}"


def _tex(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(c, c) for c in text)
