"""A study from its configs to its report: an ablation per dataset, and the aggregates over those that are finished."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.run_ablation import Execution, Request, Silent, make_plan, run_ablation
from mmfusion.analysis.study import page
from mmfusion.analysis.study.statements import statements
from mmfusion.analysis.study.summary import Summary, content, summarise
from mmfusion.errors import UserError
from mmfusion.files import write_json


@dataclasses.dataclass(frozen=True)
class Entry:
    """A dataset of a study.

    Attributes:
      request: its ablation.
      execution: where and how it runs; its directory is that of the study and the dataset's name.
    """

    request: Request
    execution: Execution


def run_study(
    entries: Mapping[str, Entry],
    directory: Path,
    command: str = "",
    tune: int = 0,
    started: Callable[[str], None] = print,
) -> Summary:
    """Runs or resumes the ablations one after another, and writes the report of those finished after each.

    Args:
      entries: dataset -> its ablation.
      directory: of the study; each ablation has a directory of its name in it.
      command: the command line, for the report.
      tune: the number of trials that the requests tune each method with.
      started: called with a line as each ablation starts.

    Raises:
      UserError: an ablation cannot run, before any of them starts, or no dataset has a score.
      Preempted: see `run_ablation`.
    """
    for entry in entries.values():
        planned, *_ = make_plan(entry.request, Silent())
        if any(trial.config["data"]["folds"] or trial.config["data"]["fold_by"] for trial in planned.trials[:1]):
            message = "a study needs one test split per dataset: runs of folds are not independent"
            raise UserError(message, path="--config.data.folds", value=planned.trials[0].config["data"]["folds"])
    outcomes: dict[str, Outcome] = {}
    summary = None
    for name, entry in entries.items():
        started(f"[{len(outcomes) + 1}/{len(entries)}] {name}")
        outcome = run_ablation(entry.request, entry.execution)
        assert outcome is not None  # None only with other shards
        outcomes[name] = outcome
        summary = conclude(outcomes, len(entries), directory, command, entry.request.equivalence, tune)
    if summary is None:
        raise UserError("no run of a fusion strategy has a score on any dataset", path=str(directory))
    return summary


def conclude(
    outcomes: Mapping[str, Outcome],
    planned: int,
    directory: Path,
    command: str = "",
    equivalence: float = 0.01,
    tune: int = 0,
) -> Summary | None:
    """Writes `study.json`, `study.md` and `study.html` of the finished ablations; see `summarise` for arguments."""
    summary = summarise(outcomes, planned, equivalence, tune)
    if summary is not None:
        found = [dataclasses.asdict(statement) for statement in statements(summary)]
        write_json(directory / "study.json", {**content(summary), "statements": found})
        page.write(summary, directory, command)
    return summary
