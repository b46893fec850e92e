"""The tables of a report: methods best first with intervals, differences and verdicts, as text for three notations."""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from mmfusion.analysis.ablate import Outcome
from mmfusion.analysis.ablation.plan import REFERENCE, Plan
from mmfusion.analysis.claims.selection import Difference, Row
from mmfusion.analysis.claims.significance import mean_interval

NONE = "–"
MANY = 4  # lost seeds that are counted and not named
FUSED, ALONE, CLASSICAL = "Fusion strategies", "One modality alone", "Classical baselines"
PUBLISHED = "Reported by others"  # and not measured here
ARROWS = {"better": r"$\uparrow$", "worse": r"$\downarrow$", "cannot tell": r"$\sim$"}
SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "−": "$-$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Text:
    """What a table's cell says: a name, number or verdict, and smaller below it an interval's two ends or a remark."""

    main: str
    remark: str = ""
    ends: tuple[str, ...] = ()
    verdict: str = ""

    @property
    def below(self) -> str:
        """What is smaller below."""
        return " to ".join(self.ends) or self.remark


@dataclasses.dataclass(frozen=True)
class Table:
    """Heads, and rows in groups; columns of the heads in `words` hold no numbers."""

    heads: tuple[Text, ...]
    groups: dict[str, list[tuple[Text, ...]]]
    words: tuple[str, ...] = ("Method", "Chosen", "Verdict")


@dataclasses.dataclass(frozen=True)
class Line:
    """A method of the main table.

    Attributes:
      row: of the outcome.
      interval: of the mean test score over seeds; None of fewer than two, and of baselines that have no seeds.
      against: differences from `concat` and from the best modality alone, by that method's name.
    """

    row: Row
    interval: tuple[float, float] | None
    against: dict[str, Difference]


def number(value: float | None, sign: str = "") -> str:
    """Returns a score in four decimals, as the claims write it; `sign` "+" shows a plus as well."""
    if value is None or not math.isfinite(value):
        return NONE
    digits = 1 if abs(value) >= 1000 else 4
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}".replace("-", "−")  # the sum turns -0.0 into 0.0


def score(value: float | None, interval: Sequence[float] | None, sign: str = "") -> Text:
    """Returns a number with its interval below, where there is one."""
    return Text(number(value, sign), ends=tuple(number(end, sign) for end in interval or ()))


def lines(outcome: Outcome, plan: Plan) -> dict[str, list[Line]]:
    """Returns the methods by group, the best mean test score first, those without any last; empty groups left out."""
    planned = {cell.method for cell in plan.cells}
    against: dict[str, dict[str, Difference]] = {}
    for other, found in comparisons(outcome).items():
        for one in found:
            against.setdefault(one.method, {})[other] = one
    sign = -1 if outcome.higher else 1
    groups: dict[str, list[Line]] = {FUSED: [], ALONE: [], CLASSICAL: [], PUBLISHED: []}
    others = [Row(name, False, {}, (), (), (), (), (score,), None) for name, score in outcome.published.items()]
    for row in sorted((*outcome.rows, *others), key=lambda row: (not row.test, sign * row.mean if row.test else 0)):
        group = CLASSICAL if row.method not in planned else ALONE if row.floor else FUSED
        group = PUBLISHED if not row.seeds and not row.lost else group
        several = len(row.test) > 1 and group != CLASSICAL
        interval = mean_interval(np.array(row.test)) if several else None
        groups[group].append(Line(row, interval, against.get(row.method, {})))
    return {group: found for group, found in groups.items() if found}


def comparisons(outcome: Outcome) -> dict[str, Sequence[Difference]]:
    """Returns the differences by what methods were compared with: `concat`, and the best modality alone.

    Where something else was varied, each method is held against the `concat` that has the same value of it.
    """
    found = {}
    for differences in (outcome.claims.against_reference, outcome.claims.against_floor):
        others = sorted({one.other for one in differences})
        if others:
            found[others[0] if len(others) == 1 else f"{REFERENCE} otherwise alike"] = differences
    return found


def compared_with(outcome: Outcome) -> list[str]:
    """Returns what the methods were compared with."""
    return list(comparisons(outcome))


def methods(outcome: Outcome, plan: Plan, groups: Mapping[str, Sequence[Line]], others: Sequence[str]) -> Table:
    """Returns the main table, with the differences from `others` beside the scores."""
    heads = [
        Text("Method"),
        Text(f"Test {outcome.metric}", "mean, 95 % interval"),
        Text("Worst", "seed"),
        Text("Valid", "mean"),
        Text("Chosen"),
        Text("Parameters"),
        Text("Seeds"),
    ]
    for other in others:
        heads += [Text(f"Against {other}", "difference"), Text("Verdict", "p, corrected")]
    widths = _widths(plan)
    body = {g: [_cells(line, g, outcome, others, widths) for line in found] for g, found in groups.items()}
    return Table(tuple(heads), body)


