"""Predicts the rows of a table in a file with a trained run."""

import base64
import csv
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmfusion.data.regular_files import check_output
from mmfusion.data.summary import describe_unknown
from mmfusion.data.table import canonical
from mmfusion.data.table_file import Table, open_table
from mmfusion.errors import UserError
from mmfusion.files import to_builtin
from mmfusion.inference.columns import Columns, bind, names_read, read_row
from mmfusion.inference.predictions import Predictions, TaskPredictions
from mmfusion.inference.rows import Row
from mmfusion.inference.trained_model import TrainedModel
from mmfusion.training.restore import Run, open_run

EXPLAIN_ROWS = 32  # a row takes about a hundred gradients
REPORTED = 10  # rows with an error that are returned; the output has all of them


def predict(
    workdir: str | Path,
    source: str | Path,
    target: str | Path,
    *,
    allow_missing: bool = False,
    report: Callable[[str], None] | None = None,
    explain: Callable[[TrainedModel, Mapping[int, Row], Path, int], None] | None = None,
    explain_rows: int = EXPLAIN_ROWS,
    **options: Any,
) -> tuple[int, int, list[str]]:
    """Predicts every row of a table, in constant memory.

    The table has a column per modality, named after the modality or its feature: text, or the path of an image, audio
    or video file, relative to the table. A table modality has a column per feature; a vector is a list (as JSON in
    CSV), or the columns NAME_0, NAME_1, ...; sequences, paths of several images, and nodes and edges of a graph are
    lists. An empty cell or a null is an absent modality.

    Args:
      workdir: the run's directory.
      source: a file of `data.table_file`: CSV, TSV, JSON Lines, JSON or Parquet.
      target: the CSV file to write, atomically: the row's number from 0, the columns that the run does not read, each
        task's label (or value) and class probabilities, what `options` request, and `error`: why the row could not be
        predicted.
      allow_missing: whether the table may lack columns of the run, which then count as absent.
      report: given lines about words and categories that training did not have, and columns of labels without any;
        None: not reported.
      explain: called when the output is written, with the model, the first predicted rows by number, the folder of
        their files, and the number of predicted rows.
      explain_rows: the number of rows that `explain` is given at most.
      **options: `calibrated`, `intervals`, `sets` and `contributions` of `TrainedModel.predict`.

    Returns:
      The number of predicted rows, the number of all rows, and a line for each of the first ten rows with an error.

    Raises:
      UserError: no such run or file, a damaged file, a missing column, or an option that the run cannot give; or no row
        could be predicted, in which case the output has the reasons.
    """
    source, label = Path(source), f"--input={source}"
    table = open_table(source, label)
    output = check_output(target, "--output", [source])
    run = open_run(workdir, [])
    bound = bind(run.dataset.reader, table.columns, label, allow_missing=allow_missing)
    unlabelled = _unlabelled_columns(run, table)  # reads it: damage further down is refused before hours of predictions
    model = TrainedModel(run, small_batch=0)  # one program, for the last rows of the table, too
    header = _header(model.predict([], **options))
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    kept: dict[int, Row] = {}
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x", newline="", encoding="utf-8") as file:  # and follows no link
            unknown: Counter = Counter()
            rows = _predicted_rows(model, table, bound, run.config.batch_size, options, unknown)
            rows = _keep_first(rows, bound, explain_rows if explain else 0, kept)
            predicted, total, errors = _write(file, rows, table.columns, names_read(bound), header)
        temporary.replace(output)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", path=f"--output={target}") from error
    finally:
        temporary.unlink(missing_ok=True)
    if report:
        for name in unlabelled:
            report(f"{source}: no row has a label in column {name!r}; all are predicted")
        for modality, what in sorted({key[:2] for key in unknown}):
            if line := describe_unknown(modality, what, unknown[modality, what, 0], unknown[modality, what, 1]):
                report(line)
    if total and not predicted:
        raise UserError(f"no row could be predicted; column error of {target} says why ({errors[0]})", path=label)
    if explain and kept:
        explain(model, kept, source.parent, predicted)
    return predicted, total, errors


def _keep_first(
    rows: Iterator[tuple[int, Mapping[str, Any], dict[str, Any]]], bound: Columns, limit: int, kept: dict[int, Row]
) -> Iterator[tuple[int, Mapping[str, Any], dict[str, Any]]]:
    """Yields the rows, and adds the first ones without an error to `kept`, as the model takes them."""
    for number, row, cells in rows:
        if len(kept) < limit and not cells["error"]:
            kept[number] = read_row(bound, row)
        yield number, row, cells


