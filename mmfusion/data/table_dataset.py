"""A table in a file as a dataset: its splits, its labels as classes, and its files as bytes."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mmfusion import files
from mmfusion.data.features import Feature
from mmfusion.data.holdout import holdout_split, makes_test
from mmfusion.data.modalities import feature_names
from mmfusion.data.regular_files import read_file
from mmfusion.data.sources import Source
from mmfusion.data.table import canonical
from mmfusion.data.table_file import FORMATS, open_table
from mmfusion.data.table_schema import is_missing, parse_list
from mmfusion.data.targets import is_missing as is_missing_label
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig, TargetConfig

FILE_KINDS = ("image", "images", "audio", "video")  # modality types whose strings are paths of files
SPLIT_NAMES = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test", "testing": "test",
}  # fmt: skip
SPLIT_COLUMN = "split"


@dataclasses.dataclass(frozen=True)
class TableFile:
    """A table that has been read.

    Attributes:
      path: the file.
      columns: the names of its columns.
      rows: its rows; of one that cannot be read, every value is None.
      rejected: the numbers of the rows that cannot be read, from 0, and why.
      digest: of the file's content.
    """

    path: Path
    columns: list[str]
    rows: list[dict[str, Any]]
    rejected: dict[int, str]
    digest: str


def is_table(name: str) -> bool:
    """Returns whether a dataset's name is the path of a table."""
    lower = name.lower().removesuffix(".gz")
    return lower.endswith(tuple(FORMATS)) and not name.startswith("pair:")


def read_table(path: str | os.PathLike) -> TableFile:
    """Reads a table into memory, once for as long as the file stays the same; see `table_file.open_table`."""
    path = Path(path).absolute()
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}", path=str(path)) from error
    return _read_table(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=2)
def _read_table(path: Path, modified: int, size: int) -> TableFile:
    table, rows, rejected = open_table(path), [], {}
    for number, row, error in table:
        rows.append(row if row is not None else dict.fromkeys(table.columns))
        if row is None:
            rejected[number] = error
    return TableFile(path, table.columns, rows, rejected, xxhash.xxh3_64(path.read_bytes()).hexdigest())


class TableRow(Mapping):
    """A row of a table; its files are read when their columns are."""

    def __init__(self, values: Mapping[str, Any], convert: Mapping[str, Callable[[Any], Any]]):
        self._values, self._convert = values, convert

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __getitem__(self, name: str) -> Any:
        convert = self._convert.get(name)
        return self._values[name] if convert is None else convert(self._values[name])


