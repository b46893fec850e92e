"""Reads rows of arrays, encoded bytes, file paths and text into batches of fixed size, with an error per bad row."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.data.batch import Batch
from mmfusion.data.decoding import BadRow, Reader, empty_batch, fill_row
from mmfusion.data.modalities import feature_names
from mmfusion.errors import UserError

FILE_TYPES = ("image", "audio", "video")  # modality types whose string values are file paths

Row = Mapping[str, Any]


def check_columns(reader: Reader, columns: Sequence[str], path: str) -> None:
    """Checks that at least one column is a modality of the model.

    Args:
      reader: the reader of the run.
      columns: column names of the rows.
      path: the source of the rows, for the error message.

    Raises:
      UserError: no column has the name of a modality or of its feature.
    """
    wanted, known = [], set()
    for modality, options in reader.modalities.items():
        names = feature_names(options)
        wanted += names if len(names) > 1 else [modality]
        known |= {modality, *names}
    if not known & set(columns):
        raise UserError(
            f"must have one of the columns {', '.join(wanted)}; it has {', '.join(map(str, columns)) or 'none'}",
            path=path,
        )


def batches(
    reader: Reader, rows: Sequence[Row], batch_size: int, folder: str | Path = "."
) -> Iterator[tuple[Batch, list[str]]]:
    """Yields batches of `batch_size` rows and the error of each row, "" for a readable row.

    The last batch is padded, so that all batches have the shapes of one compiled program. A row with an error has
    weight 0, like padding.

    Args:
      reader: the reader of the run; its targets are ignored.
      rows: values keyed by modality or feature name. A modality without a value is absent.
      batch_size: rows per batch.
      folder: the folder that file paths are relative to.
    """
    untargeted = Reader(reader.modalities, {}, {}, reader.fitted)
    for first in range(0, len(rows), batch_size):
        batch = empty_batch(reader, batch_size)
        errors = []
        for i, row in enumerate(rows[first : first + batch_size]):
            error = ""
            try:
                fill_row(batch, i, _raw(untargeted, row, Path(folder)), first + i, untargeted)
            except BadRow as bad:
                error = str(bad).partition(", ")[2]
            else:
                if not any(batch.present[m][i] for m in reader.modalities):
                    error = "every modality is absent"
            if error:
                batch.weight[i] = 0
            errors.append(error)
        yield batch, errors


def _raw(reader: Reader, row: Row, folder: Path) -> dict[str, Any]:
    """Returns the row in the format of a dataset: values by feature name, files as bytes."""
    raw: dict[str, Any] = {}
    for modality, options in reader.modalities.items():
        names = feature_names(options)
        for name in names:
            value = _value(row, modality, name, only=len(names) == 1)
            raw[name] = _content(value, modality, folder) if options["kind"] in FILE_TYPES else value
    return raw


def _content(value: Any, modality: str, folder: Path) -> Any:
    """Returns the bytes of a file for a path; other values as bytes, an array or frames."""
    if isinstance(value, str | os.PathLike) and str(value):
        try:
            return (folder / value).read_bytes()
        except OSError as error:
            raise BadRow(f"row, {modality}: {value}: {error.strerror}") from error
    if isinstance(value, str | bytes | list | tuple):
        return value
    if not hasattr(value, "__array__"):
        raise BadRow(f"row, {modality}: must be an array, bytes or a file path, got {type(value).__name__}")
    return np.asarray(value)


def _value(row: Row, modality: str, feature: str, only: bool) -> Any:
    """Returns a feature's value, keyed by its modality if that has one feature or a mapping, or by its own name."""
    by_modality = row.get(modality)
    if only and by_modality is not None:
        return by_modality
    if isinstance(by_modality, Mapping) and feature in by_modality:
        return by_modality[feature]
    value = row.get(feature)
    return "" if value is None else value