def _unlabelled_columns(run: Run, table: Table) -> list[str]:
    """Returns the columns of targets in which no row has a label; -1 is none where it is no class."""
    empty = {}
    for task, options in run.dataset.reader.targets.items():
        if options["feature"] in table.columns:
            numbered = options["kind"] == "classification" and "-1" not in run.dataset.class_names[task]
            empty[options["feature"]] = ("", "-1") if numbered else ("",)
    for _, row, _ in table:
        if row is not None:
            empty = {name: none for name, none in empty.items() if canonical(row[name]) in none}
    return list(empty)


def _predicted_rows(
    model: TrainedModel, table: Table, bound: Columns, batch_size: int, options: Mapping[str, Any], unknown: Counter
) -> Iterator[tuple[int, Mapping[str, Any], dict[str, Any]]]:
    """Yields each row's number, its values in the table, and the cells of its predictions with its error.

    Adds unknown values, and all values, to `unknown` under (modality, what, 0) and (modality, what, 1).
    """
    rows = iter(table)
    while batch := list(itertools.islice(rows, batch_size)):
        readable = [read_row(bound, row) for _, row, _ in batch if row is not None]
        found = model.predict(readable, table.path.parent, **options)
        for key, counts in found.unknown.items():
            unknown.update({(*key, 0): counts[0], (*key, 1): counts[1]})
        cells = _cells(found)
        for number, row, error in batch:
            yield (number, {}, {"error": error}) if row is None else (number, row, next(cells))


def _write(
    file: IO[str],
    rows: Iterator[tuple[int, Mapping[str, Any], dict[str, Any]]],
    columns: Sequence[str],
    read: Collection[str],
    predictions: Sequence[str],
) -> tuple[int, int, list[str]]:
    """Writes the output; for the result see `predict`."""
    carried = _carried(columns, read, {"row", *predictions})
    writer = csv.DictWriter(file, ["row", *carried.values(), *predictions])
    writer.writeheader()
    predicted, total, errors = 0, 0, []
    for number, row, cells in rows:
        values = {name: _text(row[column]) for column, name in carried.items()} if row else {}
        writer.writerow({"row": number, **values, **cells})
        total += 1
        predicted += not cells["error"]
        if cells["error"] and len(errors) < REPORTED:
            errors.append(f"row {number}: {cells['error']}")
    return predicted, total, errors


def _header(predicted: Predictions) -> list[str]:
    """Returns the columns of predictions; raises UserError if a class has the name of another column."""
    header: list[str] = []
    for name, task in predicted.tasks.items():
        header += [name, *(f"{name}: {class_name}" for class_name in task.classes), *_added(name, task)]
    (column, count), *_ = Counter(header).most_common(1)
    if count > 1:
        raise UserError("would be the name of several columns: a class has the name of another column", path=column)
    return [*header, "error"]


def _added(name: str, task: TaskPredictions) -> dict[str, Callable[[int], str]]:
    """Returns per column that was requested, the function of a row's position to its cell."""
    added: dict[str, Callable[[int], str]] = {}
    if task.intervals is not None:
        ends = task.intervals
        added |= {f"{name}: low": lambda i: f"{ends[i, 0]:.6g}", f"{name}: high": lambda i: f"{ends[i, 1]:.6g}"}
    if task.sets is not None:
        sets = task.sets
        added[f"{name}: set"] = lambda i: "|".join(sets[i] or ())
    for modality, share in (task.contributions or {}).items():
        added[f"{name}: contribution of {modality}"] = lambda i, share=share: f"{share[i]:.6g}"
    return added


def _carried(columns: Sequence[str], read: Collection[str], taken: Collection[str]) -> dict[str, str]:
    """Returns the names in the output of the columns that are not read."""
    names = {}
    for column in columns:
        if column not in read:
            name = column
            while name in taken or (name != column and name in columns):
                name = f"input: {name}"
            names[column] = name
    return names


def _text(value: Any) -> str:
    """Returns a raw value as a cell: lists as JSON, bytes in base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, bool | list | tuple | dict | np.ndarray):
        return json.dumps(to_builtin(value), ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def _cells(predicted: Predictions) -> Iterator[dict[str, Any]]:
    """Yields the predictions of each row and its error."""
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
            cells |= {column: cell(i) for column, cell in _added(name, task).items()}
        yield {**cells, "error": error}
