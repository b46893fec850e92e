"""Classical scikit-learn baselines on simple features, which a fusion strategy should outperform.

n examples · H W image · C channels, classes or labels · T positions · S samples · P pixels · F features
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
from scipy import sparse
from sklearn import base, decomposition, dummy, ensemble, linear_model, multiclass, naive_bayes, preprocessing, svm
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import ParameterGrid

from mmfusion.data.dataset import Dataset
from mmfusion.data.split import Split
from mmfusion.errors import UserError
from mmfusion.metrics import METRICS
from mmfusion.models.encoders.audio import log_mel
from mmfusion.training.evaluation import SCORES

COMPONENTS = 64  # dimensions that an image is reduced to, and a text for models that need dense features
SIDE = 32  # pixels; larger images are subsampled to at most this height and width
TERMS = {"token_pattern": r"\S+", "ngram_range": (1, 2), "max_features": 5000}  # the most frequent uni- and bigrams
HOP_MS = 10.0  # between audio frames, milliseconds
MAX_ROWS = 20_000  # training rows
CHUNK = 256  # rows decoded at a time


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A classical model and its scores.

    Attributes:
      name: the model's name.
      modalities: the modalities whose features it reads; empty for the majority and the mean.
      metric: the metric of the scores; accuracy or RMSE where the requested one needs probabilities.
      selected: hyperparameters that validation selected from the grid, by scikit-learn's names.
      valid, test: scores, NaN where undefined.
      seconds: time to fit, select and score, without the features, which the models share.
    """

    name: str
    modalities: tuple[str, ...]
    metric: str
    selected: dict[str, float]
    valid: float
    test: float
    seconds: float = dataclasses.field(compare=False)


class _Model(NamedTuple):
    name: str
    estimator: Any
    grid: Mapping[str, tuple[float, ...]]
    dense: bool = False  # does not accept sparse features
    texts: bool | None = None  # True: for text only; False: for everything else; None: for both


COSTS = (0.1, 1.0, 10.0)
LEAVES = {"max_leaf_nodes": (7, 31)}
MODELS = {  # by kind of target; the first one reads no modality
    "classification": (
        _Model("majority", dummy.DummyClassifier(strategy="prior"), {}),
        _Model("linear_svm", svm.LinearSVC(dual="auto"), {"C": COSTS}),
        _Model("naive_bayes", naive_bayes.MultinomialNB(), {"alpha": (0.01, 0.1, 1.0)}, texts=True),
        _Model("naive_bayes", naive_bayes.GaussianNB(), {"var_smoothing": (1e-9, 1e-3, 1e-1)}, dense=True, texts=False),
        _Model(
            "gradient_boosting",
            ensemble.HistGradientBoostingClassifier(early_stopping=False),  # pyright: ignore[reportArgumentType]
            LEAVES,
            dense=True,
        ),
    ),
    "multilabel": (
        _Model("majority", dummy.DummyClassifier(strategy="most_frequent"), {}),
        _Model("linear_svm", multiclass.OneVsRestClassifier(svm.LinearSVC(dual="auto")), {"estimator__C": COSTS}),
    ),
    "regression": (
        _Model("mean", dummy.DummyRegressor(), {}),
        _Model("ridge", linear_model.Ridge(), {"alpha": (0.1, 1.0, 10.0, 100.0)}),
        _Model(
            "gradient_boosting",
            ensemble.HistGradientBoostingRegressor(early_stopping=False),  # pyright: ignore[reportArgumentType]
            LEAVES,
            dense=True,
        ),
    ),
}


