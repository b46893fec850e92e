"""Shows the progress of an ablation: a row per method, a mark per cell, and the time left."""

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
from mmfusion.analysis.ablate import Outcome
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.budget import CLOSE, Match
from mmfusion.analysis.ablation.plan import Cell
from mmfusion.analysis.ablation.runner import Work
from mmfusion.tracking.logger import duration

DONE, FAILED, RUNNING, WAITING = ("●", "green"), ("✕", "red"), ("◐", "yellow"), ("·", "dim")


def show(title: str, cells: Sequence[Cell], directory: Path, events: Iterator[tuple[Cell, str]], work: Work) -> None:
    """Shows the cells as they finish: a live table on a terminal, else a line per cell.

    Args:
      title: what is done, `train` or `examine`.
      cells: all cells.
      directory: the ablation's directory.
      events: each cell that is finished, with "" or its error.
      work: the work that is done.
    """
    if not cells:
        return
    console = Console(highlight=False, soft_wrap=True)
    board = _Board(title, cells, directory, work)
    if not console.is_terminal:
        for cell, error in events:
            console.print(board.finished(cell, error))
        console.print(board.summary())
        return
    with Live(
        console=console, get_renderable=lambda: board.table(console.height), refresh_per_second=1, transient=True
    ) as live:
        for cell, error in events:
            line = board.finished(cell, error)
            if error:
                live.console.print(line)
    console.print(board.summary())


class _Board:
    """The state of the cells, from their files and from events."""

    def __init__(self, title: str, cells: Sequence[Cell], directory: Path, work: Work):
        self._title, self._cells, self._directory, self._work = title, cells, directory, work
        self._waiting = {cell.name: cell for cell in cells if not runner.is_done(directory, cell, work.leaves)}
        self._failed: set[str] = set()
        self._scores: dict[str, float | None] = {}
        self._start = time.monotonic()
        self._todo = sum(self._left(cell) for cell in self._waiting.values())
        for cell in cells:
            if cell.name not in self._waiting:
                self._note(cell)

    def finished(self, cell: Cell, error: str) -> Text:
        """Marks a cell as finished, and returns a line about it."""
        del self._waiting[cell.name]
        number = f"{len(self._cells) - len(self._waiting)}/{len(self._cells)}"
        line = Text(f"{self._title:<8} {number:>8}  {cell.name}")
        if error:
            self._failed.add(cell.name)
            line.append(f"  failed: {error}", style="red")
        else:
            self._note(cell)
            if self._work is runner.TRAINING:
                line.append(f"  valid {self._metric} {_number(self._scores[cell.name])}", style="cyan")
        return line

    def summary(self) -> Text:
        """Returns the numbers of finished and failed cells, and the elapsed time."""
        done = len(self._cells) - len(self._waiting)
        text = Text(f"{self._title:<8} {done} of {len(self._cells)} cells", style="bold")
        if self._failed:
            text.append(f", {len(self._failed)} failed", style="red")
        text.append(f"  {duration(time.monotonic() - self._start)}", style="dim")
        return text

    def table(self, height: int) -> Group:
        """Returns the live table of the methods that fit: running ones first, then finished ones."""
        left = {name: self._left(cell) for name, cell in self._waiting.items()}
        methods: dict[str, list[Cell]] = {}
        for cell in self._cells:
            methods.setdefault(cell.method, []).append(cell)

        def rank(method: str) -> int:
            states = {self._state(cell, left) for cell in methods[method]}
            return 0 if RUNNING in states else 1 if WAITING not in states else 2

        shown = sorted(methods, key=rank)[: max(height - 5, 3)]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for head in ("method", "cells", f"mean valid {self._metric}", ""):
            table.add_column(head, no_wrap=True)
        for method in methods:
            if method in shown:
                cells = methods[method]
                marks = Text.assemble(*(self._state(cell, left) for cell in cells))
                scores = [s for cell in cells if (s := self._scores.get(cell.name)) is not None]
                mean = f"{statistics.fmean(scores):.4f}" if scores else ""
                running = [1 - left[cell.name] for cell in cells if self._state(cell, left) == RUNNING]
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
        return self._cells[0].config["select"]

    def _note(self, cell: Cell) -> None:
        result = configs.read_json(runner.cell_directory(self._directory, cell) / runner.RESULT)
        self._scores[cell.name] = result["valid"].get(self._metric)

    def _state(self, cell: Cell, left: Mapping[str, float]) -> tuple[str, str]:
        if cell.name in self._failed:
            return FAILED
        return DONE if cell.name not in left else RUNNING if left[cell.name] < 1 else WAITING

    def _left(self, cell: Cell) -> float:
        """Returns the share of a cell that is not done yet; work other than training is done as a whole."""
        return 1 - _step(self._directory, cell) / cell.config["steps"] if self._work is runner.TRAINING else 1.0


def _number(score: float | None) -> str:
    return "undefined" if score is None else f"{score:.4f}"


def _step(directory: Path, cell: Cell) -> int:
    """Returns the last step that a cell has logged, or 0."""
    path = runner.cell_directory(directory, cell) / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError):
        return 0


def waiting(unfinished: int, cells: int) -> None:
    """Prints how many cells other shards have yet to finish."""
    print(f"{unfinished} of {cells} cells are left to other shards; the last one writes the report")


def matched(matches: Mapping[str, Match], kind: str, target: int) -> None:
    """Prints the widths at which the methods cost the same, and how far each is off the target."""
    table = Table("method", "width", kind, "off", title=f"Widths for equal {kind}", title_justify="left")
    for name, one in matches.items():
        off = one.cost / target - 1
        style = "yellow" if abs(off) > CLOSE else ""
        table.add_row(name, str(one.width), f"{one.cost:,}", Text(f"{off:+.1%}", style=style))
    Console(width=None if Console().is_terminal else 100).print(table)


def conclusion(outcome: Outcome, directory: Path | str) -> None:
    """Prints the claims and the path of the report."""
    console = Console(highlight=False)
    console.print()
    if outcome.claims.none:
        console.print(Text(outcome.claims.none, style="yellow"))
    for statement in outcome.claims.statements:
        colour = {"better": "green", "worse": "red"}.get(statement.verdict, "")
        row = Table.grid(padding=(0, 1))
        row.add_row("•", Text(statement.text, style=colour))
        console.print(row)
    for name, error in outcome.errors.items():
        console.print(Text(f"{name} failed: {error}", style="red"))
    console.print(f"\n{directory}/report.html", soft_wrap=True)
