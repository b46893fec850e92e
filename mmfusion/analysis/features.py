"""Simple features of each modality, for classical baselines and the decomposition of information.

n examples · H W image · C channels · T positions · S samples · P pixels · F features
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from scipy import sparse
from sklearn import decomposition, preprocessing
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from mmfusion.data.dataset import Dataset
from mmfusion.data.split import Split
from mmfusion.errors import UserError
from mmfusion.models.encoders.audio import log_mel

COMPONENTS = 64  # dimensions that an image is reduced to, and a text for models that need dense features
SIDE = 32  # pixels; larger images are subsampled to at most this height and width
TERMS = {"token_pattern": r"\S+", "ngram_range": (1, 2), "max_features": 5000}  # the most frequent uni- and bigrams
HOP_MS = 10.0  # between audio frames, milliseconds
MAX_ROWS = 20_000  # training rows
CHUNK = 256  # rows decoded at a time

# Threads sum in an order that depends on their number, and trees turn the last bits of a feature into other splits. One
# thread is also the fastest where other processes use the cores.
one_thread = threadpool_limits.wrap(limits=1)


class Features(NamedTuple):
    """The readable rows with a label, by split.

    Attributes:
      tables: modality -> split -> sparse features `[n, F]`, 0 where the modality is absent.
      present: modality -> split -> whether a row has it `[n]`.
      targets: split -> targets `[n, ...]`.
      ids: split -> the examples' ids `[n]`.
    """

    tables: dict[str, dict[str, Any]]
    present: dict[str, dict[str, np.ndarray]]
    targets: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]


@one_thread
def features(dataset: Dataset, task: str, seed: int, max_rows: int) -> Features:
    """Returns features that are fitted on train, the same bits for any number of threads.

    Args:
      dataset: a dataset with the splits train, valid and test.
      task: the target.
      seed: seed of the subsample and of the reductions.
      max_rows: the maximum number of training rows.

    Raises:
      UserError: a split without labels, or a modality is present in fewer than two of the training rows.
    """
    positions = {name: np.arange(len(dataset.splits[name])) for name in ("train", "valid", "test")}
    # Sampled before any row is read, so that a streamed split gives the same rows.
    positions["train"] = np.sort(np.random.default_rng(seed).permutation(positions["train"])[:max_rows])
    for name, split in dataset.splits.items():
        if task in split.reader.unlabelled:
            raise UserError(f"no row has a label of {task!r}, which comparisons need", path=f"split {name}")
    read = {name: _read(dataset.splits[name], rows, task) for name, rows in positions.items()}
    tables, present = {}, {}
    for m, options in dataset.reader.modalities.items():
        present[m] = {split: found.present[m] for split, found in read.items()}
        if present[m]["train"].sum() < 2:
            message = f"present in {present[m]['train'].sum()} training rows; a baseline needs at least 2"
            raise UserError(message, path="modality", value=m)
        transform = FEATURES[options["kind"]][1](read["train"].described[m][present[m]["train"]], seed)
        tables[m] = {
            split: sparse.csr_array(
                sparse.diags_array(present[m][split].astype(np.float32)) @ transform(found.described[m])
            )
            for split, found in read.items()
        }
    return Features(tables, present, {s: rows.targets for s, rows in read.items()}, {s: x.ids for s, x in read.items()})


class _Rows(NamedTuple):
    described: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    targets: np.ndarray
    ids: np.ndarray


def _read(split: Split, positions: np.ndarray, task: str) -> _Rows:
    """Returns the readable rows with a label."""
    chunks = []
    for start in range(0, len(positions), CHUNK):
        batch = split.take(positions[start : start + CHUNK])
        kept = batch.metric_weight(task) > 0
        described = {
            m: FEATURES[options["kind"]][0](batch.inputs[m], batch.mask[m], options)[kept]
            for m, options in split.reader.modalities.items()
        }
        present = {m: np.asarray(batch.present[m])[kept] for m in described}
        chunks.append(_Rows(described, present, np.asarray(batch.targets[task])[kept], np.asarray(batch.id)[kept]))
    described, present = ({m: np.concatenate([rows[i][m] for rows in chunks]) for m in chunks[0][i]} for i in (0, 1))
    return _Rows(described, present, *(np.concatenate([rows[i] for rows in chunks]) for i in (2, 3)))


def _describe_image(images: np.ndarray, mask: np.ndarray, options: Any) -> np.ndarray:
    stride_h, stride_w = (math.ceil(size / SIDE) for size in images.shape[1:3])
    return images[:, ::stride_h, ::stride_w].reshape(len(images), -1)  # [n, P] uint8, as all rows are in memory at once


def _fit_image(train: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    size = min(COMPONENTS, *train.shape)
    pca = decomposition.PCA(size, svd_solver="randomized", random_state=seed).fit(train / np.float32(255))
    # The epsilon keeps components that are only rounding error from being scaled to unit variance.
    return lambda rows: pca.transform(rows / np.float32(255)) / np.sqrt(pca.explained_variance_ + 1e-6)  # [n, F]


def _describe_text(ids: np.ndarray, mask: np.ndarray, options: Any) -> np.ndarray:
    return np.array([" ".join(map(str, row[real])) for row, real in zip(ids, mask, strict=True)], object)  # [n]


def _describe_audio(waveforms: np.ndarray, mask: np.ndarray, options: Any) -> np.ndarray:
    real: Any = np.where(mask, waveforms, 0)  # [n, S]
    bands = np.asarray(log_mel(real, options["rate"], hop_ms=HOP_MS))  # [n, T, F / 2]
    padding = ~mask[:, :: round(options["rate"] * HOP_MS / 1000), None]  # [n, T, 1]; by a frame's first sample
    frames = np.ma.array(bands, mask=np.broadcast_to(padding, bands.shape))
    return np.hstack([frames.mean(axis=1).filled(0), frames.std(axis=1).filled(0)])  # [n, F]


def _describe_video(frames: np.ndarray, mask: np.ndarray, options: Any) -> np.ndarray:
    """Returns the mean of the real frames and the mean absolute difference of consecutive ones, in pixel levels."""
    small = _describe_image(frames.reshape(-1, *frames.shape[2:]), mask, options).reshape(*mask.shape, -1)
    small = small * mask[:, :, None].astype(np.float32)  # [n, T, P]
    count = np.maximum(mask.sum(axis=1), 1)[:, None]
    change = np.abs(np.diff(small, axis=1)) * mask[:, 1:, None]
    return np.rint(np.hstack([small.sum(axis=1) / count, change.sum(axis=1) / count])).astype(np.uint8)


def _describe_table(rows: np.ndarray, mask: np.ndarray, options: Any) -> np.ndarray:
    """Returns the columns, 0 where missing, and their mask; categories stay integer codes, which trees can split."""
    return np.hstack([rows, mask]).astype(np.float32)


def _describe_sequence(sequences: np.ndarray, mask: np.ndarray, options: Any) -> np.ndarray:
    """Returns the mean and the standard deviation of each dimension over the unmasked positions, and their number."""
    rows = np.ma.array(sequences, mask=np.broadcast_to(~mask[:, :, None], sequences.shape))  # [n, T, D]
    return np.hstack([rows.mean(axis=1).filled(0), rows.std(axis=1).filled(0), mask.sum(axis=1)[:, None]])


def _describe_graph(graphs: np.ndarray, mask: np.ndarray, options: Any) -> np.ndarray:
    """Returns the means of the node features, unweighted and weighted by degree, and the numbers of nodes and edges."""
    nodes = graphs[..., : options["features"]]  # [n, N, F]
    degree = (graphs[..., options["features"] :] != 0).sum(axis=2, keepdims=True)  # [n, N, 1]
    count = np.maximum(mask.sum(axis=1), 1)[:, None]
    return np.hstack(
        [
            nodes.sum(axis=1) / count,
            (nodes * degree).sum(axis=1) / count,
            mask.sum(axis=1)[:, None],
            degree.sum(axis=1) / 2,
        ]
    ).astype(np.float32)


def _describe_knowledge(nodes: np.ndarray, mask: np.ndarray, options: Any) -> np.ndarray:
    """Returns the entity ids as the words of a text."""
    return _describe_text(nodes[..., 0], mask, options)


def _fit_terms(train: np.ndarray, seed: int) -> Callable[[np.ndarray], Any]:
    return TfidfVectorizer(**TERMS).fit(train).transform


def _fit_scaler(train: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    return cast(Any, preprocessing.StandardScaler().fit(train).transform)


FEATURES = {  # by modality type: (inputs, mask, options) -> described rows, and (training rows, seed) -> transform
    "image": (_describe_image, _fit_image),
    "text": (_describe_text, _fit_terms),
    "audio": (_describe_audio, _fit_scaler),
    "video": (_describe_video, _fit_image),
    "table": (_describe_table, _fit_scaler),
    "graph": (_describe_graph, _fit_scaler),
    "knowledge": (_describe_knowledge, _fit_terms),
    "embedding": (_describe_table, _fit_scaler),
    "sequence": (_describe_sequence, _fit_scaler),
    "images": (_describe_video, _fit_image),
}


@one_thread
def dense(table: dict[str, Any], seed: int, reduce: bool) -> dict[str, np.ndarray]:
    """Returns dense features by split, scaled so that the mean squared norm of the training rows is 1.

    Args:
      table: sparse features by split.
      seed: of the reduction.
      reduce: whether to keep `COMPONENTS` dimensions by a singular value decomposition.
    """
    if reduce and table["train"].shape[1] > COMPONENTS:
        svd = decomposition.TruncatedSVD(COMPONENTS, random_state=seed).fit(table["train"])
        found = {split: svd.transform(rows) for split, rows in table.items()}
    else:
        found = {split: rows.toarray() for split, rows in table.items()}
    scale = np.sqrt((found["train"] ** 2).sum(axis=1).mean())
    return {split: rows / (scale or 1) for split, rows in found.items()}
