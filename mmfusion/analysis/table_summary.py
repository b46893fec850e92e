"""What `experiments.inspect` shows of a table: its columns, its splits, and a picture of sample rows."""

import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from rich import box
from rich.table import Table
from rich.text import Text

from mmfusion import config as configs
from mmfusion.analysis.report.theme import INK, PALETTE, RC_PARAMS
from mmfusion.config.from_table import Proposal
from mmfusion.data import audio, image
from mmfusion.data import dataset as datasets
from mmfusion.data.regular_files import read_file
from mmfusion.data.table import canonical
from mmfusion.data.table_schema import is_missing

MAX_COLUMNS = 40  # columns of a table that are listed
SHOWN = 6  # sample rows in the picture


def columns_table(proposal: Proposal) -> Table:
    """Returns a table with a row per column: what it holds, missing values, and what it is read as."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=str(proposal.table.path), title_justify="left")
    for name in ("column", "holds", "missing", "values", "read as"):
        table.add_column(name, justify="right" if name == "missing" else "left", overflow="fold")
    shown = list(proposal.columns.values())[:MAX_COLUMNS]
    for column in shown:
        missing = f"{column.missing:,}" if column.missing else ""
        role = proposal.roles[column.name]
        style = "dim" if role.startswith("not ") else "bold"
        table.add_row(Text(column.name), column.kind, missing, Text(column.about), Text(role, style=style))
    if len(proposal.columns) > len(shown):
        table.add_row(f"… {len(proposal.columns) - len(shown)} more")
    return table


def summary_lines(proposal: Proposal, config: ConfigDict) -> Iterator[str]:
    """Yields lines about the splits, the classes, and what is suspicious, of the data as a run would read it."""
    data = datasets.load(configs.read(config).data, seed=config.seed)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in data.splits.items())
    yield f"rows    {len(proposal.table.rows):,}: {sizes}"
    for task, names in data.class_names.items():
        feature = config.data.targets[task].feature
        if names:
            counts = Counter(canonical(row[feature]) for row in proposal.table.rows if not is_missing(row[feature]))
            common = ", ".join(f"{name} {count / counts.total():.1%}" for name, count in counts.most_common(8))
            rest = f", and {len(counts) - 8} more" if len(counts) > 8 else ""
            yield f"{task:<8}{len(names)} classes: {common}{rest}"
        else:
            about = proposal.columns[feature].about
            hint = "; --task=classification reads them as classes" if about.startswith("integers") else ""
            yield f"{task:<8}to be predicted as numbers: {about}{hint}"
    for split in data.splits.values():
        for reason in list(split.bad.values())[:3]:
            yield f"bad     {split.name}: {reason}"
    for note in data.notes:
        yield f"note    {note}"


def sample_figure(proposal: Proposal, config: ConfigDict) -> Figure:
    """Returns a picture of evenly spaced rows, with a column per modality: images, waveforms, text and numbers."""
    rows = proposal.table.rows
    sample = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round()]
    modalities = dict(config.data.modalities.items())
    with matplotlib.rc_context(RC_PARAMS):
        figure = Figure(figsize=(2.6 * (len(modalities) + 1), 1.5 * len(sample) + 0.4), facecolor="white")
        axes = figure.subplots(len(sample), len(modalities) + 1, squeeze=False)
        for row_axes, row in zip(axes, sample, strict=True):
            for axis, section in zip(row_axes, modalities.values(), strict=False):
                try:
                    _draw(axis, section, row, proposal.table.path.parent)
                except (OSError, ValueError) as error:
                    _write(axis, f"cannot be read: {getattr(error, 'strerror', None) or error}")
            labels = [f"{target.feature}\n{canonical(row[target.feature])}" for target in config.data.targets.values()]
            _write(row_axes[-1], "\n".join(labels), weight="bold")
        for axis, name in zip(axes[0], [*modalities, "label"], strict=True):
            axis.set_title(name)
    return figure


def _draw(axis: Axes, section: Any, row: dict[str, Any], folder: Path) -> None:
    names = section.feature.split("+")
    value = row[names[0]]
    if section.kind == "table":
        lines = [f"{name}: {canonical(row[name])[:18]}" for name in names[:6]]
        _write(axis, "\n".join(lines + ([f"… {len(names) - 6} more"] if len(names) > 6 else [])))
    elif is_missing(value):
        _write(axis, "absent")
    elif section.kind == "image":
        data = value if isinstance(value, np.ndarray) else read_file(Path(folder, value))
        pixels = image.decode(data, tuple(section.size), section.channels)  # [H, W, C]
        axis.imshow(pixels[:, :, :3] if section.channels >= 3 else pixels[:, :, 0], cmap="gray")
        axis.set_anchor("NW")
        axis.set_axis_off()
    elif section.kind == "audio":
        waveform = audio.decode(Path(folder, value), section.rate)
        axis.plot(np.arange(len(waveform)) / section.rate, waveform, color=PALETTE[0], linewidth=0.5)
        axis.set_yticks([])
    else:
        _write(axis, textwrap.shorten(canonical(value), 150, placeholder=" …"))


def _write(axis: Axes, text: str, **style: Any) -> None:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, 30) or [""]]
    axis.text(0.02, 0.98, "\n".join(lines), va="top", fontsize=8, color=INK, transform=axis.transAxes, **style)
    axis.set_axis_off()
