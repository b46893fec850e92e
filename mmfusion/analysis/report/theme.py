"""The style of a report's figures: SVG whose colours follow the page's theme, with defaults outside the page."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from markupsafe import Markup, escape
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from mmfusion.analysis.ablation.plan import REFERENCE

WIDE = 10.9  # width of the page's column, inches
INK, SOFT, GRID, STRIPE, PAPER, OTHER = "#1c242c", "#5a6570", "#dfe4e8", "#f4f6f8", "#fefefe", "#a3adb7"
VERDICTS = {
    "better": ("#15714b", "^"),
    "worse": ("#b4392d", "v"),
    "equivalent": ("#2f6bb0", "s"),
    "cannot tell": ("#68737d", "o"),
}
PALETTE = ("#1668a8", "#d1495b", "#2b9161", "#8659b8", "#d97f06", "#12908e", "#8f5236", "#be4f97")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "p")
PARTS = ("#44617b", "#d0a24c", "#8c5a6b", "#7fa8a0")  # colours of modalities
# The CSS variable of each colour on the page; other colours are fixed.
CSS_NAMES = {
    INK: "ink", SOFT: "soft", GRID: "line", STRIPE: "stripe", PAPER: "paper", OTHER: "other",
    **{colour: verdict.replace(" ", "-") for verdict, (colour, _) in VERDICTS.items()},
    **{colour: f"method-{i}" for i, colour in enumerate(PALETTE, 1)},
    **{colour: f"part-{i}" for i, colour in enumerate(PARTS, 1)},
}  # fmt: skip
HEAT = LinearSegmentedColormap.from_list("heat", ["#f3f6f9", "#bcd3e4", "#6fa3c8", "#2a6ea6", "#0f3d66"])
RC_PARAMS: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "mmfusion", "text.parse_math": False, "font.size": 10,
    "figure.facecolor": "none", "axes.facecolor": "none", "figure.constrained_layout.use": True,
    "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": GRID, "axes.linewidth": 0.8,
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": INK,
    "axes.titlepad": 8, "axes.labelsize": 10, "axes.labelpad": 6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 5, "ytick.major.pad": 6,
    "lines.linewidth": 1.5, "lines.markersize": 4.5, "lines.markeredgewidth": 0, "legend.frameon": False,
    "legend.fontsize": 10, "legend.labelspacing": 0.55, "legend.handlelength": 1.8,
}  # fmt: skip
FONT = "Helvetica, Arial, sans-serif"


class Style(NamedTuple):
    """A method's colour and marker, the same in all figures."""

    colour: str
    mark: str


def method_styles(methods: Sequence[str]) -> dict[str, Style]:
    """Returns the styles of up to eight methods and of the reference; other methods are grey."""
    others = [method for method in methods if method != REFERENCE]
    found = {method: Style(*pair) for method, *pair in zip(others, PALETTE, MARKS, strict=False)}
    return found | {REFERENCE: Style(INK, "o")}


def layout(figure: Figure) -> ConstrainedLayoutEngine:
    """Returns the layout engine of a figure that was created with RC_PARAMS."""
    return cast(ConstrainedLayoutEngine, figure.get_layout_engine())


def svg(figure: Figure, label: str) -> Markup:
    """Returns a figure as an `svg` element with a description for screen readers."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # ids would collide between figures
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", FONT, text)
    text = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})",
        lambda found: f"{found[1]}: var(--{CSS_NAMES[found[2]]}, {found[2]})" if found[2] in CSS_NAMES else found[0],
        text,
    )
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def legend(figure: Figure, methods: Sequence[str], styles: Mapping[str, Style], lines: bool = True) -> None:
    """Adds a legend outside the axes: each method with a style, and one grey entry for the others."""
    style: dict[str, Any] = {"lw": 1.5 if lines else 0, "markersize": 5 if lines else 6.5}
    handles = [
        Line2D([], [], color=styles[m].colour, marker=styles[m].mark, label=m, **style) for m in methods if m in styles
    ]
    if any(m not in styles for m in methods):
        handles.append(Line2D([], [], color=OTHER, marker="o", label="others", **style))
    figure.legend(handles=handles, loc="outside right upper")
