"""Reads rows of arrays, encoded bytes, file paths and text into batches of fixed size, with an error per bad row."""

import contextlib
import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.data.batch import Batch
from mmfusion.data.decoding import BadRow, Reader, empty_batch, fill_row
from mmfusion.data.modalities import feature_names
from mmfusion.data.modality_type import Options
from mmfusion.data.numeric import short
from mmfusion.data.regular_files import read_file
from mmfusion.errors import UserError, one_line

FILE_TYPES = ("image", "audio", "video")  # modality types whose string values are file paths
NEAR = 0.8  # similarity (difflib) of a key to a missing one from which it counts as misspelt

Row = Mapping[str, Any]


def check_columns(reader: Reader, columns: Iterable[Any], path: str) -> None:
    """Checks that at least one column is a modality of the model, and that no column is a misspelt one.

    Args:
      reader: the reader of the run.
      columns: the keys of the rows.
      path: the source of the rows, for the error message.

    Raises:
      UserError: no column has the name of a modality or of its feature, or one is nearly that of a missing modality.
    """
    columns = list(map(str, columns))
    features = {modality: feature_names(options) for modality, options in reader.modalities.items()}
    wanted = [name for modality, names in features.items() for name in (names if len(names) > 1 else [modality])]
    known = {*features, *(name for names in features.values() for name in names)}
    missing = {
        name.lower(): name
        for modality, names in features.items()
        if not {modality, *names} & set(columns)
        for name in (modality, *names)
    }
    for column in columns:
        near = difflib.get_close_matches(column.lower(), missing, n=1, cutoff=NEAR) if column not in known else ()
        if near:
            raise UserError("is read by no modality", path=path, value=column, choices=[missing[near[0]]])
    if not known & set(columns):
        raise UserError(
            f"must have one of the columns {', '.join(wanted)}; it has {', '.join(columns) or 'none'}", path=path
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
    # Each modality is read by itself, as two modalities may be given different values of the same feature.
    readers = {
        m: Reader({m: options}, {}, {}, reader.fitted, reader.class_names) for m, options in reader.modalities.items()
    }
    for first in range(0, len(rows), batch_size):
        batch = empty_batch(reader, batch_size)
        errors = []
        for i, row in enumerate(rows[first : first + batch_size]):
            error = _fill(batch, i, row, first + i, readers, Path(folder))
            if error:
                batch.weight[i], batch.id[i] = 0, -1
                for arrays in (batch.inputs, batch.mask, batch.present):
                    for array in arrays.values():
                        array[i] = 0
            errors.append(error)
        yield batch, errors


def _fill(batch: Batch, i: int, row: Row, row_id: int, readers: Mapping[str, Reader], folder: Path) -> str:
    """Decodes a row into a position of a batch, and returns its error."""
    for modality, reader in readers.items():
        try:
            fill_row(batch, i, _raw(modality, reader.modalities[modality], row, folder), row_id, reader)
        except BadRow as bad:
            return str(bad).partition(", ")[2]
        # Decoders expect values of the dataset's types, and may raise any of these for others.
        except (TypeError, AttributeError, LookupError, ArithmeticError, UserError) as error:
            return f"{modality}: a value of the wrong type ({type(error).__name__}: {one_line(error)})"
    return "" if any(batch.present[m][i] for m in readers) else "every modality is absent"


def _raw(modality: str, options: Options, row: Row, folder: Path) -> dict[str, Any]:
    """Returns the modality's values in the format of a dataset: by feature name, files as bytes."""
    names, raw = feature_names(options), {}
    for name in names:
        value = _value(row, modality, name, only=len(names) == 1)
        try:
            raw[name] = _converted(value, name, options, folder)
        except (ValueError, OverflowError) as error:
            raise BadRow(f"row, {modality}: {error}") from error
    return raw


def _value(row: Row, modality: str, feature: str, only: bool) -> Any:
    """Returns a feature's value, keyed by its modality if that has one feature or a mapping, or by its own name."""
    by_modality = row.get(modality)
    if only and by_modality is not None:
        return by_modality
    if isinstance(by_modality, Mapping) and feature in by_modality:
        return by_modality[feature]
    value = row.get(feature)
    return "" if value is None else value


def _converted(value: Any, feature: str, options: Options, folder: Path) -> Any:
    if options["kind"] in FILE_TYPES:
        return _content(value, options["kind"], folder)
    if options["kind"] == "images":
        return _contents(value, folder)
    if (
        options["kind"] in ("text", "table", "knowledge")
        and not is_numeric(options, feature)
        and (isinstance(value, list | tuple | Mapping) or getattr(value, "ndim", 0))
    ):
        raise ValueError(f"{feature!r} must be a string, got {type(value).__name__}")
    return value


def _content(value: Any, kind: str, folder: Path) -> Any:
    """Returns the bytes of a file for a path; other values as bytes, an array or frames."""
    if isinstance(value, str | os.PathLike) and str(value):
        try:
            content = read_file(folder / value)
        except OSError as error:
            raise ValueError(f"{short(value)}: {error.strerror}") from error
        if not content:
            raise ValueError(f"{short(value)}: empty file")
        return content
    if kind == "audio" and isinstance(value, list | tuple):
        return np.asarray(value)  # samples
    if isinstance(value, str | bytes | list | tuple):
        return value
    if not hasattr(value, "__array__"):
        raise ValueError(f"must be an array, bytes or a file path, got {type(value).__name__}")
    return np.asarray(value)


def _contents(value: Any, folder: Path) -> Any:
    """Returns the images of a list, with paths as the bytes of their files; a string is such a list as JSON."""
    if isinstance(value, str) and value:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
        if not isinstance(value, list):
            raise ValueError(f'must be a list of paths, such as ["a.png", "b.png"], got {short(value)}')
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [item if item is None else _content(item, "image", folder) for item in value]
    return value


def is_numeric(options: Options, feature: str) -> bool:
    """Returns whether a feature is a number or a vector: of an embedding, or of a table but no category or date."""
    if options["kind"] == "embedding":
        return True
    return options["kind"] == "table" and feature not in (*options["categorical"], *options.get("dates", ()))
