"""Writes what was measured as Markdown with plots: one table a group, and what every contender did."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark import gpu
from experiments.benchmark.contender import NOT_MEASURED
from experiments.benchmark.rows import OURS, best, median, ratio, spread, table

INTRO = """# Benchmark

Each contender is a process of its own, pinned to the same cores; they take turns, round by round. Less is better.
Values are medians over rounds ± half their range. A ratio is the other's value divided by ours: above 1, ours is ahead.
The limit is the time of the matrix products and convolutions alone at the rate of a large matrix product, measured in
the same rounds, as a share of ours. **short**: a goal is not reached. Made by `python -m experiments.benchmark`.
"""


def write(measured: Mapping[str, Any], folder: Path) -> None:
    """Writes `BENCHMARK.md` and the plots beside it.

    Args:
      measured: groups by name, each with `rows` and how they were measured.
      folder: receives `BENCHMARK.md` and `benchmark/*.png`.
    """
    from mmfusion.files import write_text

    pictures = folder / "benchmark"
    pictures.mkdir(exist_ok=True)
    rows = [row for group in measured.values() for row in group["rows"]]
    plots = []
    if any(not row.get("series") and ratio(row["columns"], best(row["columns"])) for row in rows):
        plot_ratios(rows, pictures / "ratios.png")
        plots.append("![How many times as fast as each other contender](benchmark/ratios.png)")
    if any(row.get("series") for row in rows):
        plot_growth(rows, pictures / "growth.png")
        plots.append("![Growth](benchmark/growth.png)")
    accelerator = folder / "BENCHMARK_GPU.json"
    on_accelerator = accelerator_text(json.loads(accelerator.read_text()) if accelerator.exists() else {})
    parts = [INTRO, *plots, *(group_text(name, group) for name, group in measured.items()), on_accelerator]
    write_text(folder / "BENCHMARK.md", "\n\n".join(part.strip() for part in parts) + "\n")


def group_text(name: str, group: Mapping[str, Any]) -> str:
    """Returns a group's tables as Markdown."""
    compared = [row for row in group["rows"] if not row.get("series")]
    grown = [row for row in group["rows"] if row.get("series")]
    parts = [f"## {name}", made_with(group)]
    if compared:
        heads = ("row", "unit", OURS, "best other", "ratio", "limit", "goal", "")
        parts += [table(heads, [summary(row) for row in compared]), "Every contender:"]
        parts.append(table(("row", "contender", "value", "first and last loss of the same steps"), details(compared)))
    for unit in dict.fromkeys(row["unit"] for row in grown):
        parts.append(growth_table([row for row in grown if row["unit"] == unit], unit))
    return "\n\n".join(parts)


def accelerator_text(results: Mapping[str, Any]) -> str:
    """Returns the section on what `gpu.sh` measured; what was not measured says so."""
    rows, errors = results.get("rows", {}), results.get("errors", {})
    where = f"{results['device']}, jax {results['jax']}" if results else NOT_MEASURED
    cells = []
    for key, title in gpu.ROWS.items():
        default = errors.get(key.partition("/")[0], NOT_MEASURED)
        cells.append([title, _shown(rows[key]) if key in rows else default])
    return f"## Accelerator\n\n{where}; `experiments/benchmark/gpu.sh`\n\n" + table(("row", "value"), cells)


def _shown(found: Any) -> str:
    if isinstance(found, Mapping):
        return ", ".join(f"{name} {_shown(value)}" for name, value in found.items())
    return f"{found:.4g}" if isinstance(found, float) else str(found)


