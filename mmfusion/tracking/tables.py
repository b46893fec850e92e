"""Tables for the terminal: the modules of a model, and the metrics of each split."""

from collections.abc import Iterable, Mapping

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from mmfusion.files import plain
from mmfusion.tracking.logger import format_score


def model_table(rows: Iterable[tuple[str, tuple[int, ...] | str, int, float | None]]) -> Table:
    """Returns a table of a model's modules with the totals beneath.

    Args:
      rows: (module, output shape, parameters, share of FLOPs in [0, 1] or None where unknown) each.
    """
    rows = list(rows)
    shares = [share for *_, share in rows if share is not None]
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.add_column("module", "total", overflow="fold")
    table.add_column("output", style="dim")
    table.add_column("parameters", f"{sum(row[2] for row in rows):,}", justify="right", no_wrap=True)
    table.add_column("FLOPs", f"{sum(shares):.1%}" if shares else "–", justify="right", no_wrap=True)
    for module, shape, parameters, share in rows:
        shape = shape if isinstance(shape, str) else "×".join(map(str, shape))
        table.add_row(Text(module), Text(shape), f"{parameters:,}", "–" if share is None else f"{share:.1%}")
    return table


def results_table(metrics: Mapping[str, Mapping]) -> Table:
    """Returns a table with one row a score and one column a split; nested scores (per class, confusion) are left out.

    Args:
      metrics: scores by name, by split.
    """
    names = dict.fromkeys(n for s in metrics.values() for n, v in s.items() if v is None or np.isscalar(v))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for split in metrics:
        table.add_column(Text(split), justify="right", no_wrap=True)
    for name in names:
        table.add_row(Text(name), *(format_score(plain(scores.get(name))) for scores in metrics.values()))
    return table
