"""Writes a dataset as a table of one's own: a CSV file, with its images and audio as files in a folder beside it."""

import csv
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mmfusion import files
from mmfusion.data.features import Feature
from mmfusion.data.rows import iterate
from mmfusion.data.sources import Source
from mmfusion.errors import UserError

SPLIT = "split"


@dataclasses.dataclass(frozen=True)
class Files:
    """Writes the files of a table.

    Attributes:
      folder: the folder that the table is in.
      prefix: the folder of its files, relative to `folder`.
    """

    folder: Path
    prefix: str

    def write(self, column: str, row: str, suffix: str, content: bytes) -> str:
        """Writes a file and returns its path relative to the table."""
        path = Path(self.prefix, column, f"{row}.{suffix}")
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(content)
        return path.as_posix()


Cell = Callable[[Any, str, Files], str]


def write_table(sources: Mapping[str, Source], columns: Mapping[str, int], path: Path) -> int:
    """Writes a dataset as a CSV file and returns the number of its rows.

    Classes are written by name, arrays of numbers as JSON lists, images and audio as files: those that are stored as a
    file stay as they are, pixels become PNG and samples WAV. The column `split` names the split of each row.

    Args:
      sources: the splits, by the name that the column `split` gives them.
      columns: the features to write, and of audio stored as samples its rate in Hz (of others 0).
      path: the CSV file; its files are in the folder of the same name without `.csv`. Neither exists before.

    Raises:
      UserError: the path exists, or a feature has no form in a table.
    """
    folder = path.with_suffix("")
    if path.suffix != ".csv":
        raise UserError("must end in .csv", path="--output", value=str(path))
    for existing in (path, folder):
        if os.path.lexists(existing):
            raise UserError("exists already", path="--output", value=str(existing))
    if SPLIT in columns:
        raise UserError("a feature of this name would be read as the split", path="--config", value=SPLIT)
    cells = {name: _cell(name, rate, next(iter(sources.values()))) for name, rate in columns.items()}
    target, count = Files(path.parent, folder.name), 0
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([SPLIT, *columns])
    try:
        for split, source in sources.items():
            for number, row in enumerate(iterate(source.rows, np.arange(len(source.rows)))):
                name = f"{split}-{number}"
                writer.writerow(
                    [split, *("" if row[c] is None else cell(row[c], name, target) for c, cell in cells.items())]
                )
                count += 1
        files.write_text(path, text.getvalue())
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return count


def _cell(name: str, rate: int, source: Source) -> Cell:
    """Returns the function that writes a feature's values as cells."""
    feature = source.features.get(name, Feature("other"))
    classes = source.class_names.get(name) or feature.class_names
    if feature.form == "class" and classes:
        return lambda value, row, target: classes[int(value)]
    if feature.form == "classes" and classes:
        return lambda value, row, target: json.dumps([classes[int(item)] for item in value])
    if feature.form in ("text", "bytes"):
        return lambda value, row, target: value.decode() if isinstance(value, bytes) else str(value)
    if feature.form == "image" or (feature.form == "array[3]" and feature.dtype == "uint8"):
        return lambda value, row, target: target.write(name, row, *_image(value))
    if feature.form in ("audio", "array[1]") and rate:
        return lambda value, row, target: target.write(name, row, *_audio(value, rate))
    if feature.form in ("number", "class"):
        return lambda value, row, target: str(np.asarray(value).item())
    if feature.form.startswith("array"):
        return lambda value, row, target: json.dumps(np.asarray(value).tolist())
    raise UserError(f"holds {feature}, which this command cannot write in a table", path="--config", value=name)


def _image(value: Any) -> tuple[str, bytes]:
    if isinstance(value, bytes):
        with Image.open(io.BytesIO(value)) as image:
            return (image.format or "png").lower().replace("jpeg", "jpg"), value
    file, pixels = io.BytesIO(), np.asarray(value)
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
    return "png", file.getvalue()


def _audio(value: Any, rate: int) -> tuple[str, bytes]:
    samples, file = np.asarray(value), io.BytesIO()
    subtype = {"int16": "PCM_16", "int32": "PCM_32"}.get(samples.dtype.name, "FLOAT")
    stored = samples if subtype.startswith("PCM") else samples.astype(np.float32)
    soundfile.write(file, stored, rate, subtype=subtype, format="WAV")
    return "wav", file.getvalue()