def made_with(group: Mapping[str, Any]) -> str:
    """Returns one line: command, machine, cores, versions and commit."""
    environment = group["environment"]
    commit = environment["commit"] or {"id": "unknown", "dirty": False}
    versions = {name: environment["versions"][name] for name in ("python", "jax", "flax", "optax", "numpy")}
    versions |= group["peers"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    dirty = " with changes" if commit["dirty"] else ""
    cores = ", ".join(map(str, group["cores"]))
    return (
        f"`{group['command']}`: {group['seconds']:.0f} s on {group['processor']}, cores {cores}; {shown}; commit "
        f"{commit['id'][:12]}{dirty}."
    )


def summary(row: Mapping[str, Any]) -> list[str]:
    """Returns a row's cells: ours, the best other, the ratio, the share of the limit, the goals and a mark."""
    columns = row["columns"]
    other, ours = best(columns), median(columns.get(OURS))
    found = ratio(columns, other)
    limit = f"{row['limit'] / ours:.0%}" if row["limit"] and ours else ""
    states = [goal["reached"] for goal in row["goals"]]
    mark = "**short**" if False in states else NOT_MEASURED if NOT_MEASURED in states else ""
    goals = ", ".join(goal["text"] + (" (short)" if goal["reached"] is False and len(states) > 1 else "")
                      for goal in row["goals"])  # fmt: skip
    shown = f"{value(columns[other])} ({other})" if other else NOT_MEASURED if len(columns) > 1 else ""
    return [row["name"], row["unit"], value(columns.get(OURS)), shown, f"{found:.2f}" if found else "", limit, goals,
            mark]  # fmt: skip


def details(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the cells of each row's contenders, with the first and the last losses that they show."""
    cells = []
    for row in rows:
        for name, column in row["columns"].items():
            losses = column.get("facts", {}).get("losses", [])
            ends = losses if len(losses) < 3 else [losses[0], losses[-1]]
            cells.append([row["name"], name, value(column), " … ".join(f"{loss:.6g}" for loss in ends)])
    return cells


def value(column: Mapping[str, Any] | None) -> str:
    """Returns a column's median and spread, or why there is none."""
    found = median(column)
    if column is None or found is None:
        return (column or {}).get("error", NOT_MEASURED).replace("|", "\\|")[:120]
    return f"{found:.4g}" + (f" ± {spread(column):.0%}" if len(column["values"]) > 1 else "")


def growth_table(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Returns the table of the series of a unit, with their exponents."""
    parts = []
    for sizes in dict.fromkeys(tuple(row["columns"]) for row in rows):
        cells = []
        for row in rows:
            if tuple(row["columns"]) == sizes:
                found = row["exponent"]
                exponents = [f"{found['all']:.2f}", f"{found['last']:.2f}"] if found else ["", ""]
                cells.append([row["name"], *(value(column) for column in row["columns"].values()), *exponents])
        parts.append(table((f"{unit} at", *sizes, "exponent", "of the last three"), cells))
    return "\n\n".join(parts)


def plot_ratios(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots how many times as fast as each other contender ours is, a line of points for each row."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row.get("series") and ratio(row["columns"], best(row["columns"]))]
    names = list(dict.fromkeys(name for row in shown for name in row["columns"] if name != OURS))
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        points = [(ratio(row["columns"], name), i) for i, row in enumerate(shown) if ratio(row["columns"], name)]
        if points:
            axes.plot(*zip(*points, strict=True), "os^vDPX*<>"[number % 10], color=f"C{number % 10}", label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="other's value / ours (right of the line: ours is ahead)", yticks=range(len(shown)))
    axes.set_yticklabels([row["name"] for row in shown], fontsize=8)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=100)


def plot_growth(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots every series on logarithmic axes, one plot for what grows (the name after the comma) and unit."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("series"):
            groups.setdefault((row["name"].rpartition(", ")[2], row["unit"]), []).append(row)
    across = 3
    down = -(-len(groups) // across)
    figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for each in axes:
        each.set_visible(False)
    for each, ((what, unit), members) in zip(axes, groups.items(), strict=False):
        each.set_visible(True)
        for row in members:
            points = [(float(size), median(column)) for size, column in row["columns"].items() if median(column)]
            label = row["name"].removesuffix(f", {what}").removeprefix("temporary memory, ")
            if row["exponent"]:
                label += f" (exponent {row['exponent']['all']:.2f})"
            each.plot(*zip(*points, strict=True), "o-", label=label)
        each.set(xscale="log", yscale="log", xlabel=what, ylabel=unit)
        each.set_xticks([float(size) for size in members[0]["columns"]], members[0]["columns"], fontsize=7)
        each.set_xticks([], minor=True)
        each.grid(alpha=0.3)
        each.legend(fontsize=6)
    figure.savefig(path, dpi=100)
