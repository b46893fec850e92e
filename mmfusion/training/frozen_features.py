"""Features of frozen encoders, computed once for each row and read by all runs that share them.

They follow from the encoder's weights, the preprocessing and the rows, and are files in `config.data.cache`.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.config.fields import RunConfig
from mmfusion.data import array_files
from mmfusion.data.batch import Batch
from mmfusion.data.cache import Cache, open_cache
from mmfusion.data.dataset import Dataset
from mmfusion.data.modalities import modality_type
from mmfusion.distributed import hosts
from mmfusion.errors import UserError, one_line
from mmfusion.models.encoders.images import PerImage
from mmfusion.models.pretrained.learning_layers import (
    learning_layers,
    without_learning,
)
from mmfusion.training.frozen_encoder import Encoder, tree_digest, write_features
from mmfusion.training.setup import TrainSetup, preprocessing
from mmfusion.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a run reads in place of raw rows.

    Attributes:
      dataset: with features as the inputs of frozen encoders.
      setup: whose steps read them.
      encoders: modality -> what computes its features; empty where all rows are raw.
      cache: has their files.
      notes: a line that a person can read for each frozen encoder.
    """

    dataset: Dataset
    setup: TrainSetup
    encoders: Mapping[str, Encoder]
    cache: Cache
    notes: Sequence[str]

    @property
    def example(self) -> Batch:
        """A host batch of two padding rows, for shapes."""
        if not self.encoders:
            return self.setup.example
        return next(iter(self.dataset.splits.values())).take(np.array([-1, -1]))

    def read(self, batch: Batch) -> Batch:
        """Returns a host batch of raw rows with features in place of inputs, which are kept as those of splits are."""
        inputs, mask = dict(batch.inputs), dict(batch.mask)
        for m, encoder in self.encoders.items():
            rows = encoder.inputs(batch)
            folder = self.cache.path([*encoder.key(0), tree_digest(rows)])
            assert folder is not None
            split = dataclasses.replace(next(iter(self.dataset.splits.values())), ids=batch.id, arrays=rows)
            try:
                if not folder.exists():
                    write_features(encoder, {folder: (split, 0)}, self.cache)
                os.utime(folder)
                found = array_files.load(folder, encoder.dtypes)
            except OSError:  # such as a full disk
                pieces = zip(*encoder.chunks(split, 0, len(split), 0), strict=True)
                found = [np.concatenate(leaves) for leaves in pieces]
            inputs[m], mask[m] = found  # pyright: ignore[reportArgumentType]
        return batch.replace(inputs=inputs, mask=mask)


def cached(config: RunConfig, dataset: Dataset, setup: TrainSetup, state: TrainState) -> Reading:
    """Replaces the inputs of frozen encoders by their features, which are computed where no run has done so.

    Exact where `cache_dtype` is float32 and nothing is augmented. Encoders that run in each step as before: those
    without `init`, that share or join, that read several images of which a layer learns, rows that are streamed, and
    inputs that are augmented (without `cache_views`) or changed by an objective.

    Args:
      config: of the run.
      dataset, setup: as loaded and built.
      state: on the devices.

    Raises:
      UserError: `cache_dtype` is not float32, and the features cannot be kept; or one of several hosts keeps others.
    """
    lines, views, dtype = [], config.data.cache_views, config.data.cache_dtype
    encoders: dict[str, Encoder] = {}
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    cache = open_cache(config.data.cache)
    frozen = sorted(name.removeprefix("encoders_") for name in setup.spec.freezing.always)
    reasons = {m: _reason(config, dataset, setup, m, cache) for m in frozen if config.model.encoders[m].init}
    # The hosts' steps must be the same, and a sharded state is gathered by all of them.
    hosts.check_agreement({"the encoders whose features are kept": [m for m in reasons if not reasons[m]]})
    for m, reason in reasons.items():
        if not reason:
            encoder = _encoder(config, setup, state, m)
            augmented = views if _is_augmented(config, m) else 0
            try:
                found[m], line = _arrays(encoder, dataset, cache, augmented)
                encoders[m] = encoder
                lines.append(line)
                continue
            except OSError as error:
                reason = one_line(error)
        if dtype != "float32":
            message = f"features of {m!r} cannot be kept: {reason}; without them it must be 'float32'"
            raise UserError(message, path="config.data.cache_dtype", value=dtype)
        lines.append(f"data   {m}: encoded in each step, as its features are not kept: {reason}")
    hosts.check_agreement({"the encoders whose features are kept": sorted(found)})
    if not found:
        return Reading(dataset, setup, {}, cache, lines)
    layers = flax.core.FrozenDict({m: encoder.layers for m, encoder in encoders.items()})
    reading = setup.reading(layers, preprocessing(config, tuple(found)))
    splits = {}
    for name, split in dataset.splits.items():
        assert split.arrays is not None
        inputs, mask = dict(split.arrays.inputs), dict(split.arrays.mask)
        for m, arrays in found.items():
            inputs[m], mask[m] = arrays[name]  # pyright: ignore[reportArgumentType]
        splits[name] = dataclasses.replace(split, arrays=split.arrays.replace(inputs=inputs, mask=mask))
    return Reading(dataclasses.replace(dataset, splits=splits), reading, encoders, cache, lines)


