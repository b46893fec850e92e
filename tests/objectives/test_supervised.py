import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax
from sklearn.metrics import log_loss

from mmfusion.data.batch import Batch
from mmfusion.models.model import Outputs
from mmfusion.objectives import Task, task_loss, task_weight
from mmfusion.objectives.base import Context
from mmfusion.objectives.supervised import Accuracy, TaskLoss
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 4)).astype(np.float32) * 3
TARGET = np.array([0, 3, 1, 1, 2, 0], np.int32)


def test_classification_loss_is_cross_entropy():
    loss = task_loss(jnp.asarray(LOGITS), jnp.asarray(TARGET), Task("classification", 4))
    probabilities = softmax(LOGITS.astype(np.float64), axis=1)
    expected = [log_loss([t], [p], labels=range(4)) for t, p in zip(TARGET, probabilities, strict=True)]
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_label_smoothing_matches_its_formula():
    """The loss is (1 - s) times that of the true class plus s times the mean over classes."""
    loss = task_loss(jnp.asarray(LOGITS), jnp.asarray(TARGET), Task("classification", 4, label_smoothing=0.2))
    negative = -log_softmax(LOGITS, axis=1)
    np.testing.assert_allclose(loss, 0.8 * negative[np.arange(6), TARGET] + 0.2 * negative.mean(axis=1), rtol=1e-5)


def test_multilabel_loss_is_weighted_mean_binary_cross_entropy():
    target = RNG.integers(0, 2, (6, 4))
    p = expit(LOGITS.astype(np.float64))
    each = -(target * np.log(p) + (1 - target) * np.log(1 - p))
    loss = task_loss(jnp.asarray(LOGITS), jnp.asarray(target), Task("multilabel", 4))
    np.testing.assert_allclose(loss, each.mean(axis=1), rtol=1e-5)
    spec = Task("multilabel", 4, class_weights=(1.0, 0.0, 3.0, 0.0))
    weighted = task_loss(jnp.asarray(LOGITS), jnp.asarray(target), spec)
    np.testing.assert_allclose(weighted, (each[:, 0] + 3 * each[:, 2]) / 4, rtol=1e-5)


def test_multilabel_smoothing_moves_targets_towards_one_half():
    spec = Task("multilabel", 1, label_smoothing=0.2)
    loss = task_loss(jnp.array([[2.0]]), jnp.array([[1.0]]), spec)
    np.testing.assert_allclose(loss, -(0.9 * np.log(expit(2.0)) + 0.1 * np.log(expit(-2.0))), rtol=1e-5)


@pytest.mark.parametrize(("name", "expected"), [("", [4, 0.25]), ("mse", [4, 0.25]), ("mae", [2, 0.5])])
def test_regression_loss_is_mse_or_mae(name, expected):
    loss = task_loss(jnp.array([[3.0], [0.5]]), jnp.array([1.0, 1.0]), Task("regression", 1, name))
    np.testing.assert_allclose(loss, expected)


def test_huber_loss_is_quadratic_then_linear():
    loss = task_loss(jnp.array([[3.0], [0.5]]), jnp.array([0.0, 0.0]), Task("regression", 1, "huber"))
    np.testing.assert_allclose(loss, [2.5, 0.125])


def test_class_weights_scale_the_weight_but_not_the_loss():
    weight = jnp.array([1.0, 1, 1, 0, 1, 0])
    spec = Task("classification", 4, class_weights=(0.5, 1.0, 2.0, 4.0))
    np.testing.assert_allclose(task_weight(jnp.asarray(TARGET), weight, spec), [0.5, 4, 1, 0, 2, 0])
    plain = Task("classification", 4)
    np.testing.assert_allclose(task_weight(jnp.asarray(TARGET), weight, plain), weight)
    logits, target = jnp.asarray(LOGITS), jnp.asarray(TARGET)
    np.testing.assert_array_equal(task_loss(logits, target, spec), task_loss(logits, target, plain))


