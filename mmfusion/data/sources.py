"""Named datasets as random-access rows: any TFDS builder, including this package's, or two of them joined by `pair`.

A row is a dict of raw features as stored (images remain encoded), with the same index on every machine.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import xxhash
from etils import epath, epy

from mmfusion import files
from mmfusion.data.features import Feature, from_tfds
from mmfusion.data.preparation import builder_class, current_name, make_builder, prepared_builder
from mmfusion.data.rows import CachedRows, PairedRows, PreparedRows, Rows
from mmfusion.errors import UserError, storage_errors

with epy.lazy_imports():  # half a second that tables and arrays do not need
    import tensorflow_datasets as tfds

    from mmfusion.data import builders

T = TypeVar("T")
KEPT = "mmfusion.rows.json"  # file beside the records of a prepared dataset, see `content.py`
PAIR = re.compile(r"pair:(?P<first>[^+]+)\+(?P<second>[^+]+):by=(?P<by>label|index)$")


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset.

    Attributes:
      rows: a random-access sequence of feature dicts.
      class_names: per class feature, the names of its classes, if the builder defines their names or number.
      version: name, version and split, which are part of the run's data fingerprint.
      features: what each feature holds; empty: unknown.
      slices: the stored rows that these are: (dataset and its split, first row, row after the last).
      members: the ids of the rows of each split, if `rows` are those of all splits; None: all rows are of one split.
      notes: lines about the rows for the user.
      rejected: id -> reason, of rows that could not be read and are in no split.
      describe_files: yields the names, sizes and times of the files that the rows are read from; None: unknown.
    """

    rows: Rows
    class_names: dict[str, tuple[str, ...]]
    version: str
    features: dict[str, Feature] = dataclasses.field(default_factory=dict)
    slices: tuple[tuple[str, int, int], ...] = ()
    members: Mapping[str, np.ndarray] | None = None
    notes: tuple[str, ...] = ()
    rejected: Mapping[int, str] = dataclasses.field(default_factory=dict)
    describe_files: Callable[[], Iterable[str]] | None = None

    @functools.cached_property
    def file_digest(self) -> str:
        """A digest of `describe_files`; empty: unknown."""
        if self.describe_files is None:
            return ""
        digest = xxhash.xxh3_128()
        for text in self.describe_files():
            digest.update(f"{text}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()


def open_source(name: str, split: str, *, data_dir: str, manual_dir: str, seed: int) -> Source:
    """Opens one split of a dataset, preparing it on first use.

    Args:
      name: a TFDS name (`mnist`, `shapes/match`), a builder as `package.module:Class`, or
        `pair:FIRST+SECOND:by=label|index`.
      split: a TFDS split expression (`train`, `test[:50%]`).
      data_dir: where datasets are prepared; empty: TFDS's default.
      manual_dir: a folder of manually downloaded archives; may be empty.
      seed: seed of the partners sampled by `pair:...:by=label`.

    Raises:
      UserError: no such dataset or split, or the dataset cannot be prepared; the message suggests a remedy.
    """
    if match := PAIR.match(name):
        first, second = (
            open_source(match[group], split, data_dir=data_dir, manual_dir=manual_dir, seed=seed)
            for group in ("first", "second")
        )
        prefix = re.split("[/:]", match["second"])[0]
        return _pair(first, second, by=match["by"], prefix=prefix, seed=seed)
    builder = prepared_builder(name, data_dir, manual_dir)
    stored = cast("tfds.features.FeaturesDict", builder.info.features)
    try:
        decoders = _keep_images_encoded(stored)
        rows = builder.as_data_source(split, decoders=decoders)  # pyright: ignore[reportCallIssue] (TFDS's decorator)
    except (ValueError, KeyError, AssertionError) as error:
        splits = ", ".join(builder.info.splits) or "none"
        raise UserError(
            f"no rows in split {split!r}: its splits are {splits}, and slices are like test[:50%]",
            path="config.data.name",
            value=name,
        ) from error
    except NotImplementedError as error:
        raise UserError(
            f"dataset {name!r} under {builder.data_dir} is not in ArrayRecord format; give an empty folder",
            path="config.data.dir",
            value=data_dir or None,
        ) from error
    features, folder = from_tfds(stored), str(builder.data_dir)
    splits = builder.info.splits  # empty in TFDS's mock data
    instructions = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits) if splits else ()
    return Source(
        PreparedRows(rows, folder, features),
        {
            name: feature.class_names
            for name, feature in features.items()
            if feature.form == "class" and feature.class_names
        },
        f"{builder.info.full_name}:{split}",
        features,
        tuple(
            (f"{builder.info.full_name}:{i.splitname}", i.from_ or 0, i.to or splits[i.splitname].num_examples)
            for i in instructions
        ),
        describe_files=functools.partial(_describe_files, folder) if os.path.isdir(folder) else None,
    )


def _describe_files(folder: str) -> list[str]:
    """Returns the name, size and times of each file of a prepared dataset."""
    names = sorted(name for name in os.listdir(folder) if name != KEPT)
    return [folder, *(f"{name}\0{files.describe(os.path.join(folder, name))}" for name in names)]


