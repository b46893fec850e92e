"""The figures of a study's report; methods are in order of their mean rank, the best on top."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmfusion.analysis.report.plots import cells, method_axis, method_rows
from mmfusion.analysis.report.theme import (
    GRID,
    INK,
    OTHER,
    PALETTE,
    PAPER,
    RC_PARAMS,
    SOFT,
    WIDE,
    Style,
    layout,
    legend,
    svg,
)
from mmfusion.analysis.study.aggregates import Estimate
from mmfusion.analysis.study.comparisons import Friedman
from mmfusion.analysis.study.summary import THRESHOLDS, Row


@matplotlib.rc_context(RC_PARAMS)
def aggregates(rows: Sequence[Row]) -> Markup:
    """Plots mean ranks and, where there are any, interquartile means with their intervals; floors are open circles."""
    panels: dict[str, Sequence[Estimate | None]] = {"mean rank (1 is best)": [row.rank for row in rows]}
    if any(row.middle for row in rows):
        panels["interquartile mean of normalised scores"] = [row.middle for row in rows]
    figure, axes = method_rows([row.method for row in rows], len(panels), WIDE)
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        method_axis(ax, [row.method for row in rows], names=ax is axes[0])
        for y, (row, estimate) in enumerate(zip(rows, found, strict=True)):
            if estimate:
                _estimate(ax, y, estimate, row.is_strategy)
        ax.set_xlabel(title)
    return svg(figure, "Mean ranks and interquartile means")


def _estimate(ax: Axes, y: float, estimate: Estimate, filled: bool, colour: str = PALETTE[0]) -> None:
    low, high = estimate.interval or (estimate.value, estimate.value)
    ax.plot([low, high], [y, y], color=colour, lw=1.6)
    face = colour if filled else PAPER
    ax.plot(estimate.value, y, color=colour, marker="o", markersize=6, markerfacecolor=face, markeredgewidth=1.3,
            markeredgecolor=colour)  # fmt: skip


@matplotlib.rc_context(RC_PARAMS)
def scores(methods: Sequence[str], columns: Mapping[str, np.ndarray], higher: Sequence[bool]) -> Markup:
    """Plots mean test scores by method and dataset; the shades of a column run from its worst to its best.

    Args:
      methods: the rows.
      columns: dataset -> mean scores `[M]`.
      higher: of each dataset, whether a higher score is better.
    """
    values = np.stack(list(columns.values()), axis=1)
    low, high = values.min(axis=0), values.max(axis=0)
    shade = (values - low) / np.where(high > low, high - low, 1.0)
    shade = np.where(higher, shade, 1 - shade)
    figure = Figure(figsize=(min(WIDE, 2.0 + 0.95 * len(columns)), 1.4 + 0.25 * len(methods)))
    ax = figure.subplots()
    cells(ax, values, shade)
    ax.set_yticks(range(len(methods)), methods)
    turned = {"rotation": 30, "ha": "left"} if len(columns) > 5 else {}
    ax.set_xticks(range(len(columns)), list(columns), **turned)
    return svg(figure, "Mean test score by method and dataset")


@matplotlib.rc_context(RC_PARAMS)
def profiles(rows: Sequence[Row], styles: Mapping[str, Style]) -> Markup:
    """Plots the share of runs above each normalised score, with pointwise bands."""
    drawn = [row for row in rows if row.method in styles and row.profile is not None]
    figure = Figure(figsize=(WIDE, 4.0))
    ax = figure.subplots()
    for row in reversed(drawn):
        assert row.profile is not None
        values, low, high = row.profile
        colour, mark = styles[row.method]
        ax.fill_between(THRESHOLDS, low, high, color=colour, alpha=0.1, lw=0, step="post")
        ax.step(THRESHOLDS, values, color=colour, where="post", marker=mark, markevery=10, markersize=4.5)
    below = [float(THRESHOLDS[np.argmax(row.profile[0] < 1)]) for row in drawn if row.profile is not None]
    ax.set_xlim(max(min(below, default=0.0) - 0.05, 0.0), 1)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("normalised score τ")
    ax.set_ylabel("share of runs above τ")
    legend(figure, [row.method for row in drawn], styles)
    return svg(figure, "Performance profiles")


@matplotlib.rc_context(RC_PARAMS)
def improvement(rows: Sequence[Row], references: Sequence[str]) -> Markup:
    """Plots P(a run of the method > a run of the reference), a panel per reference; one half is no difference."""
    figure, axes = method_rows([row.method for row in rows], len(references), WIDE)
    for ax, other in zip(axes, references, strict=True):
        method_axis(ax, [row.method for row in rows], names=ax is axes[0])
        ax.axvline(0.5, color=SOFT, lw=0.9, zorder=1)
        for y, row in enumerate(rows):
            if row.method == other:
                ax.text(0.52, y, "reference", color=SOFT, va="center", fontsize=9)
            elif other in row.improvement:
                _estimate(ax, y, row.improvement[other], row.is_strategy)
        ax.set_xlim(-0.03, 1.03)
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.set_title(f"over {other}")
    figure.supxlabel("probability of improvement", fontsize=10, color=SOFT)
    return svg(figure, "Probability of improvement")


@matplotlib.rc_context(RC_PARAMS)
def critical_difference(rows: Sequence[Row], test: Friedman) -> Markup:
    """Draws a critical-difference diagram: a bar joins methods whose mean ranks Nemenyi's test does not tell apart."""
    ranked = sorted(rows, key=lambda row: row.rank.value)
    k, left = len(ranked), math.ceil(len(ranked) / 2)
    depth = 0.55 * len(test.groups) + 0.5  # of the bars below the axis
    bottom = depth + left
    figure = Figure(figsize=(WIDE, 0.7 + 0.23 * (bottom + 1.8)))
    ax = figure.subplots()
    ax.set_xlim(1 - 0.32 * k, k + 0.32 * k)
    ax.set_ylim(bottom + 0.2, -2.6)
    ax.set_axis_off()
    ax.plot([1, k], [0, 0], color=INK, lw=1.1, solid_capstyle="butt")
    for tick in range(1, k + 1):
        ax.plot([tick, tick], [0, -0.25], color=INK, lw=0.9)
        ax.text(tick, -0.4, str(tick), ha="center", va="bottom", color=SOFT, fontsize=9)
    width = min(test.critical_difference, k - 1)
    ax.plot([1, 1 + width], [-1.7] * 2, color=INK, lw=1.4)
    for end in (1, 1 + width):
        ax.plot([end, end], [-1.85, -1.55], color=INK, lw=1.1)
    beyond = ", wider than all ranks" if width < test.critical_difference else ""
    label = f"critical difference {test.critical_difference:.2f}{beyond}"
    ax.text(1 + width / 2, -1.95, label, ha="center", va="bottom", color=SOFT, fontsize=9)
    for i, row in enumerate(ranked):
        on_left = i < left
        y = depth + (i if on_left else k - 1 - i) + 0.5
        side = 1 - 0.03 * k if on_left else k + 0.03 * k
        ax.plot([row.rank.value, row.rank.value, side], [0, y, y], color=OTHER, lw=0.9, zorder=1)
        text, align = f"{row.method}  {row.rank.value:.2f}", "right"
        if not on_left:
            text, align = f"{row.rank.value:.2f}  {row.method}", "left"
        weight = "bold" if row.is_strategy else "normal"
        ax.text(side + (-0.08 if on_left else 0.08), y, text, ha=align, va="center", color=INK, weight=weight)
    of = {row.method: row.rank.value for row in ranked}
    for j, group in enumerate(test.groups):
        y = 0.5 + 0.55 * j
        ends = [of[group[0]] - 0.06, of[group[-1]] + 0.06]
        ax.plot(ends, [y, y], color=PALETTE[0], lw=3.2, solid_capstyle="round", zorder=3)
    return svg(figure, "Critical-difference diagram")


