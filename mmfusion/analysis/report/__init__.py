"""The report of an ablation, which starts with its claims: Markdown, a self-contained HTML page and a LaTeX table."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from mmfusion.analysis.ablation.budget import TOLERANCE
from mmfusion.analysis.ablation.plan import Plan, Trial, fold_of
from mmfusion.analysis.claims.statement import Statement
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.report import aggregation, tables
from mmfusion.analysis.report.context import ReportContext
from mmfusion.analysis.report.sections import sections
from mmfusion.analysis.report.tables import FUSED, UNIMODAL, Table, Text, escape_markdown
from mmfusion.analysis.report.templates import template_environment
from mmfusion.files import write_text

EFFECTS = ("interaction", "modality")  # statements that test for an effect instead of comparing methods
LEAD = re.compile(r".{1,160}?(?:[:;]|(?= \()|\.(?= |$))")  # the first part of a claim, before its values
QUOTED = re.compile("`([^`]+)`")


class Claim(NamedTuple):
    """A statement: its verdict, the label of the verdict, and its text in two parts."""

    verdict: str
    label: str
    lead: str
    rest: str


def write(
    outcome: Outcome,
    plan: Plan,
    directory: Path,
    command: str,
    train: Callable[[Trial], str] = lambda trial: "",
    latex: bool = False,
) -> None:
    """Writes `report.md`, `report.html` and optionally `table.tex`, each atomically.

    Args:
      outcome: the ablation's outcome.
      plan: the ablation's plan.
      directory: the ablation's directory, which the report is written to.
      command: the command that ran the ablation.
      train: trial -> the command that trains it alone.
      latex: whether to also write the LaTeX table.
    """
    directory = Path(directory)
    context = ReportContext(outcome, plan, directory, tables.lines(outcome, plan))
    write_text(directory / "report.md", markdown(context, command, train))
    write_text(directory / "report.html", html(context, command, train))
    if latex:
        table = tables.methods(outcome, plan, context.groups, tables.compared_with(outcome))
        write_text(directory / "table.tex", tables.latex(table, f"{title(context)}. {_legend(context)}"))


def html(context: ReportContext, command: str, train: Callable[[Trial], str]) -> str:
    """Returns the report as one self-contained HTML page."""
    outcome, plan = context.outcome, context.plan
    environment = template_environment()
    environment.filters["quoted"] = lambda text: Markup(QUOTED.sub(r"<em>\1</em>", str(escape(text))))
    return environment.get_template("page.html").render(
        title=title(context),
        facts=facts(context, command),
        claims=[claim(statement) for statement in outcome.claims.statements],
        no_claims=outcome.claims.none,
        settings=settings(context, command),
        methods=tables.methods(outcome, plan, context.groups, tables.compared_with(outcome)),
        legend=_legend(context),
        sections=sections(context),
        errors=failures(outcome),
        command=_folded(command),
        made_with=made_with(context),
        runs=runs(context, train),
    )


def markdown(context: ReportContext, command: str, train: Callable[[Trial], str]) -> str:
    """Returns the report without its figures, in Markdown."""
    outcome, plan = context.outcome, context.plan
    claims = [claim(statement) for statement in outcome.claims.statements]
    parts = [
        f"# {escape_markdown(title(context))}",
        "\n".join(f"- {name}: {escape_markdown(value)}" for name, value in facts(context, command).items()),
        "## Claims",
        outcome.claims.none or "\n".join(f"- *{one.label}*: {escape_markdown(one.lead + one.rest)}" for one in claims),
        "## How methods are selected and compared",
        "\n".join(f"- {name}: {value}" for name, value in settings(context, command).items()),
        "## Methods",
        tables.markdown(tables.methods(outcome, plan, context.groups, ())),
        escape_markdown(_legend(context)),
    ]
    if tables.compared_with(outcome):
        parts += ["## Differences", tables.markdown(tables.differences(outcome))]
    if outcome.errors:
        failed = [f"- {escape_markdown(error)}: {', '.join(names)}" for error, names in failures(outcome).items()]
        parts += ["## Failed trials", "\n".join(failed)]
    parts += ["## Reproduce", f"```\n{_folded(command)}\n```"]
    parts += ["\n".join(f"- {name}: {escape_markdown('; '.join(v))}" for name, v in made_with(context).items())]
    parts += [tables.markdown(runs(context, train))]
    return "\n\n".join(parts) + "\n"


def title(context: ReportContext) -> str:
    """Returns the title, with the modalities and the dataset."""
    return f"Fusion of {' and '.join(sorted(context.modalities))} on {context.plan.trials[0].config['data']['name']}"


def facts(context: ReportContext, command: str) -> dict[str, str]:
    """Returns the facts below the title, by label."""
    outcome, trials = context.outcome, context.plan.trials
    config = trials[0].config
    methods, seeds = {trial.method for trial in trials}, {trial.config["seed"] for trial in trials}
    inputs = ", ".join(f"{m} ({o['kind']})" if m != o["kind"] else m for m, o in sorted(context.modalities.items()))
    found = {"Metric": f"test {outcome.metric}, {'higher' if outcome.higher else 'lower'} is better"}
    found["Data"] = f"{config['data']['name']}: {inputs} to {', '.join(config['data']['targets'])}"
    counts = [result["data"]["examples"] for result in outcome.results.values() if "examples" in result.get("data", {})]
    if counts:
        found["Examples"] = ", ".join(f"{count:,} {split}" for split, count in counts[0].items())
    names = {trial.name for trial in trials}
    number = len(outcome.errors.keys() & names) if outcome.tuning else len(outcome.errors)
    failed = f", {number} failed" if number else ""
    plural = "s" if len(seeds) > 1 else ""
    folds = len({fold_of(trial) for trial in trials} - {None})
    cells = f", {folds} folds" if folds else ""
    found["Runs"] = f"{len(trials)} trials of {len(methods)} methods{cells} and {len(seeds)} seed{plural}{failed}"
    found["Tuning"] = _tuning(context, len(outcome.errors) - number)
    found["Training"] = f"{config['steps']:,} steps, batch size {config['batch_size']}, {config['optim']['name']}"
    if path := _flag(command, "config"):
        found["Config"] = path
    return found


def _tuning(context: ReportContext, number_failed: int) -> str:
    """Returns how methods were tuned, and how many runs of the search failed."""
    tuned = context.outcome.tuning
    if tuned:
        failed = f", {number_failed} failed" if number_failed else ""
        numbers = sorted({chosen["settings"] for chosen in tuned["chosen"].values()})
        trials = " to ".join(map(str, numbers if len(numbers) < 2 else (numbers[0], numbers[-1])))
        return f"{trials} trials of each method, with {_seeds(tuned)}{failed}"
    if any(trial.hyperparameters for trial in context.plan.trials):
        return "methods were not tuned, but for the values of --vary, selected with the seeds of the scores"
    return "methods were not tuned: each has the config's own values"


def _seeds(tuned: Mapping[str, Any]) -> str:
    """Returns the seeds of the search."""
    first, *rest = tuned["seeds"]
    return f"seeds {first} to {rest[-1]}" if rest else f"seed {first}"


def settings(context: ReportContext, command: str) -> dict[str, str]:
    """Returns the search space, the matched budget, and the rule of comparison."""
    widths = sorted({trial.config["model"]["width"] for trial in context.plan.trials})
    counts = [result.parameters for result in context.outcome.methods if result.parameters]
    sizes = f", {min(counts):,} to {max(counts):,} parameters" if counts else ""
    width = f"widths {widths[0]} to {widths[-1]}" if len(widths) > 1 else f"width {widths[0]}"
    return {
        "Search space": _search_space(context),
        "Matched": f"{_matched(context.outcome, _flag(command, 'match'))}; {width}{sizes}",
        "Rule": context.outcome.claims.rule,
    }


def _search_space(context: ReportContext) -> str:
    if tuned := context.outcome.tuning:
        space = "; ".join(f"`{key}` {values}" for key, values in tuned["space"].items())
        return (
            f"{space}. Every method was trained with the same {tuned['trials']} settings, points of a scrambled Halton "
            f"sequence, with {_seeds(tuned)}; keys that a method does not have are ignored. The setting with the best "
            f"mean validation {tuned['metric']} was run with the seeds of the scores"
        )
    search_space: dict[str, dict[str, None]] = {}
    for trial in context.plan.trials:
        for key, value in trial.hyperparameters.items():
            search_space.setdefault(key, {})[tables.short(value)] = None
    searched = "; ".join(f"{key} in {', '.join(values)}" for key, values in search_space.items())
    return f"{searched}, selected for each method on validation" if searched else "none; one optimizer"


def _matched(outcome: Outcome, kind: str) -> str:
    if kind == "flops":
        return "FLOPs of one example's forward pass, by width"
    if kind != "parameters":
        return "nothing"
    references = [result.parameters for result in outcome.methods if result.is_reference and result.parameters]
    off = {r.method: r.parameters / references[0] - 1 for r in outcome.methods if references and r.parameters}
    far = [f"{method} {share:+.0%}" for method, share in off.items() if abs(share) > TOLERANCE]
    return "parameters, by width" + (f" (not within {TOLERANCE:.0%} of concat's: {', '.join(far)})" if far else "")


def claim(statement: Statement) -> Claim:
    """Returns the statement with the label of its verdict, and its text split before the values."""
    label = statement.verdict or "measured"
    if statement.about in EFFECTS and label == "better":
        label = "significant"
    found = LEAD.match(statement.text)
    lead = found[0] if found else ""
    return Claim(statement.verdict, label, lead, statement.text[len(lead) :])


def failures(outcome: Outcome) -> dict[str, list[str]]:
    """Returns the names of failed trials by error."""
    found: dict[str, list[str]] = {}
    for name, error in outcome.errors.items():
        found.setdefault(error, []).append(name)
    return found


def made_with(context: ReportContext) -> dict[str, list[str]]:
    """Returns the code digest, and the data, versions and devices of the results."""
    return {"Code": [f"digest {context.plan.code}"], **aggregation.provenance(context.outcome)}


def runs(context: ReportContext, train: Callable[[Trial], str]) -> Table:
    """Returns the command that trains each method's first run; other runs differ in seed and fold only."""
    rows: dict[str, list[tuple[Text, ...]]] = {}
    for group, lines in context.groups.items():
        for line in lines if group in (FUSED, UNIMODAL) else ():
            command = train(context.trials[line.result.trials[0]]) if line.result.trials else tables.NONE
            rows.setdefault(group, []).append((Text(line.result.method), Text(command)))
    heads = (Text("Method"), Text("Command", "of its first run; give it a --workdir of its own"))
    return Table(heads, rows, text_columns=("Method", "Command"))


def _legend(context: ReportContext) -> str:
    """Returns the legend of the main table."""
    better = "highest" if context.outcome.higher else "lowest"
    sign = "" if context.outcome.higher else " Differences are signed so that positive is better."
    return (
        f"Test {context.outcome.metric}: mean over {context.over} and {context.interval}; {better} first. Differences "
        f"are paired by {context.over[:-1]}; p values are corrected for the family.{sign}"
    )


def _folded(command: str) -> str:
    """Returns a command with one flag per line, joined by backslashes."""
    return command.replace(" --", " \\\n  --")


def _flag(command: str, name: str) -> str:
    found = re.search(rf"--{name}[= ](\S+)", command)
    return found[1] if found else ""
