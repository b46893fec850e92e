"""Named datasets as random-access rows: any TFDS builder, ours included, or two of them joined by `pair`.

A row is a dict of raw features as stored (pictures stay encoded), the same row number on every machine.
"""

import contextlib
import dataclasses
import errno
import io
import re
import sys
import urllib.error
from collections.abc import Sequence
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download import download_manager, downloader

from mmfusion.data import builders
from mmfusion.data.rows import Chunks, each
from mmfusion.errors import UserError, nearest, storage_errors, warn_renamed

# TFDS would try ten times: more than three minutes until it says that there is no network.
downloader.MAX_RETRIES = 5

# Old names, which work for one version.
RENAMED_DATASETS = {
    "stand_ins": "synthetic",
    "stand_ins/three_pictures": "synthetic/three_images",
    "stand_ins/sound_pictures": "synthetic/audio_images",
}
PAIR = re.compile(r"pair:(?P<first>[^+:]+)\+(?P<second>[^+:]+):by=(?P<by>label|index)$")


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset: rows by number, and what its builder says of them.

    Attributes:
      rows: a random-access sequence of feature dicts.
      class_names: per feature, the names of its classes, where the builder names or counts them.
      version: name, version and split, part of the run's data fingerprint.
    """

    rows: Sequence[dict[str, Any]]
    class_names: dict[str, tuple[str, ...]]
    version: str


@dataclasses.dataclass(frozen=True)
class PreparedRows:
    """A prepared split; a record that does not match its checksum stops the run, since it can be prepared again."""

    rows: Sequence[dict[str, Any]]
    folder: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            return self.rows[row]
        except RuntimeError as error:  # ArrayRecord's, for a file that is missing, cut or changed
            raise UserError(
                f"row {row} of the data prepared under {self.folder} is damaged: remove that folder, and the same "
                f"command prepares it again ({_one_line(error)})"
            ) from error

    def __getitems__(self, rows: Sequence[int]) -> Sequence[dict[str, Any]]:
        try:
            return self.rows.__getitems__(rows)
        except RuntimeError:
            return [self[row] for row in rows]  # which of them it is


@dataclasses.dataclass(frozen=True)
class PairedRows:
    """Row i of `first` beside row `partner[i]` of `second`; a name in both keeps the first's value."""

    first: Sequence[dict[str, Any]]
    second: Sequence[dict[str, Any]]
    partner: np.ndarray
    prefix: str

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        both = zip(each(self.first, np.array(rows)), each(self.second, self.partner[rows]), strict=True)
        return [{**{(f"{self.prefix}/{k}" if k in a else k): v for k, v in b.items()}, **a} for a, b in both]


def open_source(name: str, split: str, *, data_dir: str, manual_dir: str, seed: int) -> Source:
    """Opens one split of a dataset, preparing it on first use.

    Args:
      name: a TFDS name (`mnist`, `shapes/match`), or `pair:FIRST+SECOND:by=label|index`.
      split: a TFDS split expression (`train`, `test[:50%]`).
      data_dir: where datasets are prepared; TFDS's own place when empty.
      manual_dir: a folder of archives that were fetched by hand; may be empty.
      seed: of the partners drawn by `pair:...:by=label`.

    Raises:
      UserError: no such dataset or split, or it cannot be prepared here; the line says what would help.
    """
    if match := PAIR.match(name):
        parts = [
            open_source(match[part], split, data_dir=data_dir, manual_dir=manual_dir, seed=seed)
            for part in ("first", "second")
        ]
        return _pair(*parts, by=match["by"], prefix=match["second"].split("/")[0], seed=seed)
    builder = _prepared(name, data_dir, manual_dir)
    try:
        rows = builder.as_data_source(split, decoders=_skip_pictures(builder.info.features))
    except (ValueError, KeyError, AssertionError) as error:
        splits = ", ".join(builder.info.splits) or "none"
        raise UserError(
            f"dataset {name!r} has no rows of split {split!r}: its splits are {splits}, and parts are like test[:50%]"
        ) from error
    except NotImplementedError as error:
        raise UserError(
            f"dataset {name!r} under {builder.data_dir} was prepared in another format: "
            "give an empty --config.data.dir, where it is prepared as ArrayRecord"
        ) from error
    names = {
        key: tuple(feature.names)
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes is not None
    }
    return Source(PreparedRows(rows, str(builder.data_dir)), names, f"{builder.info.full_name}:{split}")


