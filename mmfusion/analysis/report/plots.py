"""Figures with one row per method: differences, missing modalities, contributions, interactions.

Methods are plotted in the given order, the first one on top.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mmfusion.analysis.claims.differences import Difference
from mmfusion.analysis.claims.significance import Comparison
from mmfusion.analysis.report.aggregation import Span
from mmfusion.analysis.report.theme import (  # fmt: skip
    HEAT,
    INK,
    OTHER,
    PALETTE,
    PAPER,
    PARTS,
    RC_PARAMS,
    SOFT,
    STRIPE,
    VERDICTS,
    WIDE,
    layout,
    svg,
)

ROW = 0.25  # height of a row, inches
LOWEST = 1.8  # height of a figure of one row with titles and a legend, inches


def method_axis(ax: Axes, methods: Sequence[str], names: bool = True) -> None:
    """Labels the y axis with the methods, the first one on top, and shades every second row."""
    for row in range(0, len(methods), 2):
        ax.axhspan(row - 0.5, row + 0.5, color=STRIPE, lw=0, zorder=0)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_yticks(range(len(methods)), methods if names else [])
    ax.tick_params(axis="y", labelcolor=INK)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)


def method_rows(methods: Sequence[str], columns: int, width: float, height: float = ROW) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, max(0.8 + height * len(methods), LOWEST)))
    layout(figure).set(wspace=0.05)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _limit(ends: Sequence[float]) -> float:
    """Returns the limit of an axis symmetric about 0: the largest end that is not an outlier, plus a margin."""
    threshold = 4 * float(np.quantile(ends, 0.75))
    return 1.1 * max(end for end in ends if end <= threshold) or 1.0


@matplotlib.rc_context(RC_PARAMS)
def forest(methods: Sequence[str], panels: Mapping[str, Mapping[str, Difference]], note: str) -> Markup:
    """Plots differences with their intervals.

    Args:
      methods: one method per row.
      panels: method compared with -> method -> difference.
      note: label of the x axis.
    """
    figure, axes = method_rows(methods, len(panels), WIDE)
    for ax, (other, found) in zip(axes, panels.items(), strict=True):
        method_axis(ax, methods, names=ax is axes[0])
        known = {method: (d.comparison, d.verdict) for method, d in found.items() if d.comparison}
        limit = _limit([max(map(abs, comparison.interval)) for comparison, _ in known.values()] or [1.0])
        ax.axvline(0, color=SOFT, lw=0.9, zorder=1)
        for row, method in enumerate(methods):
            if method == other:
                ax.text(0.02 * limit, row, "reference", color=SOFT, va="center", fontsize=9)
            elif method in known:
                _interval(ax, row, *known[method], limit)
        ax.set_xlim(-1.06 * limit, 1.06 * limit)
        ax.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        ax.set_title(f"against {other}")
        ax.set_xlabel(note)
    handles = [
        Line2D([], [], color=colour, marker=mark, lw=1.6, label=verdict, **_marker_style(verdict, colour))
        for verdict, (colour, mark) in VERDICTS.items()
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    return svg(figure, "Paired differences with 95 % intervals")


def _marker_style(verdict: str, colour: str) -> dict[str, Any]:
    face = PAPER if verdict == "cannot tell" else colour
    return {"markersize": 6, "markeredgewidth": 1.3, "markerfacecolor": face, "markeredgecolor": colour}


def _interval(ax: Axes, row: int, comparison: Comparison, verdict: str, limit: float) -> None:
    colour, mark = VERDICTS[verdict]
    mean, (low, high) = comparison.difference, comparison.interval
    if abs(mean) > limit:  # outside the axis: an arrow and the value
        side = math.copysign(limit, mean)
        ax.plot(side, row, color=colour, marker="<" if mean < 0 else ">", markersize=6)
        ax.text(
            side * 0.96, row, f"{mean:+.3f}".replace("-", "−"),
            color=colour, va="center", ha="left" if mean < 0 else "right", fontsize=9,
        )  # fmt: skip
        return
    ax.plot([max(low, -1.06 * limit), min(high, 1.06 * limit)], [row] * 2, color=colour, lw=1.6)
    ax.plot(mean, row, color=colour, marker=mark, **_marker_style(verdict, colour))


@matplotlib.rc_context(RC_PARAMS)
def heat_maps(panels: Mapping[str, Mapping[str, Mapping[str, float]]], metric: str, higher: bool) -> Markup:
    """Plots the metric with missing modalities, better is darker; panels are title -> method -> column -> mean."""
    methods = list(next(iter(panels.values())))
    columns = {title: list(next(iter(found.values()))) for title, found in panels.items()}
    tables = {
        title: np.array([[found.get(method, {}).get(name, math.nan) for name in columns[title]] for method in methods])
        for title, found in panels.items()
    }
    known = np.concatenate([values[np.isfinite(values)] for values in tables.values()])
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    counts = [len(names) for names in columns.values()]
    figure = Figure(figsize=(min(WIDE, 2.0 + 1.15 * sum(counts)), 0.8 + ROW * len(methods)))
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=counts)[0]
    for ax, (title, values) in zip(axes, tables.items(), strict=True):
        shade = (values - low) / ((high - low) or 1.0)
        cells(ax, values, shade if higher else 1 - shade)
        ax.set_yticks(range(len(methods)), methods if ax is axes[0] else [])
        ax.set_xticks(range(values.shape[1]), columns[title])
        if len(panels) > 1:
            ax.set_title(title)
    return svg(figure, f"Test {metric} where modalities are missing")


def cells(ax: Axes, values: np.ndarray, shade: np.ndarray) -> None:
    """Plots a table of values on cells shaded from 0 to 1, with column labels on top."""
    edges = [np.arange(n + 1) - 0.5 for n in values.shape[::-1]]
    ax.grid(False)
    ax.pcolormesh(*edges, np.ma.masked_invalid(shade), cmap=HEAT, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
    for row, column in np.ndindex(values.shape):
        known = math.isfinite(values[row, column])
        ink = "#ffffff" if shade[row, column] > 0.5 else "#1b232b"  # cells have the same colour in both themes
        text = f"{values[row, column]:.3f}" if known else "–"
        ax.text(column, row, text, ha="center", va="center_baseline", color=ink if known else SOFT)
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.tick_params(labelcolor=INK, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)


@matplotlib.rc_context(RC_PARAMS)
def bars(panels: Mapping[str, Mapping[str, Mapping[str, Span]]]) -> Markup:
    """Plots the contribution of each modality; panels are title -> method -> modality -> span over seeds."""
    methods = list(dict.fromkeys(method for found in panels.values() for method in found))
    parts = sorted({part for found in panels.values() for shares in found.values() for part in shares})
    row_height = max(0.3, 0.1 * len(parts) + 0.1) if len(methods) <= 16 else 0.22
    figure, axes = method_rows(methods, len(panels), WIDE if len(panels) > 1 else 6.5, row_height)
    height = 0.72 / len(parts)
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        method_axis(ax, methods, names=ax is axes[0])
        ax.axvline(0, color=SOFT, lw=0.9, zorder=2)
        for k, part in enumerate(parts):
            spans = [(row, found[method][part]) for row, method in enumerate(methods) if part in found.get(method, {})]
            ys = [row + (k - (len(parts) - 1) / 2) * height for row, _ in spans]
            colour = PARTS[k % len(PARTS)]
            ax.barh(ys, [span.mean for _, span in spans], height * 0.9, color=colour, label=part, lw=0)
            for y, (_, span) in zip(ys, spans, strict=True):
                ax.plot([span.low, span.high], [y] * 2, color=INK, lw=0.9)
        ax.set_xlabel(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(parts))
    return svg(figure, "What each modality contributes")


@matplotlib.rc_context(RC_PARAMS)
def interaction(found: Mapping[str, Mapping[str, tuple[float, float]]], metric: str) -> Markup:
    """Plots the metric of the model and of its additive projection, by modality and method."""
    methods = list(dict.fromkeys(method for pairs in found.values() for method in pairs))
    figure, axes = method_rows(methods, len(found), WIDE if len(found) > 1 else 7.5)
    for ax, (m, pairs) in zip(axes, found.items(), strict=True):
        method_axis(ax, methods, names=ax is axes[0])
        for row, method in enumerate(methods):
            whole, additive = pairs.get(method, (math.nan, math.nan))
            ax.plot([whole, additive], [row] * 2, color=OTHER, lw=1.6)
            ax.plot(additive, row, color=SOFT, marker="o", markersize=6, markerfacecolor=PAPER, markeredgewidth=1.3)
            ax.plot(whole, row, color=PALETTE[0], marker="o", markersize=6)
        ax.set_xlabel(f"test {metric}")
        if len(found) > 1:
            ax.set_title(f"{m} against the rest")
    handles = [
        Line2D([], [], lw=0, marker="o", markersize=6, color=PALETTE[0], label="as it is"),
        Line2D([], [], lw=0, marker="o", markersize=6, color=SOFT, markerfacecolor=PAPER, markeredgewidth=1.3,
               label="additive projection"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return svg(figure, "The metric as it is and of its additive projection")
