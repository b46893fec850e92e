"""Classical scikit-learn baselines on simple features, which a fusion strategy should outperform.

n examples · C classes or labels · F features
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
from scipy import sparse
from scipy.stats import qmc
from sklearn import base, compose, dummy, ensemble, linear_model, multiclass, naive_bayes, preprocessing, svm

from mmfusion.analysis.features import MAX_ROWS, Features, dense, features, one_thread
from mmfusion.data.dataset import Dataset
from mmfusion.errors import UserError
from mmfusion.metrics import METRICS
from mmfusion.training.evaluation import SCORES

TRIALS = 6  # settings of a model, unless it is to be tuned with as many as something else
SEARCH_ROWS = 5_000  # training rows on which settings of a slow model are compared
SVM_ROWS = 10_000  # training rows of an SVM with a kernel, whose time grows with their square

Space = Mapping[str, tuple[float, float]]  # lowest and highest value by parameter, evenly in the logarithm


def _nothing() -> np.ndarray:
    return np.zeros(0)


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A classical model and its scores.

    Attributes:
      name: the model's name.
      modalities: the modalities whose features it reads; empty for the majority and the mean.
      metric: the metric of the scores; accuracy or RMSE where the requested one needs probabilities.
      selected: hyperparameters that validation selected, by scikit-learn's names.
      valid, test: scores, NaN where undefined.
      seconds: time to fit, select and score, without the features, which the models share.
      trials: the number of settings that were compared.
      rows: the number of training rows of the selected setting.
      ids: the ids `[n]` of the test rows that count: those with one of the modalities.
      outputs: what the test score is of: predictions `[n]` for regression, otherwise scores `[n, C]`.
      targets: of the same rows `[n, ...]`.
    """

    name: str
    modalities: tuple[str, ...]
    metric: str
    selected: dict[str, float]
    valid: float
    test: float
    seconds: float = dataclasses.field(compare=False)
    trials: int = 1
    rows: int = 0
    ids: np.ndarray = dataclasses.field(default_factory=_nothing, compare=False, repr=False)
    outputs: np.ndarray = dataclasses.field(default_factory=_nothing, compare=False, repr=False)
    targets: np.ndarray = dataclasses.field(default_factory=_nothing, compare=False, repr=False)


class _Model(NamedTuple):
    name: str
    estimator: Any
    space: Space
    dense: bool = False  # does not accept sparse features
    texts: bool | None = None  # True: for text only; False: for everything else; None: for both
    search_rows: int = MAX_ROWS
    max_rows: int = MAX_ROWS


COST = (0.01, 10.0)  # above, linear models take long and gain nothing
KERNEL: Space = {"C": (0.1, 100.0), "gamma": (0.1, 10.0)}  # the mean squared norm of a modality's features is 1
TREES: Space = {
    "learning_rate": (0.05, 0.3),
    "max_leaf_nodes": (7, 63),
    "max_iter": (80, 200),
    "l2_regularization": (0.001, 10.0),
}


def _prefixed(space: Space, prefix: str) -> Space:
    return {f"{prefix}__{name}": bounds for name, bounds in space.items()}


def _each_label(estimator: Any) -> Any:
    return multiclass.OneVsRestClassifier(estimator)