def available(name: str, instead: str, *, data_dir: str, manual_dir: str) -> str:
    """Returns `name`, prepared; where that cannot be, or `instead` alone is prepared already, `instead`.

    Args:
      name, instead: as `open_source` takes them; an empty `instead` is none.
      data_dir, manual_dir: see `open_source`.
    """
    if not instead:
        return name
    ready = [all(_builder(part, data_dir).is_prepared() for part in _parts(one)) for one in (name, instead)]
    try:
        if ready != [False, True]:
            for part in _parts(name):
                _prepared(part, data_dir, manual_dir)
            return name
        why = "it is prepared here"  # what failed once is not tried each time
    except UserError as error:
        why = str(error)
    print(f"data   {instead} in place of {name}: {why}", flush=True)
    return instead


def _parts(name: str) -> list[str]:
    match = PAIR.match(name)
    return [match["first"], match["second"]] if match else [name]


def check_name(name: str, data_dir: str) -> None:
    """Raises UserError where no dataset has this name: ours, TFDS's, or prepared under `data_dir`."""
    if len(parts := _parts(name)) > 1:
        for part in parts:
            check_name(part, data_dir)
        return
    if name.startswith("pair:"):
        raise UserError(f"config.data.name={name!r} must be like pair:cifar10+imdb_reviews:by=index (or by=label)")
    name = _current_name(name)
    base = name.split("/")[0].split(":")[0]
    if base in builders.BUILDERS:
        if name not in known_names() and builders.BUILDERS[base].BUILDER_CONFIGS:
            raise UserError(f"config.data.name={name!r} is no variant of {base}: {nearest(name, known_names())}")
        return
    with storage_errors(f"config.data.dir={data_dir}"):
        prepared = bool(data_dir) and epath.Path(data_dir, base).exists()
    if not prepared:
        known = tfds.list_builders(with_community_datasets=False)  # their list is on the network, read by TensorFlow
        if base not in known:
            raise UserError(
                f"config.data.name={name!r} is no dataset of ours or TFDS's: {nearest(base, [*known_names(), *known])}"
            )


def known_names() -> list[str]:
    """Names of the datasets that need no network: this package's own builders, with their variants."""
    return [
        f"{name}/{config.name}" if config else name
        for name, builder in builders.BUILDERS.items()
        for config in (builder.BUILDER_CONFIGS or [None])
    ]


def _current_name(name: str) -> str:
    """Returns the current name of a dataset; prints it on standard error where the given one is old."""
    base, slash, variant = name.partition("/")
    new = RENAMED_DATASETS.get(name) or RENAMED_DATASETS.get(base, base) + slash + variant
    if new != name:
        warn_renamed(f"dataset {name}", new)
    return new


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    name = _current_name(name)
    own = builders.BUILDERS.get(name.split("/")[0])
    try:
        if own is not None:
            return own(data_dir=data_dir or None, config=name.partition("/")[2] or None)
        return tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # no such dataset, variant or version, or a package that it needs is missing
        raise UserError(f"dataset {name!r} cannot be opened: {_one_line(error)}") from error


def _prepared(name: str, data_dir: str, manual_dir: str) -> tfds.core.DatasetBuilder:
    builder = _builder(name, data_dir)
    if builder.is_prepared():
        return builder
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    print(f"data   preparing {name} under {builder.data_dir}", flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS's lines speak of unknown sizes
            builder.download_and_prepare(
                file_format=tfds.core.FileFormat.ARRAY_RECORD,
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None),
            )
    except Exception as error:
        if isinstance(error, FileExistsError) and builder.data_path.exists():
            return _prepared(name, data_dir, manual_dir)  # another process was first, and what it made is whole
        if line := _explain(name, data_dir, error):
            raise UserError(line) from error
        raise
    return builder


