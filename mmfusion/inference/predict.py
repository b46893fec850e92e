"""A run and a table of rows, with paths and text -> a table of labels and probabilities, one row an input row."""

import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfusion.data.modalities import features
from mmfusion.data.rows import BadRow, Reader, empty_batch, fill_row
from mmfusion.errors import UserError
from mmfusion.training.restore import Run, open_run

FILES = ("image", "audio", "video")  # kinds whose cell is a path, relative to the table


def predict(workdir: str | Path, source: str | Path, target: str | Path) -> tuple[int, list[str]]:
    """Predicts every row of a CSV file.

    The CSV file has one column a modality, under the modality's name or its feature's: text, or a path to a picture, a
    recording or a moving picture, relative to the file. A table's columns have their own names; a graph's nodes and
    edges are JSON. What is empty, or has no column, is absent.

    Args:
      workdir: of the run.
      source: the CSV file, UTF-8 with a header.
      target: written whole or not at all: the row's number, each task's label (or number) and class probabilities,
        and `error` where the row could not be read.

    Returns:
      How many rows were predicted, and a line for each that could not be read.

    Raises:
      UserError: no such run or file, or a table without any of the run's modalities.
    """
    source, target = Path(source), Path(target)
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--output={target}: its folder must exist, and it must be a file")
    header, rows = _read_table(source)
    run = open_run(workdir, [])
    columns = _columns(run, header, source)
    run_eval = run.parts.eval_step()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    errors: list[str] = []
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _header(run))
            writer.writeheader()
            for first in range(0, len(rows), run.config.batch_size):
                part = rows[first : first + run.config.batch_size]
                for row in _predict_batch(run, run_eval, part, first, columns, source.parent):
                    writer.writerow(row)
                    if row["error"]:
                        errors.append(f"row {row['row']}: {row['error']}")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(rows) - len(errors), errors


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--input={path} cannot be read as a CSV table: {error}") from error
    if not header:
        raise UserError(f"--input={path} is empty: its first line must name the columns")
    return header, rows


def _columns(run: Run, header: list[str], source: Path) -> dict[str, str]:
    """Returns the column of each feature that the table has: of its own name, or the modality's that it alone makes."""
    columns, wanted = {}, []
    for modality, options in run.dataset.reader.modalities.items():
        names = features(options)
        wanted += names if len(names) > 1 else [modality]
        for name in names:
            for column in (modality, name) if len(names) == 1 else (name,):
                if column in header:
                    columns.setdefault(name, column)
    if not columns:
        raise UserError(
            f"--input={source} has none of the run's columns {', '.join(wanted)}: it has {', '.join(header)}"
        )
    return columns


def _predict_batch(
    run: Run, run_eval: Any, rows: list[dict[str, str]], first: int, columns: Mapping[str, str], folder: Path
) -> Iterator[dict[str, Any]]:
    reader = run.dataset.reader
    untargeted = Reader(reader.modalities, {}, {}, reader.learned)
    batch = empty_batch(reader, run.config.batch_size)  # always full, so that one program serves every batch
    errors = {}
    for i, row in enumerate(rows):
        try:
            fill_row(batch, i, _raw(untargeted, row, columns, folder), first + i, untargeted)
        except BadRow as error:
            errors[i] = str(error).partition(", ")[2]
        else:
            if not any(batch.present[m][i] for m in reader.modalities):
                errors[i] = "every modality is absent"
    result = jax.device_get(run_eval(run.state.params, run.state.batch_stats, run.parts.partitioner.put_batch(batch)))
    for i in range(len(rows)):
        cells = {} if i in errors else _cells(run, {task: logits[i] for task, logits in result["logits"].items()})
        yield {"row": first + i, **cells, "error": errors.get(i, "")}


def _raw(reader: Reader, row: Mapping[str, str], columns: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Returns the row as a dataset would store it: features by name, files as their bytes."""
    raw: dict[str, Any] = {}
    for modality, options in reader.modalities.items():
        for name in features(options):
            raw[name] = cell = row.get(columns.get(name, ""), "") or ""
            if cell and options["kind"] in FILES:
                try:
                    raw[name] = (folder / cell).read_bytes()
                except OSError as error:
                    raise BadRow(f"row, {modality}: {cell}: {error.strerror}") from error
    return raw


def _header(run: Run) -> list[str]:
    header = ["row"]
    for task, names in run.dataset.class_names.items():
        header += [task, *(f"{task}: {name}" for name in names)]
    return [*header, "error"]


def _cells(run: Run, logits: Mapping[str, np.ndarray]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for task, values in logits.items():
        kind, names = run.parts.tasks[task].kind, run.dataset.class_names[task]
        values = values.astype(np.float64)
        if kind == "regression":
            cells[task] = f"{values[0]:.6g}"
            continue
        if kind == "classification":
            shares = np.exp(values - values.max())
            shares /= shares.sum()
            cells[task] = names[int(shares.argmax())]
        else:
            shares = 1 / (1 + np.exp(-values))
            cells[task] = "|".join(name for name, share in zip(names, shares, strict=True) if share >= 0.5)
        cells |= {f"{task}: {name}": f"{share:.6f}" for name, share in zip(names, shares, strict=True)}
    return cells