_LOGISTIC = linear_model.LogisticRegression(max_iter=300)
_LINEAR = svm.LinearSVC(dual="auto")
# With 63 bins instead of 255 trees take half the time, and score as well.
_BOOSTING = ensemble.HistGradientBoostingClassifier(early_stopping=False, max_bins=63)  # pyright: ignore[reportArgumentType]
_BOOSTING_REGRESSOR = ensemble.HistGradientBoostingRegressor(early_stopping=False, max_bins=63)  # pyright: ignore[reportArgumentType]
_SVM = svm.SVC(gamma=1.0)  # pyright: ignore[reportArgumentType]
_SVR = compose.TransformedTargetRegressor(svm.SVR(gamma=1.0), transformer=preprocessing.StandardScaler())  # pyright: ignore[reportArgumentType]
_OF_KERNEL: dict[str, Any] = {"dense": True, "search_rows": SEARCH_ROWS, "max_rows": SVM_ROWS}
_OF_TREES: dict[str, Any] = {"dense": True, "search_rows": SEARCH_ROWS}
MODELS = {  # by kind of target; the first one reads no modality
    "classification": (
        _Model("majority", dummy.DummyClassifier(strategy="prior"), {}),
        _Model("linear_svm", _LINEAR, {"C": COST}, search_rows=SEARCH_ROWS),
        _Model("logistic_regression", _LOGISTIC, {"C": COST}),
        _Model("naive_bayes", naive_bayes.MultinomialNB(), {"alpha": (0.001, 10.0)}, texts=True),
        _Model("naive_bayes", naive_bayes.GaussianNB(), {"var_smoothing": (1e-9, 1.0)}, dense=True, texts=False),
        _Model("rbf_svm", _SVM, KERNEL, **_OF_KERNEL),
        _Model("gradient_boosting", _BOOSTING, TREES, **_OF_TREES),
    ),
    "multilabel": (
        _Model("majority", dummy.DummyClassifier(strategy="most_frequent"), {}),
        _Model("linear_svm", _each_label(_LINEAR), {"estimator__C": COST}, search_rows=SEARCH_ROWS),
        _Model("logistic_regression", _each_label(_LOGISTIC), {"estimator__C": COST}),
        _Model("rbf_svm", _each_label(_SVM), _prefixed(KERNEL, "estimator"), **_OF_KERNEL),
        _Model("gradient_boosting", _each_label(_BOOSTING), _prefixed(TREES, "estimator"), **_OF_TREES),
    ),
    "regression": (
        _Model("mean", dummy.DummyRegressor(), {}),
        _Model("ridge", linear_model.Ridge(), {"alpha": (0.01, 1000.0)}),
        _Model("rbf_svm", _SVR, _prefixed({**KERNEL, "epsilon": (0.01, 0.5)}, "regressor"), **_OF_KERNEL),
        _Model("gradient_boosting", _BOOSTING_REGRESSOR, TREES, **_OF_TREES),
    ),
}