def _explain(name: str, data_dir: str, error: Exception) -> str:
    """Returns what a failed preparation means to the user, in one line; nothing where it is not theirs to mend."""
    cause: BaseException | None = error
    while cause is not None:  # TFDS raises an error anew, without its fields, to say where it happened
        said = _one_line(cause)
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, (requests.RequestException, urllib.error.URLError, tfds.download.DownloadError)):
            url = getattr(getattr(cause, "request", None), "url", None) or "its files"
            return (
                f"dataset {name!r} is not prepared yet and {url} cannot be downloaded ({said}): connect to the "
                "network, or fetch the files by hand into a folder and name it with --config.data.manual_dir=FOLDER"
            )
        if isinstance(cause, download_manager.NonMatchingChecksumError):
            return f"dataset {name!r}: a file is damaged or not the known one, remove it and start again ({said})"
        if getattr(cause, "errno", None) == errno.ENOSPC or "Not enough disk space" in said:
            return f"no space left while preparing {name!r} under {data_dir or 'the TFDS folder'} ({said})"
        if isinstance(cause, (PermissionError, NotADirectoryError)):
            return f"cannot write {cause.filename or data_dir}: set --config.data.dir to a folder of yours"
        if isinstance(cause, OSError) and cause.errno is not None:
            return f"dataset {name!r} cannot be prepared under {data_dir or 'the TFDS folder'}: {said}"
        if isinstance(cause, (ImportError, RuntimeError)) and "tensorflow" in said.lower():
            return (
                f"dataset {name!r} needs TensorFlow once, to prepare: pip install '.[prepare]' in the repository "
                "(tensorflow-cpu), then run the same command"
            )
        if isinstance(cause, AssertionError) and "manual" in said.lower():
            return f"dataset {name!r} must be fetched by hand: --config.data.manual_dir=FOLDER ({said})"
        cause = cause.__cause__
    return ""


def _one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= 240 else f"{said[:240]}..."


def _skip_pictures(features: tfds.features.FeaturesDict) -> dict[str, Any]:
    """Leaves pictures encoded: we check a header's size before we decode, and can name a corrupt one."""
    return {
        k: tfds.decode.SkipDecoding() for k, feature in features.items() if isinstance(feature, tfds.features.Image)
    }


def _pair(first: Source, second: Source, *, by: str, prefix: str, seed: int) -> Source:
    if len(second.rows) == 0:
        raise UserError(f"cannot pair with {second.version}: it has no rows")
    if by == "index":
        partner = np.arange(len(first.rows)) % len(second.rows)
    else:
        partner = _partners_by_label(first, second, seed)
    names = {**{(f"{prefix}/{k}" if k in first.class_names else k): v for k, v in second.class_names.items()}}
    return Source(
        PairedRows(first.rows, second.rows, partner, prefix),
        {**names, **first.class_names},
        f"pair:{first.version}+{second.version}:by={by}" + f":seed={seed}" * (by != "index"),
    )


def _partners_by_label(first: Source, second: Source, seed: int) -> np.ndarray:
    """For each row of `first`, a row of `second` of its label; each is used once before any is used again."""
    labels = [np.array([int(row["label"]) for row in Chunks(source.rows)]) for source in (first, second)]
    missing = np.setdiff1d(labels[0], labels[1])
    if missing.size:
        raise UserError(
            f"cannot pair by label: {second.version} has no row of label {missing[0]}, which {first.version} has; "
            "use by=index"
        )
    partner = np.zeros(len(labels[0]), np.int64)
    for label in np.unique(labels[0]):
        mine, theirs = np.flatnonzero(labels[0] == label), np.flatnonzero(labels[1] == label)
        rounds = -(-len(mine) // len(theirs))
        drawn = [np.random.default_rng([seed, int(label), r]).permutation(theirs) for r in range(rounds)]
        partner[mine] = np.concatenate(drawn)[: len(mine)]
    return partner
