"""The report of an ablation: claims first, then the evidence, in Markdown."""

from pathlib import Path

from mmfusion.analysis.ablation import Outcome
from mmfusion.analysis.plan import Plan


def write(outcome: Outcome, plan: Plan, directory: Path, command: str) -> None:
    lines = [
        "# Ablation",
        "",
        *([outcome.claims.none] if outcome.claims.none else [f"- {s.text}" for s in outcome.claims.statements]),
        "",
        command,
    ]
    (directory / "report.md").write_text("\n".join(lines))
