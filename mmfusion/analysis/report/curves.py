"""Figures with one curve or point per method: cost, corruption, calibration, training."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from mmfusion.analysis.probing.calibration import BINS, Reliability
from mmfusion.analysis.report.aggregation import Curve, bin_of
from mmfusion.analysis.report.theme import OTHER, PALETTE, PAPER, RC_PARAMS, SOFT, WIDE, Style, layout, legend, svg


class CostPoint(NamedTuple):
    """A method's mean test score and its interval, its parameters, and training examples per second."""

    score: float
    interval: tuple[float, float] | None
    parameters: float
    speed: float


@matplotlib.rc_context(RC_PARAMS)
def cost(found: Mapping[str, CostPoint], styles: Mapping[str, Style], metric: str) -> Markup:
    """Plots test scores against parameters and against speed; outliers are triangles at the edge."""
    figure = Figure(figsize=(WIDE, 3.9))
    layout(figure).set(wspace=0.05)
    axes = figure.subplots(1, 2, sharey=True)
    scores = np.array([point.score for point in found.values()])
    low, high = np.quantile(scores, [0.25, 0.75])
    inside = [s for s in scores if low - 3 * (high - low) <= s <= high + 3 * (high - low)]
    ends = [e for point in found.values() if point.score in inside for e in point.interval or (point.score,)]
    pad = 0.06 * (max(ends) - min(ends)) or 0.01
    bottom, top = min(ends) - pad, max(ends) + pad
    for ax, field, label in zip(
        axes, ("parameters", "speed"), ("parameters", "training examples per second"), strict=True
    ):
        for method, point in sorted(found.items(), key=lambda item: item[0] in styles):  # grey points below
            colour, mark = styles.get(method, Style(OTHER, "o"))
            if x := getattr(point, field):
                if point.score not in inside:
                    below = point.score < low
                    ax.plot(x, bottom if below else top, color=colour, marker="v" if below else "^",
                            markerfacecolor=PAPER, markeredgewidth=1.2, markersize=6, clip_on=False)  # fmt: skip
                    continue
                ax.plot([x, x], point.interval or [point.score] * 2, color=colour, lw=1.1)
                ax.plot(x, point.score, color=colour, marker=mark, markersize=8, markeredgecolor=PAPER,
                        markeredgewidth=0.7, zorder=3)  # fmt: skip
        _log_axis(ax, [x for point in found.values() if (x := getattr(point, field)) and math.isfinite(x)])
        ax.set_xlabel(label)
    axes[0].set_ylim(bottom, top)
    axes[0].set_ylabel(f"test {metric}")
    legend(figure, list(found), styles, lines=False)
    return svg(figure, f"Test {metric} against cost")


def _log_axis(ax: Axes, values: Sequence[float]) -> None:
    """Makes the x axis logarithmic, and wide enough (a factor of at least four) to have a tick."""
    ax.set_xscale("log")
    if values:
        middle = math.sqrt(min(values) * max(values))
        half = max(1.15 * math.sqrt(max(values) / min(values)), 2.0)
        ax.set_xlim(middle / half, middle * half)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.minorticks_off()


@matplotlib.rc_context(RC_PARAMS)
def corruption(
    curves: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
    severities: Sequence[float],
    styles: Mapping[str, Style],
    metric: str,
) -> Markup:
    """Plots scores against severity, with one row of axes per modality and one column per corruption."""
    modalities = list(dict.fromkeys(m for m, _ in curves))
    kinds = {m: [kind for other, kind in curves if other == m] for m in modalities}
    columns = max(map(len, kinds.values()))
    figure = Figure(figsize=(WIDE, 0.3 + 2.3 * len(modalities)))
    layout(figure).set(wspace=0.06, hspace=0.08)
    axes = figure.subplots(len(modalities), columns, sharex=True, sharey=True, squeeze=False)
    for row, m in zip(axes, modalities, strict=True):
        for ax, kind in zip(row, kinds[m], strict=False):
            for method, scores in reversed(list(curves[m, kind].items())):
                ax.plot(severities, scores, color=styles[method].colour, marker=styles[method].mark, markersize=3.6,
                        markevery=2)  # fmt: skip
            ax.set_title(f"{m}: {kind.replace('_', ' ')}")
            ax.set_xlim(-0.03, 1.03)
            ax.tick_params(labelbottom=True)
            ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        for ax in row[len(kinds[m]) :]:
            ax.set_visible(False)
        row[0].set_ylabel(metric)
    figure.supxlabel("severity", fontsize=10, color=SOFT)
    legend(figure, list(next(iter(curves.values()))), styles)
    return svg(figure, f"Test {metric} under corruption")


@matplotlib.rc_context(RC_PARAMS)
def reliability(panels: Mapping[str, Reliability]) -> Markup:
    """Plots accuracy against confidence by panel title, and a histogram of confidence below."""
    figure = Figure(figsize=(3.55 * len(panels) + 0.3, 4.5))
    layout(figure).set(wspace=0.05)
    axes = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=[4, 1])
    for (upper, lower), (title, bins) in zip(axes.T, panels.items(), strict=True):
        centres = (bin_of(bins.confidence) + 0.5) / BINS
        upper.bar(centres, bins.accuracy, 0.92 / BINS, color=PALETTE[0], alpha=0.3, lw=0)
        upper.plot([0, 1], [0, 1], color=SOFT, lw=0.9, dashes=(4, 3))
        upper.plot(bins.confidence, bins.accuracy, color=PALETTE[0], marker="o", lw=1.2)
        upper.set_title(title)
        upper.set_xlim(0, 1)
        upper.set_ylim(0, 1)
        lower.bar(centres, bins.count / bins.count.sum(), 0.92 / BINS, color=OTHER, lw=0)
        lower.set_xlabel("confidence")
        lower.yaxis.set_major_locator(MaxNLocator(2))
    axes[0][0].set_ylabel("accuracy")
    axes[1][0].set_ylabel("examples")
    return svg(figure, "Reliability diagram")


@matplotlib.rc_context(RC_PARAMS)
def training(curves: Mapping[str, Curve], styles: Mapping[str, Style], metric: str) -> Markup:
    """Plots the validation metric against the step: mean over seeds, and a band from minimum to maximum."""
    figure = Figure(figsize=(WIDE, 3.6))
    ax = figure.subplots()
    for method, curve in reversed(list(curves.items())):
        colour, mark = styles[method]
        means, low, high = zip(*curve.spans, strict=True)
        ax.fill_between(curve.steps, low, high, color=colour, alpha=0.12, lw=0)
        ax.plot(curve.steps, means, color=colour, marker=mark)
    ax.set_xlabel("step")
    ax.set_ylabel(f"validation {metric}")
    ax.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    legend(figure, list(curves), styles)
    return svg(figure, f"Validation {metric} against steps")
