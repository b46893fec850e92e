"""A frozen encoder with the files of its features."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from mmfusion import models, rng
from mmfusion.data import array_files, pipeline
from mmfusion.data.batch import Batch
from mmfusion.data.cache import Cache
from mmfusion.data.preprocess import make_preprocess
from mmfusion.data.progress import progress
from mmfusion.data.split import Split
from mmfusion.models.pretrained.learning_layers import (
    LearningLayers,
    compute_features,
)
from mmfusion.tracking import provenance
from mmfusion.training.setup import TrainSetup

CHUNK_BYTES = 64 << 20
# Fields of an encoder on which its features do not depend, but by its weights.
WITHOUT_EFFECT = ("width", "dropout", "parent", "name")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What computes the features of a modality.

    Attributes:
      setup: of the run.
      modality, options: the modality.
      layers: those that learn.
      variables: the encoder's, on the host.
      rows: of one call.
      dtype: of the files.
    """

    setup: TrainSetup
    modality: str
    options: Mapping[str, Any]
    layers: LearningLayers
    variables: Mapping[str, Any]
    rows: int
    dtype: np.dtype

    def key(self, views: int) -> list[Any]:
        """Returns what the features follow from beside the rows, as JSON values."""
        options = {name: value for name, value in self.options.items() if views or name != "augment"}
        versions = provenance.versions()
        code = provenance.code_digest(Path(models.__file__).parent)
        encoder = self.setup.model.encoders[self.modality]
        names = [field.name for field in dataclasses.fields(encoder) if field.name not in WITHOUT_EFFECT]
        made = [type(encoder).__name__, *(f"{name}={getattr(encoder, name)}" for name in names)]
        device = jax.devices()[0].device_kind
        made_by = [made, self.layers.layer, self._weights, versions, code, device]
        return ["features", made_by, options, views, self.dtype.name, self.rows]

    @functools.cached_property
    def _weights(self) -> str:
        return tree_digest(self.variables)

    @property
    def dtypes(self) -> list[np.dtype]:
        """Those of the files: of features and of masks."""
        return [self.dtype, np.dtype(bool)]

    @functools.cached_property
    def compute(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """`(variables, batch, view or None) -> features, mask`, compiled."""
        preprocess = make_preprocess({self.modality: self.options})

        def compute(variables: Any, batch: Batch, view: Any) -> tuple[jax.Array, jax.Array]:
            key = None if view is None else rng.key(0, "view", view)
            batch = preprocess(batch, key)
            found = compute_features(self.setup.model, variables, batch, self.modality, self.layers.layer)
            return found[0].astype(self.dtype), found[1]

        return jax.jit(compute)

    def template(self, views: int) -> list[np.ndarray]:
        """Returns features `[0, 1 + V, ...]`, not augmented and augmented, and their mask `[0, N]`, without rows."""
        features, mask = jax.eval_shape(self.compute, self.variables, self.inputs(self.setup.example), None)
        return [np.zeros((0, 1 + views, *features.shape[1:]), self.dtype), np.zeros((0, *mask.shape[1:]), bool)]

    def inputs(self, batch: Batch) -> Batch:
        """Returns what is read of a batch: this modality."""
        m = self.modality
        return batch.replace(
            inputs={m: batch.inputs[m]}, mask={m: batch.mask[m]}, present={m: batch.present[m]}, targets={},
            labelled={}, row_weight=None,
        )  # fmt: skip

    def chunks(self, split: Split, first: int, last: int, views: int) -> Iterator[list[np.ndarray]]:
        """Yields the features and the mask of the rows of each call from position `first` to `last - 1`."""
        positions = np.arange(first, -(-last // self.rows) * self.rows)
        positions = np.where(positions < last, positions, -1).reshape(-1, self.rows)
        batches = (self.inputs(split.take(some)) for some in positions)
        variables = jax.device_put(self.variables)
        for i, (_, batch) in enumerate(pipeline.to_device(batches, jax.device_put)):
            outputs = [self.compute(variables, batch, view) for view in (None, *range(views))]
            arrays = [jnp.stack([features for features, _ in outputs], axis=1), outputs[0][1]]
            yield [np.asarray(array)[: last - first - i * self.rows] for array in arrays]


def write_features(encoder: Encoder, missing: Mapping[Path, tuple[Split, int]], cache: Cache) -> None:
    """Computes features into their folders; chunks that a killed process has finished are kept.

    Raises:
      OSError: they cannot be written.
    """
    templates = {views: encoder.template(views) for views in {views for _, views in missing.values()}}
    row = {
        views: sum(leaf.itemsize * math.prod(leaf.shape[1:]) for leaf in leaves) for views, leaves in templates.items()
    }
    size = sum(len(split) * row[views] for split, views in missing.values())
    if reason := cache.refuse(size):
        raise OSError(reason)
    print(f"data   features of {encoder.modality}: {size / 1e6:,.1f} MB into {cache.folder}", flush=True)
    with contextlib.ExitStack() as stack:
        parts = {folder: part for folder in sorted(missing) if (part := array_files.claim(folder, stack))}
        stack.enter_context(array_files.removed_from_full_disk(parts.values()))
        work = []
        for folder, part in parts.items():
            split, views = missing[folder]
            chunk = encoder.rows * max(1, CHUNK_BYTES // (row[views] * encoder.rows))
            array_files.create(part, templates[views], len(split))
            done = array_files.finished(part, encoder.dtypes, chunk)
            firsts = [first for first in range(0, len(split), chunk) if first not in done]
            work += [(part, split, first, min(first + chunk, len(split)), views) for first in firsts]
        total = sum(len(missing[folder][0]) for folder in parts)
        left = sum(last - first for _, _, first, last, _ in work)
        with progress("encoding", f"rows of {encoder.modality}", total, left) as advance:
            for part, split, first, last, views in work:
                pieces = []
                for piece in encoder.chunks(split, first, last, views):
                    pieces.append(piece)
                    advance(len(piece[0]))
                features, masks = zip(*pieces, strict=True)
                array_files.write(part, len(split), first, [np.concatenate(features), np.concatenate(masks)])
        for folder, part in parts.items():
            array_files.move(part, folder)


def tree_digest(tree: Any) -> str:
    """Returns a digest of the arrays of a tree, with their paths."""
    digest = xxhash.xxh3_128()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
