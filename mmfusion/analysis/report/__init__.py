"""The report of an ablation, claims first: as Markdown, as one page that needs no network, and a table for LaTeX."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape

from mmfusion.analysis.ablate import Outcome
from mmfusion.analysis.ablation.budget import CLOSE
from mmfusion.analysis.ablation.plan import Cell, Plan
from mmfusion.analysis.claims.claims import Statement
from mmfusion.analysis.report import evidence, tables
from mmfusion.analysis.report.sections import sections
from mmfusion.analysis.report.study import Study
from mmfusion.analysis.report.tables import ALONE, FUSED, Table, Text, escape_markdown
from mmfusion.files import write_text

SHOWN = ("interaction", "modality")  # statements of what is there, not of what is better
LEAD = re.compile(r"[^:;]{1,140}[:;]")  # of a claim: what it says, before the numbers
QUOTED = re.compile("`([^`]+)`")


class Claim(NamedTuple):
    """A statement: its verdict, the word for it, and its text in two parts."""

    verdict: str
    word: str
    lead: str
    rest: str


def write(
    outcome: Outcome,
    plan: Plan,
    directory: Path,
    command: str,
    train: Callable[[Cell], str] = lambda cell: "",
    latex: bool = False,
) -> None:
    """Writes `report.md`, `report.html` and, if asked for, `table.tex`, each whole or not at all.

    Args:
      outcome: what the ablation found.
      plan: of the ablation.
      directory: that it is in; the report is left there.
      command: that ran it.
      train: a cell -> the command that trains it by itself.
      latex: whether to write the table for LaTeX, too.
    """
    directory = Path(directory)
    study = Study(outcome, plan, directory, tables.lines(outcome, plan))
    write_text(directory / "report.md", markdown(study, command, train))
    write_text(directory / "report.html", html(study, command, train))
    if latex:
        table = tables.methods(outcome, plan, study.groups, tables.compared_with(outcome))
        write_text(directory / "table.tex", tables.latex(table, f"{title(study)}. {_legend(study)}"))


def html(study: Study, command: str, train: Callable[[Cell], str]) -> str:
    """Returns the report as one page: no address in it leads to anything outside of it."""
    outcome, plan = study.outcome, study.plan
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["quoted"] = lambda text: Markup(QUOTED.sub(r"<em>\1</em>", str(escape(text))))
    return environment.get_template("page.html").render(
        title=title(study),
        facts=facts(study, command),
        claims=[claim(statement) for statement in outcome.claims.statements],
        no_claims=outcome.claims.none,
        settings=settings(study, command),
        methods=tables.methods(outcome, plan, study.groups, tables.compared_with(outcome)),
        legend=_legend(study),
        sections=sections(study),
        errors=failures(outcome),
        command=_folded(command),
        made_with=made_with(study),
        runs=runs(study, train),
    )


def markdown(study: Study, command: str, train: Callable[[Cell], str]) -> str:
    """Returns the report without its figures, in Markdown."""
    outcome, plan = study.outcome, study.plan
    claims = [claim(statement) for statement in outcome.claims.statements]
    parts = [
        f"# {escape_markdown(title(study))}",
        "\n".join(f"- {what}: {escape_markdown(value)}" for what, value in facts(study, command).items()),
        "## Claims",
        outcome.claims.none or "\n".join(f"- *{one.word}*: {escape_markdown(one.lead + one.rest)}" for one in claims),
        "## How methods are chosen",
        "\n".join(f"- {what}: {value}" for what, value in settings(study, command).items()),
        "## Methods",
        tables.markdown(tables.methods(outcome, plan, study.groups, ())),
        escape_markdown(_legend(study)),
    ]
    if tables.compared_with(outcome):
        parts += ["## Differences", tables.markdown(tables.differences(outcome))]
    if outcome.errors:
        failed = [f"- {escape_markdown(error)}: {', '.join(names)}" for error, names in failures(outcome).items()]
        parts += ["## Failed cells", "\n".join(failed)]
    parts += ["## Reproduce", f"```\n{_folded(command)}\n```"]
    parts += ["\n".join(f"- {what}: {escape_markdown('; '.join(v))}" for what, v in made_with(study).items())]
    parts += [tables.markdown(runs(study, train))]
    return "\n\n".join(parts) + "\n"


def title(study: Study) -> str:
    """Returns what the ablation is of."""
    return f"Fusion of {' and '.join(sorted(study.modalities))} on {study.plan.cells[0].config['data']['name']}"


def facts(study: Study, command: str) -> dict[str, str]:
    """Returns what a reader has to know first, by name."""
    outcome, cells = study.outcome, study.plan.cells
    config = cells[0].config
    methods, seeds = {cell.method for cell in cells}, {cell.config["seed"] for cell in cells}
    inputs = ", ".join(f"{m} ({o['kind']})" if m != o["kind"] else m for m, o in sorted(study.modalities.items()))
    found = {"Metric": f"test {outcome.metric}, {'more' if outcome.higher else 'less'} is better"}
    found["Data"] = f"{config['data']['name']}: {inputs} to {', '.join(config['data']['targets'])}"
    examples = next(iter(outcome.results.values()), {}).get("data", {}).get("examples")
    if examples:
        found["Examples"] = ", ".join(f"{count:,} {split}" for split, count in examples.items())
    failed = f", {len(outcome.errors)} failed" if outcome.errors else ""
    plural = "s" if len(seeds) > 1 else ""
    found["Runs"] = f"{len(cells)} cells of {len(methods)} methods and {len(seeds)} seed{plural}{failed}"
    found["Training"] = f"{config['steps']:,} steps of {config['batch_size']} examples, {config['optim']['name']}"
    if named := _flag(command, "config"):
        found["Config"] = named
    return found


def settings(study: Study, command: str) -> dict[str, str]:
    """Says what was varied and chosen on validation, what was made equal, and by which rule methods are told apart."""
    tried: dict[str, dict[str, None]] = {}
    for cell in study.plan.cells:
        for key, value in cell.tried.items():
            tried.setdefault(key, {})[tables.short(value)] = None
    varied = "; ".join(f"{key} in {', '.join(values)}" for key, values in tried.items())
    widths = sorted({cell.config["model"]["width"] for cell in study.plan.cells})
    counts = [row.parameters for row in study.outcome.rows if row.parameters]
    sizes = f", and {min(counts):,} to {max(counts):,} parameters" if counts else ""
    width = f"widths of {widths[0]} to {widths[-1]}" if len(widths) > 1 else f"a width of {widths[0]}"
    kind = _flag(command, "match").replace("none", "")
    matched = {
        "": "nothing",
        "parameters": "parameters, by width",
        "flops": "FLOPs of one example's forward pass, by width",
    }[kind]
    reference = next((row.parameters for row in study.outcome.rows if row.is_reference), None)
    if kind == "parameters" and reference:
        off = {row.method: row.parameters / reference - 1 for row in study.outcome.rows if row.parameters}
        far = [f"{method} {share:+.0%}" for method, share in off.items() if abs(share) > CLOSE]
        matched += f" (not within {CLOSE:.0%} of concat's: {', '.join(far)})" if far else ""
    return {
        "Varied": f"{varied}, for each method chosen on validation" if varied else "nothing; all have one optimizer",
        "Matched": f"{matched}; methods have {width}{sizes}",
        "Rule": study.outcome.claims.rule,
    }


def claim(statement: Statement) -> Claim:
    """Returns a statement for a reader: a word for its verdict, and what it says apart from its numbers."""
    word = statement.verdict or "measured"
    if statement.about in SHOWN and word == "better":
        word = "shown"
    found = LEAD.match(statement.text)
    lead = found[0] if found else ""
    return Claim(statement.verdict, word, lead, statement.text[len(lead) :])


def failures(outcome: Outcome) -> dict[str, list[str]]:
    """Returns the cells that failed, by their error."""
    found: dict[str, list[str]] = {}
    for name, error in outcome.errors.items():
        found.setdefault(error, []).append(name)
    return found


def made_with(study: Study) -> dict[str, list[str]]:
    """Returns the digest of the code, and the data, versions and devices of the results."""
    return {"Code": [f"digest {study.plan.code}"], **evidence.provenance(study.outcome)}


def runs(study: Study, train: Callable[[Cell], str]) -> Table:
    """Returns the command that trains each row's first run; the others differ in the seed."""
    rows: dict[str, list[tuple[Text, ...]]] = {}
    for group, lines in study.groups.items():
        for line in lines if group in (FUSED, ALONE) else ():
            how = train(study.cells[line.row.runs[0]]) if line.row.runs else tables.NONE
            rows.setdefault(group, []).append((Text(line.row.method), Text(how)))
    heads = (Text("Method"), Text("Command", "of its first seed; with a --workdir of its own"))
    return Table(heads, rows, words=("Method", "Command"))


def _legend(study: Study) -> str:
    """Says how the main table is to be read."""
    better = "highest" if study.outcome.higher else "lowest"
    turned = "" if study.outcome.higher else " Differences are turned so that more is better."
    return (
        f"Test {study.outcome.metric}: mean over seeds, 95 % BCa bootstrap interval; {better} first. Differences are "
        f"paired by seed, p values corrected by Holm's method.{turned}"
    )


def _folded(command: str) -> str:
    """Returns a command with a flag a line, as a shell reads it."""
    return command.replace(" --", " \\\n  --")


def _flag(command: str, name: str) -> str:
    found = re.search(rf"--{name}[= ](\S+)", command)
    return found[1] if found else ""
