"""Progress of work on rows: a bar, or without a terminal a line now and then."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

LINE_SECONDS = 30.0  # between lines of progress, without a terminal


@contextlib.contextmanager
def progress(verb: str, what: str, total: int, left: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that is called with the number of rows that have just been done, in any thread.

    Args:
      verb: what is done, `decoding`.
      what: the rows.
      total: their number.
      left: the number of those that are not done already.
    """
    console = Console()
    if left:
        kept = f"; {total - left:,} are kept from before" if left < total else ""
        console.print(f"data   {verb} {left:,} {what}{kept}", highlight=False)
    columns = (BarColumn(bar_width=None, complete_style="cyan"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as bar:
        task, shown = bar.add_task("", total=total, completed=total - left), time.monotonic()

        def advance(rows: int) -> None:
            nonlocal shown
            bar.advance(task, rows)
            if bar.disable and time.monotonic() - shown > LINE_SECONDS:
                shown = time.monotonic()
                console.print(f"data   {verb}: {bar.tasks[0].completed:,.0f} of {total:,} rows", highlight=False)

        yield advance