def baselines(
    dataset: Dataset,
    task: str,
    metric: str,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    models: Collection[str] | None = None,
) -> list[Baseline]:
    """Fits and scores the classical models on each modality alone and on all modalities.

    Args:
      dataset: a dataset with the splits train, valid and test.
      task: the target.
      metric: the metric to select each model's hyperparameters by and to report; one of `METRICS` of the task's kind.
      seed: seed of the subsample and the models.
      max_rows: the maximum number of training rows.
      models: names of the models to fit; None: all.

    Returns:
      The majority (for regression the mean), then every model for each modality and for all of them. Deterministic for
      the same data and seed.

    Raises:
      UserError: no such task or metric, or a modality is present in fewer than two of the training rows.
    """
    reader = dataset.reader
    if task not in reader.targets:
        raise UserError("the dataset has no such target", path="task", value=task, choices=reader.targets)
    kind = reader.targets[task]["kind"]
    if metric not in METRICS[kind]:
        raise UserError(f"not a metric of {kind}", path="metric", value=metric, choices=METRICS[kind])
    metric = metric if metric not in ("nll", "brier", "ece", "loss") else "rmse" if kind == "regression" else "accuracy"
    tables, targets = features(dataset, task, seed, max_rows)
    reduced = {m: _reduced(own, seed) if reader.modalities[m]["kind"] == "text" else own for m, own in tables.items()}

    def run(model: _Model, names: tuple[str, ...]) -> Baseline:
        start = time.perf_counter()
        own = reduced if model.dense else tables
        # A model without modalities gets all features, and uses their number of rows only.
        x = {s: sparse.hstack([own[m][s] for m in names or tables], format="csr") for s in targets}
        x = {s: table.toarray() if model.dense else table for s, table in x.items()}
        seeds = {name: seed for name in model.estimator.get_params() if name.endswith("random_state")}

        def score(fitted: Any, split: str) -> float:
            outputs, y = _outputs(fitted, x[split], kind, reader.outputs[task]), targets[split]
            value = SCORES[kind](outputs, y, np.ones(len(y)))[metric]
            return math.nan if value is None else value

        candidates = []
        for options in ParameterGrid(model.grid):
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # not converged; a constant label
                fresh = cast(Any, base.clone(model.estimator)).set_params(**seeds, **options)
                fitted = fresh.fit(x["train"], targets["train"])
            candidates.append((score(fitted, "valid"), options, fitted))
        sign = 1 if METRICS[kind][metric] else -1
        valid, options, fitted = max(candidates, key=lambda c: -math.inf if math.isnan(c[0]) else sign * c[0])
        return Baseline(model.name, names, metric, options, valid, score(fitted, "test"), time.perf_counter() - start)

    requested = [model for model in MODELS[kind] if models is None or model.name in models]
    results = [run(model, ()) for model in requested if model is MODELS[kind][0]]
    for names in dict.fromkeys([*((m,) for m in tables), tuple(tables)]):  # no duplicate with a single modality
        texts = all(reader.modalities[m]["kind"] == "text" for m in names)
        results += [
            run(model, names) for model in requested if model is not MODELS[kind][0] and model.texts in (None, texts)
        ]
    return results


def features(dataset: Dataset, task: str, seed: int, max_rows: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns sparse features `[n, F]` per modality and split, fitted on train, and the targets per split.

    Args and errors are those of `baselines`.
    """
    positions = {name: np.arange(len(dataset.splits[name])) for name in ("train", "valid", "test")}
    # Sampled before any row is read, so that a streamed split gives the same rows.
    positions["train"] = np.sort(np.random.default_rng(seed).permutation(positions["train"])[:max_rows])
    for name, split in dataset.splits.items():
        if task in split.reader.unlabelled:
            raise UserError(f"no row has a label of {task!r}, which comparisons need", path=f"split {name}")
    read = {name: _read(dataset.splits[name], rows, task) for name, rows in positions.items()}
    tables = {}
    for m, options in dataset.reader.modalities.items():
        rows, present = read["train"][0][m]
        if present.sum() < 2:
            message = f"present in {present.sum()} training rows; a baseline needs at least 2"
            raise UserError(message, path="modality", value=m)
        transform = FEATURES[options["kind"]][1](rows[present], seed)
        tables[m] = {
            split: sparse.csr_array(sparse.diags_array(described[m][1].astype(np.float32)) @ transform(described[m][0]))
            for split, (described, _) in read.items()
        }
    return tables, {split: targets for split, (_, targets) in read.items()}


def _read(split: Split, positions: np.ndarray, task: str) -> tuple[dict[str, Any], np.ndarray]:
    """Returns each modality's (described rows, present) and the targets, of the readable rows with a label."""
    chunks, targets = {m: ([], []) for m in split.reader.modalities}, []
    for start in range(0, len(positions), CHUNK):
        batch = split.take(positions[start : start + CHUNK])
        readable = batch.metric_weight(task) > 0
        for m, options in split.reader.modalities.items():
            chunks[m][0].append(FEATURES[options["kind"]][0](batch.inputs[m], batch.mask[m], options)[readable])
            chunks[m][1].append(batch.present[m][readable])
        targets.append(batch.targets[task][readable])
    return {m: tuple(map(np.concatenate, lists)) for m, lists in chunks.items()}, np.concatenate(targets)


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


def _reduced(tables: dict[str, Any], seed: int) -> dict[str, Any]:
    if tables["train"].shape[1] <= COMPONENTS:
        return tables
    decomposed = decomposition.TruncatedSVD(COMPONENTS, random_state=seed).fit(tables["train"])
    return {split: sparse.csr_array(decomposed.transform(table)) for split, table in tables.items()}


def _outputs(model: Any, x: Any, kind: str, classes: int) -> np.ndarray:
    """Returns the inputs of the metrics: predictions `[n]` for regression, otherwise scores `[n, C]`."""
    if kind == "regression":
        return model.predict(x)
    has_decision = hasattr(model, "decision_function")
    if kind == "multilabel":  # the majority has hard predictions only
        return (model.decision_function(x) if has_decision else model.predict(x) - 0.5).reshape(-1, classes)
    known = model.decision_function(x) if has_decision else model.predict_log_proba(x)
    known = np.stack([-known, known], axis=1) if known.ndim == 1 else known
    scores = np.full((len(known), classes), known.min() - 1)  # classes absent from training are never predicted
    scores[:, model.classes_] = known
    return scores