@one_thread
def baselines(
    dataset: Dataset,
    task: str,
    metric: str,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    models: Collection[str] | None = None,
    trials: int = TRIALS,
) -> list[Baseline]:
    """Fits and scores the classical models on each modality alone and on all modalities.

    Each model is tuned with the same number of settings: its default, and the first points of a scrambled Halton
    sequence (Owen 2017, arXiv:1706.02808) in its search space. As in runs, a validation or test row without any of a
    model's modalities does not count.

    Args:
      dataset: a dataset with the splits train, valid and test.
      task: the target.
      metric: the metric to select each model's hyperparameters by and to report; one of `METRICS` of the task's kind.
      seed: seed of the subsamples and the models.
      max_rows: the maximum number of training rows.
      models: names of the models to fit; None: all.
      trials: the number of settings of each model.

    Returns:
      The majority (for regression the mean), then every model for each modality and for all of them. The same to the
      bit for the same data and seed, for any number of threads.

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
    found = features(dataset, task, seed, max_rows)
    texts = {m: options["kind"] in ("text", "knowledge") for m, options in reader.modalities.items()}
    reduced = {m: dense(table, seed, texts[m]) for m, table in found.tables.items()}
    target = _Target(kind, metric, reader.outputs[task], found.targets)
    first, *rest = MODELS[kind]
    requested = [model for model in (first, *rest) if models is None or model.name in models]
    results = []
    for names in dict.fromkeys([(), *((m,) for m in texts), tuple(texts)]):  # no duplicate with a single modality
        for model in requested:
            if (model is first) != (not names) or model.texts not in (None, all(texts[m] for m in names)):
                continue
            tables = reduced if model.dense else found.tables
            # A model without modalities gets all features, and uses their number of rows only.
            parts = {split: [tables[m][split] for m in names or texts] for split in found.ids}
            x = {s: np.hstack(own) if model.dense else sparse.hstack(own, format="csr") for s, own in parts.items()}
            counts = {s: np.any([found.present[m][s] for m in names or texts], axis=0) for s in found.ids}
            results.append(_tuned(model, names, x, counts, found, target, seed, trials))
    return results


class _Target(NamedTuple):
    kind: str
    metric: str
    outputs: int
    by_split: Mapping[str, np.ndarray]


def _tuned(
    model: _Model,
    names: tuple[str, ...],
    x: Mapping[str, Any],
    counts: Mapping[str, np.ndarray],
    found: Features,
    target: _Target,
    seed: int,
    trials: int,
) -> Baseline:
    """Returns a model at the setting with the best validation score, fitted on up to `max_rows` training rows.

    Args:
      model: the model.
      names: its modalities.
      x: features `[n, F]` by split.
      counts: which rows count `[n]`, by split.
      found: ids of the rows.
      target: what to predict.
      seed: of the subsamples and the model.
      trials: the number of settings.
    """
    start = time.perf_counter()
    y = {split: values if split == "train" else values[counts[split]] for split, values in target.by_split.items()}
    seeds = {name: seed for name in model.estimator.get_params() if name.endswith("random_state")}

    def fit(options: Mapping[str, float], max_rows: int) -> tuple[Any, float, int]:
        rows = _subsample(y["train"], max_rows, seed, target.kind)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # not converged; a constant label
            fresh = cast(Any, base.clone(model.estimator)).set_params(**seeds, **options)
            fitted = fresh.fit(x["train"][rows], y["train"][rows])
        return fitted, score_of(outputs_of(fitted, x["valid"][counts["valid"]], target.kind, target.outputs),
                                y["valid"], target.kind, target.metric), len(rows)  # fmt: skip

    settings = draw(model.estimator, model.space, trials)
    search_rows = min(model.search_rows, model.max_rows)
    candidates = [(fit(options, search_rows), options) for options in settings]
    sign = 1 if METRICS[target.kind][target.metric] else -1
    (fitted, valid, rows), options = max(candidates, key=lambda c: -math.inf if math.isnan(c[0][1]) else sign * c[0][1])
    if search_rows < min(model.max_rows, len(y["train"])):
        fitted, valid, rows = fit(options, model.max_rows)
    outputs = outputs_of(fitted, x["test"][counts["test"]], target.kind, target.outputs)
    test = score_of(outputs, y["test"], target.kind, target.metric)
    options = {name.rpartition("__")[2]: value for name, value in options.items()}
    seconds, ids = time.perf_counter() - start, found.ids["test"][counts["test"]]
    return Baseline(
        model.name, names, target.metric, options, valid, test, seconds, len(settings), rows, ids, outputs, y["test"]
    )


def draw(estimator: Any, space: Space, count: int) -> list[dict[str, float]]:
    """Returns settings: an estimator's own, then others spread evenly over the logarithms of a space.

    A parameter has integers where both bounds are. Without a parameter there is one setting. A larger count adds to the
    settings of a smaller one.
    """
    if not space:
        return [{}]
    own = estimator.get_params()
    settings = [{name: own[name] for name in space}]
    for point in qmc.Halton(len(space), rng=0).random(count - 1):
        values = {name: low * (high / low) ** u for (name, (low, high)), u in zip(space.items(), point, strict=True)}
        whole = {name: all(isinstance(bound, int) for bound in bounds) for name, bounds in space.items()}
        settings.append({name: round(v) if whole[name] else float(f"{v:.3g}") for name, v in values.items()})
    return settings


def score_of(outputs: np.ndarray, targets: np.ndarray, kind: str, metric: str) -> float:
    """Returns a metric of the outputs of all rows, NaN where it is undefined."""
    value = SCORES[kind](outputs, targets, np.ones(len(targets)))[metric]
    return math.nan if value is None else value


def outputs_of(model: Any, x: Any, kind: str, classes: int) -> np.ndarray:
    """Returns the inputs of the metrics: predictions `[n]` for regression, otherwise scores `[n, C]`."""
    if not x.shape[0]:  # scikit-learn refuses to predict nothing
        return np.zeros((0,) if kind == "regression" else (0, classes))
    if kind == "regression":
        return model.predict(x)
    has_decision = hasattr(model, "decision_function")
    if kind == "multilabel":  # the majority has hard predictions only
        return (model.decision_function(x) if has_decision else model.predict(x) - 0.5).reshape(-1, classes)
    known = model.decision_function(x) if has_decision else model.predict_log_proba(x)
    known = np.stack([-known, known], axis=1) if known.ndim == 1 else known
    scores = np.full(
        (len(known), classes), known.min(initial=0.0) - 1
    )  # classes absent from training are never predicted
    scores[:, model.classes_] = known
    return scores


def _subsample(targets: np.ndarray, rows: int, seed: int, kind: str) -> np.ndarray:
    """Returns random positions in order, with at least one row of each class."""
    if len(targets) <= rows:
        return np.arange(len(targets))
    chosen = np.random.default_rng(seed).permutation(len(targets))[:rows]
    if kind == "classification":
        classes, first = np.unique(targets, return_index=True)
        chosen = np.concatenate([chosen, first[~np.isin(classes, targets[chosen])]])
    return np.sort(chosen)
