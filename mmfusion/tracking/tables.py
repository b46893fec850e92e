"""Tables for the terminal: modules of a model, and metrics of each split."""

from collections.abc import Iterable, Mapping

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from mmfusion.files import to_builtin
from mmfusion.tracking.logger import format_metric


def model_table(rows: Iterable[tuple[str, tuple[int, ...] | str, int, float | None]]) -> Table:
    """Returns a table of a model's modules, with totals in the last row.

    Args:
      rows: one (module, output shape, parameters, share of FLOPs in [0, 1] or None where unknown) per module.
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
    """Returns a table with a row per metric and a column per split, without nested metrics (per class, confusion).

    Args:
      metrics: metrics by name, by split; `examples`, those that count, are shown as a share of the `rows`; a split of 0
        rows was not evaluated, as it has no labels.
    """
    nested = {n for s in metrics.values() for n, v in s.items() if not (v is None or np.isscalar(v))}
    names = dict.fromkeys(n for s in metrics.values() for n in s if n not in nested)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for split in metrics:
        table.add_column(Text(split), justify="right", no_wrap=True)
    for name in names:
        if name == "rows":
            continue
        if name.rpartition("/")[2] == "examples" and "rows" in names:
            table.add_row(Text(name), *(_share(values[name], values["rows"]) for values in metrics.values()))
            continue
        table.add_row(Text(name), *(format_metric(to_builtin(values.get(name))) for values in metrics.values()))
    return table


def _share(examples: int, rows: int) -> str:
    return f"{examples:,} of {rows:,}" if rows else "no labels"