def available_name(name: str, fallback_name: str, *, data_dir: str, manual_dir: str) -> str:
    """Prepares a dataset and returns its name, or returns the fallback's name if it cannot be prepared.

    The fallback is also used if it is already prepared and `name` is not.

    Args:
      name: see `open_source`.
      fallback_name: like `name`; empty: no fallback.
      data_dir: see `open_source`.
      manual_dir: see `open_source`.
    """
    if not fallback_name:
        return name
    prepared, fallback_prepared = (
        all(make_builder(part, data_dir).is_prepared() for part in _parts(candidate))
        for candidate in (name, fallback_name)
    )
    if fallback_prepared and not prepared:
        reason = "it is already prepared"  # so that not every run repeats a failed preparation
    else:
        try:
            for part in _parts(name):
                prepared_builder(part, data_dir, manual_dir)
            return name
        except UserError as error:
            reason = str(error)
    print(f"data   {fallback_name} in place of {name}: {reason}", flush=True)
    return fallback_name


def _parts(name: str) -> list[str]:
    match = PAIR.match(name)
    return [match["first"], match["second"]] if match else [name]


def check_name(name: str, data_dir: str) -> None:
    """Raises UserError unless the name is that of a dataset of this package or TFDS, a class, or in `data_dir`."""
    parts = _parts(name)
    if len(parts) > 1:
        for part in parts:
            check_name(part, data_dir)
        return
    if name.startswith("pair:"):
        raise UserError(
            "must be like pair:cifar10+imdb_reviews:by=index (or by=label)", path="config.data.name", value=name
        )
    name = current_name(name)
    builder, variant = builder_class(name)
    base = name.split("/")[0].split(":")[0]
    if builder is not None:
        variants = [config.name for config in builder.BUILDER_CONFIGS]
        if variants and variant not in variants:
            base = name.removesuffix(f"/{variant}")
            names = [f"{base}/{choice}" for choice in variants]
            raise UserError(f"no such variant of {base}", path="config.data.name", value=name, choices=names)
        return
    with storage_errors(f"config.data.dir={data_dir}"):
        prepared = bool(data_dir) and epath.Path(data_dir, base).exists()
    if not prepared:
        known = tfds.list_builders(with_community_datasets=False)  # the community list needs a network and TensorFlow
        if base not in known:
            choices = [*known_names(), *known]
            raise UserError("no such dataset", path="config.data.name", value=name, choices=choices)


def known_names() -> list[str]:
    """Returns the names of this package's datasets, including variants."""
    return [
        f"{name}/{config.name}" if config else name
        for name, builder in builders.BUILDERS.items()
        for config in (builder.BUILDER_CONFIGS or [None])
    ]


def _keep_images_encoded(features: "tfds.features.FeaturesDict") -> dict[str, Any]:
    """Returns decoders that keep images encoded, as `image.decode` checks their size and reports corrupt ones."""
    decoders: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            decoders[name] = _keep_images_encoded(feature)
        elif isinstance(feature, tfds.features.Image):
            decoders[name] = tfds.decode.SkipDecoding()
    return decoders


def _pair(first: Source, second: Source, *, by: str, prefix: str, seed: int) -> Source:
    if len(second.rows) == 0:
        raise UserError(f"cannot pair with {second.version}: it has no rows")
    version = f"pair:{first.version}+{second.version}:by={by}"
    if by == "index":
        partner = np.arange(len(first.rows)) % len(second.rows)
    else:
        partner = _partners_by_label(first, second, seed)
        version += f":seed={seed}"
    taken = {*first.features, *first.class_names}
    known = first.describe_files is not None and second.describe_files is not None

    def join(own: Mapping[str, T], other: Mapping[str, T]) -> dict[str, T]:
        return {**{f"{prefix}/{name}" if name in taken else name: value for name, value in other.items()}, **own}

    return Source(
        PairedRows(first.rows, second.rows, partner, prefix),
        join(first.class_names, second.class_names),
        version,
        join(first.features, second.features),
        first.slices + second.slices,
        describe_files=(lambda: [first.file_digest, second.file_digest]) if known else None,
    )


def _partners_by_label(first: Source, second: Source, seed: int) -> np.ndarray:
    """Returns for each row of `first` a row of `second` with the same label; all are used before any is reused."""
    first_labels, second_labels = (
        np.array([int(row["label"]) for row in CachedRows(source.rows)]) for source in (first, second)
    )
    missing = np.setdiff1d(first_labels, second_labels)
    if missing.size:
        raise UserError(
            f"cannot pair by label: {second.version} has no row of label {missing[0]}, which {first.version} has; "
            "use by=index"
        )
    partner = np.zeros(len(first_labels), np.int64)
    for label in np.unique(first_labels):
        rows, candidates = np.flatnonzero(first_labels == label), np.flatnonzero(second_labels == label)
        rounds = -(-len(rows) // len(candidates))
        sampled = [np.random.default_rng([seed, int(label), r]).permutation(candidates) for r in range(rounds)]
        partner[rows] = np.concatenate(sampled)[: len(rows)]
    return partner