class TableRows(Sequence):
    """The rows of a table with the content of files and the numbers of classes.

    A file that cannot be read is an OSError in its place, which makes its row unreadable.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]] | Mapping[int, Mapping[str, Any]],
        convert: Mapping[str, Callable[[Any], Any]],
    ):
        self._rows, self._convert = rows, convert

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> TableRow:
        return TableRow(self._rows[row], self._convert)

    def part(self, ids: Sequence[int]) -> "TableRows":
        """Returns the rows of these ids alone, under the same ids, for another process."""
        return TableRows({i: self._rows[i] for i in ids}, self._convert)

    def column(self, name: str, ids: np.ndarray) -> list[Any]:
        """Returns the values of one column in the rows `ids` `[n]`."""
        convert = self._convert.get(name, lambda value: value)
        return [convert(self._rows[i][name]) for i in ids.tolist()]


def open_table_source(config: "DataConfig", class_names: Mapping[str, Sequence[str]] | None = None) -> Source:
    """Opens the table of a config; its rows are those of all splits, which `members` tells apart.

    Args:
      config: the `data` section of a config.
      class_names: per task the classes of a run; None: the values of the labels in the training rows.

    Raises:
      UserError: the table cannot be read, too many of its rows cannot, none has a label, or its column `split` has
        another value.
    """
    for split in ("train", "valid", "test"):
        if getattr(config, split) not in ("", split):
            message = f"must be {split!r}: the rows of a table have no slices, but a column split"
            raise UserError(message, path=f"config.data.{split}", value=getattr(config, split))
    table = read_table(config.name)
    total = len(table.rows)
    if len(table.rejected) > config.max_bad_fraction * total:
        number, reason = next(iter(table.rejected.items()))
        raise UserError(
            f"{len(table.rejected)} of {total} rows of {table.path} cannot be read; correct them or raise the limit; "
            f"the first: row {number}: {reason}",
            path="config.data.max_bad_fraction",
            value=config.max_bad_fraction,
        )
    labelled = _labelled(table, config)
    members = _members(table, labelled, config)
    if class_names is None:
        if not labelled.any():
            features = "+".join(target.feature for target in config.targets.values())
            raise UserError("has no label in any row", path=str(table.path), value=features)
        names = _class_names(table, members["train"], config)
    else:
        names = {
            target.feature: tuple(class_names[task])
            for task, target in config.targets.items()
            if class_names[task] and _has_names(table, target)
        }
    readers = {
        name: functools.partial(_read_files if section.kind == "images" else _read_file, str(table.path.parent))
        for section in config.modalities.values()
        for name in feature_names(section.to_dict())
        if section.kind in FILE_KINDS and name in table.columns
    }
    labels = {
        target.feature: _labeller(target.kind, names.get(target.feature, ()))
        for target in config.targets.values()
        if target.feature in table.columns
    }
    return Source(
        TableRows(table.rows, {**readers, **labels}),
        names,
        f"{table.path.name}:{table.digest}",
        {  # numbers of classes even where there is one for each class
            target.feature: Feature("classes", class_names=names[target.feature])
            for target in config.targets.values()
            if target.kind == "multilabel" and target.feature in names
        },
        members=members,
        rejected=table.rejected,
        notes=_notes(table, sum(map(len, members.values()))) + _split_notes(table, members, config),
        describe_files=functools.partial(_describe_files, table, readers),
    )


def _labelled(table: TableFile, config: "DataConfig") -> np.ndarray:
    """Returns the mask `[n]` of the rows that can be read and have a label."""
    features = [target.feature for target in config.targets.values() if target.feature in table.columns]
    labelled = np.array([any(not is_missing_label(row[name]) for name in features) for row in table.rows], bool)
    if not features:  # an error of its own
        labelled[:] = True
    labelled[list(table.rejected)] = False
    return labelled


def _notes(table: TableFile, kept: int) -> tuple[str, ...]:
    notes = []
    if unlabelled := len(table.rows) - len(table.rejected) - kept:
        notes.append(f"{unlabelled:,} of {len(table.rows):,} rows have no label and are left out")
    for number, reason in itertools.islice(table.rejected.items(), 1):
        notes.append(f"{len(table.rejected):,} rows cannot be read and are left out; the first: row {number}: {reason}")
    return tuple(notes)


def _split_notes(table: TableFile, members: Mapping[str, np.ndarray], config: "DataConfig") -> tuple[str, ...]:
    """Returns a line on where the test split is from, unless it is made of the rows of train."""
    test = len(members["test"])
    if SPLIT_COLUMN in table.columns:
        return (f"test is {test:,} rows of the column {SPLIT_COLUMN!r}",) if not makes_test(config) else ()
    if makes_test(config):
        return ()
    line = f"test is {test:,} rows held out of the table"
    line += (
        ", stratified by class" if any(target.kind == "classification" for target in config.targets.values()) else ""
    )
    return (line + (f", by groups of {config.group!r}" if config.group else ""),)


def _members(table: TableFile, labelled: np.ndarray, config: "DataConfig") -> dict[str, np.ndarray]:
    """Returns the ids of each split: of the column `split`, or a test split made of groups and stratified.

    Where the test split is made of rows of train, all rows without a column `split` are train. Rows without a label are
    in none, unless no row of the test split has one.
    """
    readable = np.ones(len(labelled), bool)
    readable[list(table.rejected)] = False
    ids = np.flatnonzero(labelled if labelled.any() else readable)
    if SPLIT_COLUMN in table.columns:
        ids = np.flatnonzero(readable)
        names = [canonical(table.rows[i][SPLIT_COLUMN]).lower() for i in ids]
        unknown = set(names) - set(SPLIT_NAMES)
        if unknown:
            value = min(unknown)
            raise UserError("names no split", path="column split", value=value, choices=("train", "valid", "test"))
        splits = np.array([SPLIT_NAMES[name] for name in names])
        if "valid" in splits and config.time:
            message = (
                "makes the split valid itself, and the column split of the table has such rows; leave out one of them"
            )
            raise UserError(message, path="config.data.time", value=config.time)
        if "valid" in splits and not config.valid:
            message = "must be 'valid', as the column split of the table has such rows"
            raise UserError(message, path="config.data.valid", value=config.valid)
        members = {split: ids[splits == split] for split in ("train", "valid", "test")}
        kept = {split: own[labelled[own]] for split, own in members.items()}
        return kept if len(kept["test"]) else {**kept, "test": members["test"]}
    if config.group and config.group not in table.columns:
        raise UserError("no such column", path="config.data.group", value=config.group, choices=table.columns)
    if makes_test(config):
        return {"train": ids, "valid": ids[:0], "test": ids[:0]}
    groups = [canonical(table.rows[i][config.group]) for i in ids] if config.group else [str(i) for i in ids]
    classes = [target.feature for target in config.targets.values() if target.kind == "classification"]
    labels = [canonical(table.rows[i][classes[0]]) for i in ids] if classes else None
    test = holdout_split((f"test {group}" for group in groups), config.test_fraction, labels)
    test |= config.test_fraction >= 1  # another table, to evaluate a run on
    return {"train": ids[~test], "valid": ids[:0], "test": ids[test]}


def _class_names(table: TableFile, train: np.ndarray, config: "DataConfig") -> dict[str, tuple[str, ...]]:
    """Returns the classes of each label column in the training rows: numbers in order, then strings in order."""
    result = {}
    for target in config.targets.values():
        if target.kind == "regression" or not _has_names(table, target):
            continue
        values = [table.rows[i][target.feature] for i in train]
        values = [value for value in values if not is_missing_label(value)]
        if target.kind == "multilabel":
            values = [item for value in values for item in parse_list(value)]
        result[target.feature] = tuple(sorted({canonical(value) for value in values}, key=_class_order))
    return result


def _has_names(table: TableFile, target: "TargetConfig") -> bool:
    """Returns whether a table has a column of labels that are names of classes, and no lists of numbers."""
    if target.feature not in table.columns or target.kind != "multilabel":
        return target.feature in table.columns
    lists = (parse_list(row[target.feature]) for row in table.rows if not is_missing_label(row[target.feature]))
    return all(isinstance(value, list) and all(isinstance(item, str) for item in value) for value in lists)


def _class_order(name: str) -> tuple[bool, float, str]:
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name


def _read_file(folder: str, value: Any) -> Any:
    if is_missing(value):
        return None
    if not isinstance(value, str):
        return value  # pixels or samples, of a Parquet table
    try:
        return read_file(os.path.join(folder, value)) or OSError(f"{value}: empty file")
    except (OSError, ValueError) as error:  # ValueError: a NUL character in a path
        return OSError(f"{value}: {getattr(error, 'strerror', None) or error}")


def _read_files(folder: str, value: Any) -> Any:
    if is_missing(value):
        return None
    contents = [_read_file(folder, path) for path in parse_list(value)]
    return next((content for content in contents if isinstance(content, OSError)), contents)


def _describe_files(table: TableFile, readers: Mapping[str, functools.partial]) -> Iterator[str]:
    """Yields the folder, and the name, size and times of each file in the columns that have a reader."""
    folder = str(table.path.parent)
    yield folder
    for name, reader in sorted(readers.items()):
        for row in table.rows:
            value = row[name]
            for path in parse_list(value) if reader.func is _read_files and not is_missing(value) else [value]:
                if isinstance(path, str):
                    yield f"{path}\0{files.describe(os.path.join(folder, path))}"


def _labeller(kind: str, names: tuple[str, ...]) -> Callable[[Any], Any]:
    index = {name: number for number, name in enumerate(names)}
    return functools.partial(_read_labels if kind == "multilabel" else _read_label, index)


def _read_label(index: Mapping[str, int], value: Any) -> Any:
    if is_missing_label(value):
        return None
    name = canonical(value)
    return index.get(name, -1 if name == "-1" else name) if index else name  # another class is refused later


def _read_labels(index: Mapping[str, int], value: Any) -> Any:
    if is_missing_label(value):
        return None
    values = parse_list(value)
    return [_read_label(index, item) for item in values] if index else np.asarray(values)