def test_task_loss_of_bfloat16_logits_is_computed_in_float32():
    loss = task_loss(jnp.asarray(LOGITS, jnp.bfloat16), jnp.asarray(TARGET), Task("classification", 4))
    assert loss.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(LOGITS, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(loss, -log_softmax(rounded, axis=1)[np.arange(6), TARGET], rtol=1e-5)


def test_task_loss_of_extreme_logits_is_finite():
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
    for spec, target in ((Task("classification", 2), jnp.array([0, 0])), (Task("multilabel", 2), jnp.eye(2))):
        loss, gradient = jax.value_and_grad(lambda x, t=target, s=spec: task_loss(x, t, s).sum())(logits)
        assert np.isfinite(loss), spec
        assert np.isfinite(gradient).all(), spec


@pytest.mark.parametrize("label", [-1, 4])
def test_task_loss_of_an_out_of_range_label_is_nan(label):
    loss = task_loss(jnp.zeros((2, 4)), jnp.array([label, 1]), Task("classification", 4))
    assert np.isnan(loss[0])
    assert np.isfinite(loss[1])


def test_task_loss_rejects_mismatched_shapes():
    with pytest.raises(ValueError, match="expected"):
        task_loss(jnp.zeros((2, 4)), jnp.zeros((2, 1)), Task("regression", 1))
    with pytest.raises(ValueError, match="expected"):
        task_loss(jnp.zeros((2, 1)), jnp.zeros((2, 1)), Task("regression", 1))
    with pytest.raises(ValueError, match="expected"):
        task_loss(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), Task("classification", 4))


@pytest.mark.parametrize(
    ("invalid", "arguments"),
    [
        ("kind", {"kind": "ranking", "outputs": 2}),
        ("loss", {"kind": "regression", "outputs": 1, "loss": "l3"}),
        ("loss", {"kind": "classification", "outputs": 2, "loss": "mae"}),
        ("", {"kind": "regression", "outputs": 2}),
        ("", {"kind": "regression", "outputs": 1, "label_smoothing": 0.1}),
        ("label_smoothing", {"kind": "classification", "outputs": 2, "label_smoothing": 1.0}),
        ("class_weights", {"kind": "classification", "outputs": 3, "class_weights": (1.0, 2.0)}),
        ("class_weights", {"kind": "classification", "outputs": 2, "class_weights": (0.0, 0.0)}),
    ],
)
def test_task_rejects_invalid_arguments(invalid, arguments):
    with rejects(invalid, arguments.get(invalid), says="" if invalid else "a regression task has 1 output"):
        Task(**arguments)


