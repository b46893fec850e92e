"""What an ablation shows while it runs: finished cells, those under way with their steps, and the time left."""

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
from mmfusion.analysis import runner
from mmfusion.analysis.ablation import Outcome
from mmfusion.analysis.budget import CLOSE, Match
from mmfusion.analysis.plan import Cell
from mmfusion.analysis.runner import Work
from mmfusion.logger import duration

RECENT = 8  # finished cells that stay in sight


def show(what: str, cells: Sequence[Cell], directory: Path, events: Iterator[tuple[Cell, str]], work: Work) -> None:
    """Shows the cells as they finish: a live table on a terminal, elsewhere a line each.

    Args:
      what: is done with them.
      cells: all of them.
      directory: of the ablation.
      events: each cell that finishes, with "" or its error.
      work: that is done.
    """
    console = Console(highlight=False, soft_wrap=True)
    board = _Board(what, cells, directory, work)
    if not console.is_terminal:
        console.print(board.summary())
        for cell, error in events:
            console.print(board.finished(cell, error))
        return
    with Live(console=console, get_renderable=board.render, refresh_per_second=1) as live:
        for cell, error in events:
            line = board.finished(cell, error)
            if error:
                live.console.print(line)
    console.print(board.summary())


class _Board:
    """The state of the cells, as far as files and finished ones tell."""

    def __init__(self, what: str, cells: Sequence[Cell], directory: Path, work: Work):
        self._what, self._cells, self._directory, self._work = what, cells, directory, work
        self._waiting = {cell.name: cell for cell in cells if not runner.is_done(directory, cell, work.leaves)}
        self._begun, self._failed, self._lines = time.monotonic(), 0, []
        self._todo = sum(self._left(cell) for cell in self._waiting.values())

    def _left(self, cell: Cell) -> float:
        """Returns the share of a cell that is still to be done; what is no training is done as a whole."""
        return 1 - _step(self._directory, cell) / cell.config["steps"] if self._work is runner.TRAINING else 1.0

    def finished(self, cell: Cell, error: str) -> Text:
        """Takes a cell off the list, and returns a line about it."""
        del self._waiting[cell.name]
        self._failed += bool(error)
        number = f"{len(self._cells) - len(self._waiting)}/{len(self._cells)}"
        line = Text(f"{self._what} {number:>9}  {cell.name}  ")
        if error:
            line.append(f"failed: {error}", style="red")
        else:
            result = configs.read_json(runner.cell_directory(self._directory, cell) / runner.RESULT)
            score = result["valid"].get(result["select"])
            line.append(f"valid {result['select']} {'undefined' if score is None else f'{score:.4f}'}", style="cyan")
        self._lines.append(line)
        return line

    def summary(self) -> Text:
        """Returns how many are done, failed and left, and the time."""
        done = len(self._cells) - len(self._waiting)
        text = Text(f"{self._what}  {done} of {len(self._cells)} cells", style="bold")
        if self._failed:
            text.append(f", {self._failed} failed", style="red")
        text.append(f"  {duration(time.monotonic() - self._begun)}", style="dim")
        return text

    def render(self) -> Group:
        """Returns the live table."""
        left = {name: self._left(cell) for name, cell in self._waiting.items()}
        table = Table.grid(padding=(0, 2))
        for name in [name for name in left if left[name] < 1][:RECENT]:
            table.add_row(name, ProgressBar(total=1.0, completed=1 - left[name], width=30), f"{1 - left[name]:.0%}")
        text = self.summary()
        if (rest := sum(left.values())) < self._todo:
            seconds = (time.monotonic() - self._begun) * rest / (self._todo - rest)
            text.append(f", {duration(seconds)} left", style="dim")
        return Group(*self._lines[-RECENT:], table, text)


def _step(directory: Path, cell: Cell) -> int:
    """Returns the last step that a cell has logged; 0 before it has."""
    path = runner.cell_directory(directory, cell) / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, ValueError, KeyError):
        return 0


def matches(found: Mapping[str, Match], kind: str) -> None:
    """Prints the widths at which the methods cost the same, and which of them could not be brought near."""
    target = statistics.median(one.cost for one in found.values())
    table = Table("method", "width", kind, "off", title=f"Widths for equal {kind}", title_justify="left")
    for name, one in found.items():
        off = one.cost / target - 1
        table.add_row(
            name, str(one.width), f"{one.cost:,}", Text(f"{off:+.1%}", style="yellow" if abs(off) > CLOSE else "")
        )
    Console(width=None if Console().is_terminal else 100).print(table)


def conclusion(outcome: Outcome, directory: Path) -> None:
    """Prints the claims, and where the report is."""
    console = Console(highlight=False, soft_wrap=True)
    console.print()
    if outcome.claims.none:
        console.print(Text(outcome.claims.none, style="yellow"))
    for statement in outcome.claims.statements:
        colour = {"better": "green", "worse": "red"}.get(statement.verdict, "")
        console.print(Text("• ").append(statement.text, style=colour))
    for name, error in outcome.errors.items():
        console.print(Text(f"{name} failed: {error}", style="red"))
    console.print(f"\n{directory / 'report.html'}")
