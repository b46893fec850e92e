"""Checks the files of prepared datasets before TFDS reads them, as TFDS imports the modules that they name."""

import functools
import json
import stat
from collections.abc import Iterator
from typing import Any

from etils import epath, epy

from mmfusion.errors import UserError, storage_errors

with epy.lazy_imports():
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming
    from tensorflow_datasets.core.utils import file_utils

FEATURES = "features.json"
SUFFIXES = (".json", ".txt")  # of the files that TFDS reads whole as a dataset is opened
BYTES = 64 << 20
NESTING = 100  # objects and lists within each other; it is also the limit of protocol buffers
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # the last one was written by TFDS 4.2 and earlier
LEVELS = 2  # folders in that of a dataset: the variant and the version


def check_prepared(name: str, data_dir: str, package: str = "") -> None:
    """Checks every prepared version of a dataset.

    Args:
      name: the dataset's name in TFDS, with or without its variant and version.
      data_dir: where datasets are prepared; empty: TFDS's default.
      package: the Python package of the dataset's builder, whose classes of features are accepted, too.

    Raises:
      UserError: a file is too large or no regular file, or names a class of features that is not TFDS's.
      ValueError: no name of a dataset.
    """
    dataset, _ = naming.parse_builder_name_kwargs(name)  # TFDS refuses a second data_dir, in the name
    for folder in file_utils.list_data_dirs(data_dir or None):
        with storage_errors(f"config.data.dir={folder}"):
            versions = list(_versions(epath.Path(folder).expanduser() / dataset.name, LEVELS))
        for version in versions:
            for path in version.iterdir():
                if path.suffix in SUFFIXES and not path.is_dir():
                    _check_file(path)
            if (version / FEATURES).exists():
                check_features(version / FEATURES, package)


def _versions(folder: epath.Path, levels: int) -> Iterator[epath.Path]:
    """Yields the folders that hold a prepared dataset."""
    if not folder.is_dir():
        return
    if any((folder / name).exists() for name in (FEATURES, "dataset_info.json")):
        yield folder
    for inner in folder.iterdir() if levels else ():
        yield from _versions(inner, levels - 1)


def _check_file(path: epath.Path) -> None:
    if "://" not in str(path) and not stat.S_ISREG(path.stat().mode or 0):
        raise UserError("must be a regular file", path=str(path))
    size = path.stat().length
    if size > BYTES:
        raise UserError(f"has {size:,} bytes, more than {BYTES:,}", path=str(path))


def check_features(path: epath.PathLike, package: str = "") -> None:
    """Checks the classes that a `features.json` names; for arguments and errors see `check_prepared`."""
    path = epath.Path(path)
    _check_file(path)
    try:
        classes = list(_classes(json.loads(path.read_text())))
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"cannot be read: {reason}", path=str(path)) from error
    for name in classes:
        if name not in feature_classes() and not (package and name.startswith(f"{package}.")):
            message = f"names the class {name!r}, which is none of TFDS's features and is not imported"
            raise UserError(message, path=str(path))


def _classes(value: Any, depth: int = 0) -> Iterator[str]:
    """Yields the names of classes in a JSON value, and in strings that are JSON."""
    if depth > NESTING:
        raise RecursionError
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            return  # TFDS reads it as JSON in the same way, or not at all
    if isinstance(value, dict):
        for key in CLASS_KEYS:
            if isinstance(value.get(key), str) and (key != "type" or "content" in value):
                yield value[key]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _classes(inner, depth + 1)


@functools.cache
def feature_classes() -> frozenset[str]:
    """Returns the names of TFDS's classes of features."""
    classes = [
        kind
        for kind in vars(tfds.features).values()
        if isinstance(kind, type) and issubclass(kind, tfds.features.FeatureConnector)
    ]
    names = {f"{kind.__module__}.{kind.__name__}" for kind in classes}
    return frozenset(names.union(*(vars(kind).get("ALIASES", ()) for kind in classes)))