@matplotlib.rc_context(RC_PARAMS)
def cost(rows: Sequence[Row], styles: Mapping[str, Style], base: str) -> Markup:
    """Plots interquartile means against parameters and against the time of a step, both relative to `base`."""
    figure = Figure(figsize=(WIDE, 3.9))
    layout(figure).set(wspace=0.05)
    axes = figure.subplots(1, 2, sharey=True)
    found = [row for row in rows if row.middle and row.parameters and row.step_time]
    for ax, field, label in zip(axes, ("parameters", "step_time"), ("parameters", "time of a step"), strict=True):
        for row in sorted(found, key=lambda row: row.method in styles):
            assert row.middle
            colour, mark = styles.get(row.method, Style(OTHER, "o"))
            x, (low, high) = getattr(row, field), row.middle.interval or (row.middle.value,) * 2
            ax.plot([x, x], [low, high], color=colour, lw=1.1)
            ax.plot(x, row.middle.value, color=colour, marker=mark, markersize=8, markeredgecolor=PAPER,
                    markeredgewidth=0.7, zorder=3)  # fmt: skip
        ax.axvline(1, color=GRID, lw=0.9, zorder=1)
        ax.set_xlabel(f"{label}, relative to {base}")
        ax.xaxis.set_major_locator(MaxNLocator(6))
    axes[0].set_ylabel("interquartile mean")
    legend(figure, [row.method for row in found], styles, lines=False)
    return svg(figure, "Interquartile mean against cost")
