"""The columns of a table that the modalities of a model are read from."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmfusion.data.decoding import Reader
from mmfusion.data.modalities import feature_names
from mmfusion.errors import UserError
from mmfusion.inference.rows import is_numeric

Columns = dict[str, dict[str, list[str]]]  # modality -> feature -> its column, or those of a vector's elements


def bind(reader: Reader, columns: Sequence[str], path: str, *, allow_missing: bool = False) -> Columns:
    """Returns the columns of a table that the features of a model are read from.

    A modality with one feature is read from the column named after the modality, or else after the feature; one with
    several features from a column named after each. Without such a column, a numeric feature NAME is read from the
    columns NAME_0, NAME_1, ..., one per element of its vector.

    Args:
      reader: the reader of the run.
      columns: the columns of the table.
      path: what errors call the table.
      allow_missing: whether a feature may have no column and count as absent.

    Raises:
      UserError: a column is missing; with `allow_missing`, all of them are.
    """
    bound: Columns = {modality: {} for modality in reader.modalities}
    missing = []
    for modality, options in reader.modalities.items():
        names = feature_names(options)
        for name in names:
            candidates = [modality, name] if len(names) == 1 else [name]
            found = [[candidate] for candidate in candidates if candidate in columns]
            if not found and is_numeric(options, name):
                found = [elements for c in candidates if (elements := _elements(columns, c, path))]
            bound[modality][name] = found[0] if found else []
            if not found:
                missing.append(candidates)
    read = names_read(bound)
    if missing and not (allow_missing and read):
        raise UserError(_missing_message(missing, columns, read, allow_missing), path=path)
    return bound


def _elements(columns: Sequence[str], name: str, path: str) -> list[str]:
    """Returns the columns NAME_0, NAME_1, ...; raises UserError if one of them is missing."""
    matches = (re.fullmatch(rf"{re.escape(name)}_(0|[1-9][0-9]*)", column) for column in columns)
    found = {int(match[1]) for match in matches if match}
    gaps = set(range(len(found))) - found
    if gaps:
        raise UserError(f"has the column {name}_{max(found)}, but not {name}_{min(gaps)}", path=path)
    return [f"{name}_{i}" for i in range(len(found))]


def _missing_message(
    missing: Sequence[Sequence[str]], columns: Sequence[str], read: Collection[str], allow_missing: bool
) -> str:
    unread = [column for column in columns if column not in read]
    near = [match for names in missing for name in names for match in difflib.get_close_matches(name, unread, n=1)]
    hint = f"did you mean {' and '.join(dict.fromkeys(near))}?" if near else f"it has {', '.join(columns[:30])}"
    remedy = "" if allow_missing else "; with --allow-missing, a missing column counts as absent"
    names = ", ".join(names[0] for names in missing)
    return f"has no column{'s' if len(missing) > 1 else ''} {names}, which the run reads ({hint}){remedy}"


def names_read(bound: Columns) -> set[str]:
    """Returns the names of all columns that are read."""
    return {column for features in bound.values() for columns in features.values() for column in columns}


def read_row(bound: Columns, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a table's row by modality, as `TrainedModel.predict` takes them; "" for an absent one."""
    result: dict[str, Any] = {}
    for modality, features in bound.items():
        values = {name: _value(row, columns) for name, columns in features.items()}
        # Not keyed by feature, as a feature may have the name of another modality.
        result[modality] = values if len(values) > 1 else next(iter(values.values()))
    return result


def _value(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    values = ["" if row[column] is None else row[column] for column in columns]
    return values if len(values) > 1 else next(iter(values), "")
