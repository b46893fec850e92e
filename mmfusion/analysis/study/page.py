"""The report of a study: Markdown, and a self-contained HTML page that links to the reports of its ablations."""

from pathlib import Path

from markupsafe import Markup, escape

from mmfusion.analysis import report
from mmfusion.analysis.report import aggregation, tables
from mmfusion.analysis.report.tables import escape_markdown
from mmfusion.analysis.report.templates import template_environment
from mmfusion.analysis.study.sections import datasets, sections
from mmfusion.analysis.study.statements import rule, statements
from mmfusion.analysis.study.summary import Summary
from mmfusion.files import write_text


def write(summary: Summary, directory: Path, command: str) -> None:
    """Writes `study.md` and `study.html`, each atomically."""
    write_text(directory / "study.md", markdown(summary, command))
    write_text(directory / "study.html", html(summary, command))


def html(summary: Summary, command: str) -> str:
    """Returns the report as one self-contained HTML page."""
    environment = template_environment()
    environment.filters["quoted"] = lambda text: Markup(report.QUOTED.sub(r"<em>\1</em>", str(escape(text))))
    return environment.get_template("study.html").render(
        title=title(summary),
        facts=facts(summary),
        claims=[report.claim(statement) for statement in statements(summary)],
        rule=rule(summary),
        datasets=datasets(summary),
        links={dataset.name: f"{dataset.name}/report.html" for dataset in summary.datasets},
        sections=sections(summary),
        command=command.replace(" --", " \\\n  --"),
        made_with=made_with(summary),
    )


def markdown(summary: Summary, command: str) -> str:
    """Returns the report without its figures, in Markdown."""
    found = [report.claim(statement) for statement in statements(summary)]
    links = ", ".join(f"[{escape_markdown(d.name)}](<{d.name}/report.md>)" for d in summary.datasets)
    parts = [
        f"# {escape_markdown(title(summary))}",
        "\n".join(f"- {name}: {escape_markdown(value)}" for name, value in facts(summary).items()),
        "## What it says",
        "\n".join(f"- *{one.label}*: {escape_markdown(one.lead + one.rest)}" for one in found),
        "## How methods are compared",
        rule(summary),
        "## Datasets",
        f"Reports with claims: {links}.",
        tables.markdown(datasets(summary)),
    ]
    for name, section in sections(summary).items():
        if section.table:
            parts += [f"## {name}", tables.markdown(section.table)]
    parts += ["## Reproduce", "```\n" + command.replace(" --", " \\\n  --") + "\n```"]
    parts += ["\n".join(f"- {name}: {escape_markdown('; '.join(v))}" for name, v in made_with(summary).items())]
    return "\n\n".join(parts) + "\n"


def title(summary: Summary) -> str:
    """Returns the title, with the numbers of strategies and datasets."""
    strategies, finished = len(summary.strategies), len(summary.datasets)
    return (
        f"{strategies} fusion strateg{'y' if strategies == 1 else 'ies'} on {finished} dataset{'s' * (finished != 1)}"
    )


def facts(summary: Summary) -> dict[str, str]:
    """Returns the facts below the title, by label."""
    done = len(summary.datasets) + len(summary.without)
    floors = [row.method for row in summary.rows if not row.is_strategy]
    seeds = sorted({len(dataset.seeds) for dataset in summary.datasets})
    runs = sum(len(dataset.outcome.results) for dataset in summary.datasets)
    failed = sum(len(dataset.outcome.errors) for dataset in summary.datasets)
    found = {
        "Datasets": f"{done} of {summary.planned} finished",
        "Methods": f"{len(summary.strategies)} strategies" + (f"; {', '.join(floors)}" if floors else ""),
        "Runs": f"{runs} runs" + (f", {failed} failed" if failed else ""),
        "Seeds": " to ".join(dict.fromkeys(map(str, (seeds[0], seeds[-1])))) + " of each method and dataset",
    }
    found["Tuning"] = f"{summary.tune} trials of each method" if summary.tune else "none"
    return found


def made_with(summary: Summary) -> dict[str, list[str]]:
    """Returns the versions and devices of the results."""
    found: dict[str, dict[str, None]] = {}
    for dataset in summary.datasets:
        for label, values in aggregation.provenance(dataset.outcome).items():
            found.setdefault(label, {}).update(dict.fromkeys(value.partition(" (")[0] for value in values))
    return {label: list(values) for label, values in found.items()}