def _is_augmented(config: RunConfig, m: str) -> bool:
    options = config.data.modalities[m].to_dict()
    return modality_type(options["kind"]).augment is not None and any(options["augment"].values())


def _reason(config: RunConfig, dataset: Dataset, setup: TrainSetup, m: str, cache: Cache) -> str:
    """Returns why the features of a modality are not kept, or an empty string."""
    model, joined = setup.model, {name for names in setup.model.joins.values() for name in names}
    if cache.folder is None:
        return f"config.data.cache is {config.data.cache!r}"
    if m in model.shares.values() or m in model.joins or m in joined:
        return "it shares its encoder or is joined"
    encoder: Any = model.encoders[m]
    if isinstance(encoder, PerImage):
        if f"encoders_{m}" in setup.spec.freezing.published:
            return "a layer that learns reads each of several images"
        encoder = encoder.encoder
    if not type(encoder).__module__.startswith("mmfusion."):
        return "its class is from outside, whose code is not known"
    if any(split.arrays is None for split in dataset.splits.values()):
        return "rows are streamed; raise config.data.memory_gb"
    if any(part is None for keys in dataset.keys.values() for part in keys[m]):
        return "what its rows follow from is unknown"
    if _is_augmented(config, m) and not config.data.cache_views:
        return "its inputs are augmented; config.data.cache_views keeps as many augmented views"
    if not _keeps_inputs(setup, m):
        return "an objective changes its inputs"
    return ""


def _keeps_inputs(setup: TrainSetup, m: str) -> bool:
    kept = []

    def trace(batch: Batch, seed: Any, step: Any) -> None:
        kept.append(setup.spec.objectives.transform_batch(batch, seed, step).inputs[m] is batch.inputs[m])

    jax.eval_shape(trace, setup.example, np.uint32(0), np.int32(0))
    return all(kept)


def _encoder(config: RunConfig, setup: TrainSetup, state: TrainState, m: str) -> Encoder:
    name, partitioner = f"encoders_{m}", setup.partitioner
    frozen = {"params": state.params[name]} | (
        {"batch_stats": state.batch_stats[name]} if name in state.batch_stats else {}
    )
    variables = {kind: {name: values} for kind, values in partitioner.to_host(frozen).items()}
    layers = learning_layers(
        setup.model.encoders[m], variables["params"][name], name not in setup.spec.freezing.published
    )
    if layers.layer:
        variables["params"] = {name: without_learning(variables["params"][name])}
    rows = max(1, config.batch_size // partitioner.num_devices)
    dtype = np.dtype(jnp.dtype(config.data.cache_dtype))
    return Encoder(setup, m, config.data.modalities[m].to_dict(), layers, variables, rows, dtype)


def _arrays(encoder: Encoder, dataset: Dataset, cache: Cache, views: int) -> tuple[dict[str, list[np.ndarray]], str]:
    """Returns features and masks per split, from files that are written where there are none, and a line that says so.

    Raises:
      OSError: they cannot be written.
    """
    made = {name: views if name == "train" else 0 for name in dataset.splits}
    keys = {number: encoder.key(number) for number in set(made.values())}
    folders: dict[str, Path] = {}
    for name in dataset.splits:
        arrays = dataset.splits[name].arrays
        assert arrays is not None
        # Other modalities matter: of those that are dropped one stays, and a row with an unreadable one has none.
        present = np.asarray(arrays.present[encoder.modality]) & (np.asarray(arrays.weight) > 0)
        folder = cache.path([*keys[made[name]], *dataset.keys[name][encoder.modality], tree_digest(present)])
        assert folder is not None
        folders[name] = folder
    missing = {folder: (dataset.splits[name], made[name]) for name, folder in folders.items() if not folder.exists()}
    if missing:
        write_features(encoder, missing, cache)
    for folder in folders.values():
        os.utime(folder)
    arrays = {name: array_files.load(folder, encoder.dtypes) for name, folder in folders.items()}
    shape = "×".join(map(str, next(iter(arrays.values()))[0].shape[2:]))
    kept = f"{views} augmented views of {shape}" if views else shape
    return arrays, f"data   {encoder.modality}: features of its frozen encoder, {kept} a row, are in {cache.folder}"
