"""Shows the progress of an ablation: one row per method, one mark per trial, and the remaining time."""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mmfusion import config as configs
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.budget import TOLERANCE, Match
from mmfusion.analysis.ablation.plan import Trial
from mmfusion.analysis.ablation.runner import Stage
from mmfusion.analysis.claims.statement import Statement
from mmfusion.analysis.outcome import Outcome
from mmfusion.tracking.logger import duration

DONE, FAILED, RUNNING, WAITING = ("●", "green"), ("✕", "red"), ("◐", "yellow"), ("·", "dim")


def show(
    title: str, trials: Sequence[Trial], directory: Path, events: Iterator[tuple[Trial, str]], stage: Stage
) -> None:
    """Shows the trials as they finish, as a live table on a terminal, otherwise as one line per trial.

    Args:
      title: name of the stage, `tune`, `train` or `probe`.
      trials: all trials.
      directory: the ablation's directory.
      events: each finished trial, with "" or its error.
      stage: the stage.
    """
    if not trials:
        return
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    board = _Board(title, trials, directory, stage)
    if not console.is_terminal:
        for trial, error in events:
            console.print(board.finished(trial, error))
        console.print(board.summary())
        return
    with Live(
        console=console, get_renderable=lambda: board.table(console.height), refresh_per_second=1, transient=True
    ) as live:
        for trial, error in events:
            line = board.finished(trial, error)
            if error:
                live.console.print(line)
    console.print(board.summary())


class _Board:
    """The state of the trials, read from their files and events."""

    def __init__(self, title: str, trials: Sequence[Trial], directory: Path, stage: Stage):
        self._title, self._trials, self._directory, self._stage = title, trials, directory, stage
        self._waiting = {trial.name: trial for trial in trials if not runner.is_done(directory, trial, stage.output)}
        self._failed: set[str] = set()
        self._scores: dict[str, float | None] = {}
        self._start = time.monotonic()
        self._todo = sum(self._left(trial) for trial in self._waiting.values())
        for trial in trials:
            if trial.name not in self._waiting:
                self._note(trial)

    def finished(self, trial: Trial, error: str) -> Text:
        """Marks a trial as finished and returns a line about it."""
        self._waiting.pop(trial.name, None)  # another worker may have finished it before this table began
        number = f"{len(self._trials) - len(self._waiting)}/{len(self._trials)}"
        line = Text(f"{self._title:<8} {number:>8}  {trial.name}")
        if error:
            self._failed.add(trial.name)
            line.append(f"  failed: {error}", style="red")
        else:
            self._note(trial)
            if self._stage is runner.TRAINING:
                line.append(f"  valid {self._metric} {_number(self._scores[trial.name])}", style="cyan")
        return line

    def summary(self) -> Text:
        """Returns a line with the numbers of finished and failed trials and the elapsed time."""
        done = len(self._trials) - len(self._waiting)
        text = Text(f"{self._title:<8} {done} of {len(self._trials)} trials", style="bold")
        if self._failed:
            text.append(f", {len(self._failed)} failed", style="red")
        text.append(f"  {duration(time.monotonic() - self._start)}", style="dim")
        return text

    def table(self, height: int) -> Group:
        """Returns the live table; if not all methods fit, running methods have priority over finished ones."""
        left = {name: self._left(trial) for name, trial in self._waiting.items()}
        methods: dict[str, list[Trial]] = {}
        for trial in self._trials:
            methods.setdefault(trial.method, []).append(trial)

        def rank(method: str) -> int:
            states = {self._state(trial, left) for trial in methods[method]}
            return 0 if RUNNING in states else 1 if WAITING not in states else 2

        shown = sorted(methods, key=rank)[: max(height - 5, 3)]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head in ("method", "trials", f"mean valid {self._metric}", ""):
            table.add_column(head, no_wrap=True)
        for method in methods:
            if method in shown:
                trials = methods[method]
                marks = Text.assemble(*(self._state(trial, left) for trial in trials))
                scores = [s for trial in trials if (s := self._scores.get(trial.name)) is not None]
                mean = f"{statistics.fmean(scores):.4f}" if scores else ""
                running = [1 - left[trial.name] for trial in trials if self._state(trial, left) == RUNNING]
                bar = ProgressBar(1.0, statistics.fmean(running), 24, complete_style="cyan") if running else ""
                table.add_row(method, marks, mean, bar)
        text = self.summary()
        if (rest := sum(left.values())) < self._todo:
            seconds = (time.monotonic() - self._start) * rest / (self._todo - rest)
            text.append(f", {duration(seconds)} left", style="dim")
        if len(shown) < len(methods):
            text.append(f"  ({len(methods) - len(shown)} more methods)", style="dim")
        return Group(table, "", text)

    @property
    def _metric(self) -> str:
        return self._trials[0].config["select"]

    def _note(self, trial: Trial) -> None:
        result = configs.read_json(runner.trial_directory(self._directory, trial) / runner.RESULT)
        self._scores[trial.name] = result["valid"].get(self._metric)

    def _state(self, trial: Trial, left: Mapping[str, float]) -> tuple[str, str]:
        if trial.name in self._failed:
            return FAILED
        return DONE if trial.name not in left else RUNNING if left[trial.name] < 1 else WAITING

    def _left(self, trial: Trial) -> float:
        """Returns the remaining share of a trial; stages other than training have no partial progress."""
        return 1 - _step(self._directory, trial) / trial.config["steps"] if self._stage is runner.TRAINING else 1.0


def _number(score: float | None) -> str:
    return "undefined" if score is None else f"{score:.4f}"


def _step(directory: Path, trial: Trial) -> int:
    """Returns the last logged step of a trial, or 0."""
    path = runner.trial_directory(directory, trial) / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError):
        return 0


def waiting(unfinished: int, trials: int, then: str) -> None:
    """Prints the number of trials that other shards have not finished, and what happens then."""
    print(f"{unfinished} of {trials} trials are left to other shards; {then}")


def matched(matches: Mapping[str, Match], kind: str, target: int) -> None:
    """Prints the matched widths of the methods, and each cost's deviation from the target."""
    table = Table("method", "width", kind, "off", title=f"Widths for equal {kind}", title_justify="left")
    for name, match in matches.items():
        off = match.cost / target - 1
        style = "yellow" if abs(off) > TOLERANCE else ""
        table.add_row(name, str(match.width), f"{match.cost:,}", Text(f"{off:+.1%}", style=style))
    Console(width=None if Console().is_terminal else 100, markup=False, emoji=False).print(table)


def conclusion(outcome: Outcome, directory: Path | str) -> None:
    """Prints the claims of an ablation and the path of its report."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.print()
    if outcome.claims.none:
        console.print(Text(outcome.claims.none, style="yellow"))
    _print_statements(console, outcome.claims.statements)
    for name, error in outcome.errors.items():
        console.print(Text(f"{name} failed: {error}", style="red"))
    console.print(f"\n{directory}/report.html", soft_wrap=True)


def study_conclusion(found: Sequence[Statement], directory: Path) -> None:
    """Prints what a study says and the path of its report."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.print()
    _print_statements(console, found)
    console.print(f"\n{directory}/study.html", soft_wrap=True)


def _print_statements(console: Console, statements: Sequence[Statement]) -> None:
    for statement in statements:
        colour = {"better": "green", "worse": "red"}.get(statement.verdict, "")
        row = Table.grid(padding=(0, 1))
        row.add_row("•", Text(statement.text, style=colour))
        console.print(row)
