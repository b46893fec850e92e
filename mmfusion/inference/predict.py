"""Predicts the rows of a CSV file with a trained run."""

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfusion.errors import UserError
from mmfusion.inference import rows as input_rows
from mmfusion.inference.predictions import Predictions
from mmfusion.inference.trained_model import TrainedModel
from mmfusion.training.restore import open_run


def predict(workdir: str | Path, source: str | Path, target: str | Path) -> tuple[int, list[str]]:
    """Predicts every row of a CSV file.

    The CSV file has one column per modality, named after the modality or its feature: text, or the path of an image,
    audio or video file, relative to the CSV file. A table has one column per feature; nodes and edges of a graph are
    JSON. A modality with an empty cell or a missing column is absent.

    Args:
      workdir: the run's directory.
      source: the CSV file, UTF-8 with a header.
      target: the CSV file to write, atomically: the row's index, each task's label (or value) and class probabilities,
        and `error` for an unreadable row.

    Returns:
      The number of predicted rows, and a line for each unreadable row.

    Raises:
      UserError: no such run or file, or a table without any of the run's modalities.
    """
    source, target = Path(source), Path(target)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError("must be a file in an existing folder", path=f"--output={target}")
    header, rows = _read_table(source)
    run = open_run(workdir, [])
    input_rows.check_columns(run.dataset.reader, header, f"--input={source}")
    model, size = TrainedModel(run), run.config.batch_size
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    errors: list[str] = []
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _header(run.dataset.class_names))
            writer.writeheader()
            for first in range(0, len(rows), size):
                predicted = model.predict(rows[first : first + size], source.parent)
                for number, cells in enumerate(_cells(predicted), start=first):
                    writer.writerow({"row": number, **cells})
                    if cells["error"]:
                        errors.append(f"row {number}: {cells['error']}")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", path=f"--output={target}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows) - len(errors), errors


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot be read as a CSV table: {error}", path=f"--input={path}") from error
    if not header:
        raise UserError("is empty; its first line must have the column names", path=f"--input={path}")
    return header, rows


def _header(class_names: Mapping[str, Sequence[str]]) -> list[str]:
    header = ["row"]
    for task, names in class_names.items():
        header += [task, *(f"{task}: {name}" for name in names)]
    return [*header, "error"]


def _cells(predicted: Predictions) -> Iterator[dict[str, Any]]:
    """Yields the cells of each row without its index."""
    for i, error in enumerate(predicted.errors):
        cells: dict[str, Any] = {}
        for name, task in predicted.tasks.items() if not error else ():
            if task.values is not None:
                cells[name] = f"{task.values[i]:.6g}"
            if task.probabilities is not None:
                label = task.labels[i]
                cells[name] = label if isinstance(label, str) else "|".join(label)
                shares = zip(task.classes, task.probabilities[i], strict=True)
                cells |= {f"{name}: {class_name}": f"{share:.6f}" for class_name, share in shares}
        yield {**cells, "error": error}