def differences(outcome: Outcome) -> Table:
    """Returns what the verdicts rest on: each difference with its test, and the seeds that would tell."""
    heads = [
        Text("Method"),
        Text("Difference", "95 % interval"),
        Text("p", "corrected"),
        Text("P(A>B)", "95 % interval"),
        Text("Pairs"),
        Text("Would tell", "seeds"),
        Text("Verdict"),
    ]
    body = {}
    for other, found in comparisons(outcome).items():
        for one in sorted(found, key=lambda one: -one.comparison.difference if one.comparison else math.inf):
            seen, more = one.comparison, Text(str(one.seeds_needed) if one.seeds_needed else NONE)
            numbers = (
                (
                    score(seen.difference, seen.interval, "+"),
                    Text(probability(one.p)),
                    Text(f"{seen.better:.2f}", ends=tuple(f"{end:.2f}" for end in seen.better_interval)),
                    Text(str(seen.n)),
                )
                if seen
                else (Text(NONE),) * 4
            )
            row = (Text(one.method), *numbers, more, Text(one.verdict, verdict=one.verdict))
            body.setdefault(f"Against {other}", []).append(row)
    return Table(tuple(heads), body)


def _cells(line: Line, group: str, outcome: Outcome, others: Sequence[str], widths: dict[str, int]) -> tuple[Text, ...]:
    row, worst = line.row, min if outcome.higher else max
    roles = {one.other: "the reference" for one in outcome.claims.against_reference}
    roles |= {one.other: "best modality alone" for one in outcome.claims.against_floor}
    roles[outcome.claims.best] = "best on validation"
    chosen = {**row.chosen, **({"width": widths[row.method]} if row.method in widths else {})}
    first, *rest = [f"{key.rpartition('.')[2]} {short(value)}" for key, value in chosen.items()] or [""]
    lost = f"lost {', '.join(map(str, row.lost)) if len(row.lost) < MANY else len(row.lost)}" if row.lost else ""
    seedless = group in (CLASSICAL, PUBLISHED)
    cells = [
        Text(row.method, roles.get(row.method, "")),
        score(row.mean, line.interval),
        Text("" if seedless else number(worst(row.test)) if row.test else NONE),
        Text(number(statistics.fmean(row.valid)) if row.valid else "" if seedless else NONE),
        Text(first, ", ".join(rest)),
        Text("" if seedless else f"{row.parameters:,}" if row.parameters is not None else NONE),
        Text("" if seedless else str(len(row.seeds)), lost),
    ]
    for other in others:
        cells += _difference(line.against.get(other))
    return tuple(cells)


def _difference(one: Difference | None) -> tuple[Text, Text]:
    if one is None:
        return Text(""), Text("")
    if one.comparison is None:
        return Text(NONE), Text(one.verdict, "too few pairs", verdict=one.verdict)
    difference = score(one.comparison.difference, one.comparison.interval, "+")
    return difference, Text(one.verdict, probability(one.p), verdict=one.verdict)


def large(value: float, unit: str = "") -> str:
    """Returns a large quantity in thousands, millions, billions or more of a unit."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {name}{unit}"
    return f"{value:.0f} {unit}".strip() if math.isfinite(value) else NONE


def probability(p: float) -> str:
    """Returns a p value as it is written beside a verdict."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def short(value: object) -> str:
    """Returns a config's value, numbers without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _widths(plan: Plan) -> dict[str, int]:
    """Returns each method's width where these differ."""
    widths = {cell.method: cell.config["model"]["width"] for cell in plan.cells}
    return widths if len(set(widths.values())) > 1 else {}


def markdown(table: Table) -> str:
    """Returns a table in Markdown, its groups one below the other."""
    heads = [_plain(head, ", ") for head in table.heads]
    rows = [heads, ["---" if head.main in table.words else "---:" for head in table.heads]]
    for group, body in table.groups.items():
        rows += [[f"**{group}**", *[""] * (len(heads) - 1)]] if len(table.groups) > 1 else []
        rows += [[_plain(cell, ": " if cell.verdict else ", ") for cell in row] for row in body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text: Text, joint: str) -> str:
    return escape_markdown(joint.join(filter(None, [text.main, text.below])))


def escape_markdown(text: str) -> str:
    """Returns the text so that Markdown shows it as it is, in a table as well."""
    return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text)


def latex(table: Table, caption: str) -> str:
    r"""Returns a table for LaTeX with `booktabs`; verdicts are arrows beside the differences they are of."""
    kept = [i for i, head in enumerate(table.heads) if head.main not in ("Chosen", "Verdict")]
    body = [" & ".join(_tex(table.heads[i].main) for i in kept) + r" \\", r"\midrule"]
    for n, (group, rows) in enumerate(table.groups.items()):
        if len(table.groups) > 1:
            body += [r"\addlinespace"] * (n > 0)
            body += [rf"\multicolumn{{{len(kept)}}}{{l}}{{\emph{{{_tex(group)}}}}} \\"]
        for row in rows:
            body.append(" & ".join(_tex_cell(row, i) for i in kept) + r" \\")
    return "\n".join(
        [
            "% Needs \\usepackage{booktabs}.",
            r"\begin{table}",
            r"  \centering",
            r"  \small",
            rf"  \caption{{{_tex(caption)} $\uparrow$ better, $\downarrow$ worse, $\sim$ cannot tell.}}",
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
    interval = rf" {{\scriptsize [{', '.join(map(_tex, cell.ends))}]}}" if cell.ends else ""
    return f"{_tex(cell.main)}{interval}{' ' + ARROWS[verdict] if verdict else ''}"


def _tex(text: str) -> str:
    return "".join(SPECIAL.get(c, c) for c in text)