def test_task_is_hashable():
    assert hash(Task("classification", 2, class_weights=(1.0, 2.0))) == hash(
        Task("classification", 2, class_weights=(1.0, 2.0))
    )


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_focal_loss_matches_its_formula(kind):
    target = TARGET if kind == "classification" else RNG.integers(2, size=LOGITS.shape).astype(np.float32)
    plain = task_loss(LOGITS, target, Task(kind, 4))
    np.testing.assert_allclose(task_loss(LOGITS, target, Task(kind, 4, loss="focal", gamma=0.0)), plain, rtol=1e-4)
    focal = task_loss(LOGITS, target, Task(kind, 4, loss="focal", gamma=2.0))
    if kind == "classification":
        p = softmax(LOGITS, axis=1)[np.arange(6), TARGET]
        np.testing.assert_allclose(focal, -((1 - p) ** 2) * np.log(p), rtol=1e-3)
    else:
        p = np.where(target > 0, expit(LOGITS), expit(-LOGITS))
        np.testing.assert_allclose(focal, (-((1 - p) ** 2) * np.log(p)).mean(axis=1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_has_a_finite_gradient_at_certainty(kind, gamma):
    target = jnp.array([0]) if kind == "classification" else jnp.array([[1.0, 0.0]])
    task = Task(kind, 2, loss="focal", gamma=gamma)
    for sign in (1.0, -1.0):
        gradient = jax.grad(lambda x: task_loss(x, target, task).sum())(sign * jnp.array([[60.0, -60.0]]))
        assert jnp.isfinite(gradient).all()


def test_classification_mse_is_of_probabilities():
    found = task_loss(LOGITS, TARGET, Task("classification", 4, loss="mse"))
    expected = ((softmax(LOGITS, axis=1) - np.eye(4)[TARGET]) ** 2).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_emd_loss_grows_with_the_distance_between_classes():
    logits = 50.0 * jnp.eye(4)[jnp.array([0, 1, 2, 3])]
    loss = task_loss(logits, jnp.zeros(4, jnp.int32), Task("classification", 4, loss="emd"))
    np.testing.assert_allclose(loss, [0, 1, 2, 3], atol=1e-5)
    uniform = task_loss(jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32), Task("classification", 4, loss="emd"))
    np.testing.assert_allclose(uniform, [0.75**2 + 0.5**2 + 0.25**2], rtol=1e-5)


@pytest.mark.parametrize(("kind", "loss"), [("classification", "mae"), ("multilabel", "emd"), ("regression", "focal")])
def test_task_rejects_a_loss_of_another_kind(kind, loss):
    with rejects("loss", loss, says=kind) as error:
        Task(kind, 1, loss=loss)
    assert error.value.choices and loss not in error.value.choices
    with rejects("gamma", -1):
        Task("classification", 2, loss="focal", gamma=-1)


def masked_mean(term, logits, batch):
    """Returns the mean of a term as the step computes it."""
    outputs = Outputs({"t": logits}, jnp.zeros((6, 1)), {}, {}, {}, {})
    count = term.count(batch)
    return term.total(Context(batch, outputs, {}, {term.name: count})) / jnp.maximum(count, 1e-9)


def labelled_batch(labelled, row_weight=None):
    weight = np.array([1, 1, 1, 1, 1, 0], np.float32)  # the last row is padding
    targets = {"t": np.where(labelled, TARGET, 0)}
    ids = np.arange(6)
    return Batch({}, {}, {}, targets, weight, ids, labelled={"t": np.array(labelled)}, row_weight=row_weight)


def test_task_loss_is_the_mean_over_rows_with_a_label():
    labelled = np.array([True, False, True, True, False, True])
    row_weight = np.array([2, 9, 1, 0.5, 9, 9], np.float32)
    class_weights = (1.0, 2.0, 3.0, 4.0)
    spec = Task("classification", 4, class_weights=class_weights)
    term = TaskLoss(name="task/t", weight=1.0, task="t", spec=spec)
    rows = [0, 2, 3]
    losses = -log_softmax(LOGITS.astype(np.float64), axis=1)[rows, TARGET[rows]]
    weights = row_weight[rows] * np.array(class_weights)[TARGET[rows]]
    mean = masked_mean(term, jnp.asarray(LOGITS), labelled_batch(labelled, row_weight))
    np.testing.assert_allclose(mean, np.average(losses, weights=weights), rtol=1e-5)
    accuracy = masked_mean(Accuracy(name="accuracy", task="t"), jnp.asarray(LOGITS), labelled_batch(labelled))
    np.testing.assert_allclose(accuracy, np.mean(LOGITS.argmax(1)[rows] == TARGET[rows]), rtol=1e-6)


def test_task_loss_without_any_label_is_zero_with_zero_gradient():
    term = TaskLoss(name="task/t", weight=1.0, task="t", spec=Task("classification", 4))
    batch = labelled_batch(np.zeros(6, bool))
    loss, slope = jax.value_and_grad(lambda logits: masked_mean(term, logits, batch))(jnp.asarray(LOGITS))
    assert loss == 0 and not slope.any()
    some = labelled_batch(np.array([True, False, False, False, False, False]))
    slope = jax.grad(lambda logits: masked_mean(term, logits, some))(jnp.asarray(LOGITS))
    assert slope[0].all() and not slope[1:].any()
