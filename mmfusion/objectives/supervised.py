"""Task losses, one value an example; the step divides the sum of weight·loss by the sum of weight, once.

B batch · C classes.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from mmfusion.data.batch import Batch
from mmfusion.data.targets import UNSCALED, Scale
from mmfusion.errors import UserError
from mmfusion.objectives.base import Context, Term


@dataclasses.dataclass(frozen=True)
class Task:
    """What one head predicts and how it is scored; hashable, so that a jitted step can close over it.

    Attributes:
      kind: `classification`, `multilabel` or `regression`.
      outputs: logits the head gives: classes, labels, or 1 for regression.
      loss: one of `LOSSES[kind]`; empty: the first of them.
      gamma: of the focal loss, how much less an example counts that is predicted well.
      label_smoothing: share of the target's mass spread evenly, in [0, 1); 0 for regression.
      class_weights: one weight a class or label, or `()` for all 1.
      weight: factor of this task's mean loss in the sum over tasks; the step applies it.
      metrics: groups of further metrics of a regression task, keys of `metrics.REGRESSION_GROUPS`.
      scale: of a regression target, from the units of the data to those of the loss.
    """

    kind: str
    outputs: int
    loss: str = ""
    gamma: float = 2.0
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()
    weight: float = 1.0
    metrics: tuple[str, ...] = ()
    scale: Scale = UNSCALED

    def __post_init__(self):
        if self.kind not in TASKS:
            raise UserError("unknown kind of task", path="kind", value=self.kind, choices=TASKS)
        if self.loss not in ("", *LOSSES[self.kind]):
            message = f"unknown loss of a {self.kind} task"
            raise UserError(message, path="loss", value=self.loss, choices=LOSSES[self.kind])
        if self.gamma < 0:
            raise UserError("must not be negative", path="gamma", value=self.gamma)
        if not 0 <= self.label_smoothing < 1:
            raise UserError("must be at least 0 and below 1", path="label_smoothing", value=self.label_smoothing)
        if self.kind == "regression" and (self.outputs != 1 or self.label_smoothing or self.class_weights):
            raise UserError("a regression task has 1 output, no label_smoothing and no class_weights")
        if self.class_weights and len(self.class_weights) != self.outputs:
            raise UserError(
                f"{len(self.class_weights)} entries for {self.outputs} classes",
                path="class_weights",
                value=self.class_weights,
            )
        if any(w < 0 for w in self.class_weights) or (self.class_weights and not any(self.class_weights)):
            raise UserError("must not be negative, nor all zero", path="class_weights", value=self.class_weights)


def task_weight(target: jax.Array, weight: jax.Array, spec: Task) -> jax.Array:
    """Returns each example's weight `[B]` in the mean: its batch weight times the class weight of its target.

    The weights of a multi-label task weigh the labels within an example instead, see `task_loss`.

    Args:
      target: class `[B]` int32, labels `[B, C]`, or regression `[B]`.
      weight: `[B]` float32, 0 on padding and without a label, see `Batch.loss_weight`.
      spec: the task.
    """
    weight = weight.astype(jnp.float32)
    if spec.kind == "classification" and spec.class_weights:
        return weight * jnp.asarray(spec.class_weights, jnp.float32)[target]
    return weight


def task_loss(logits: jax.Array, target: jax.Array, spec: Task) -> jax.Array:
    """Returns each example's loss `[B]` float32, unweighted by example; finite wherever logits and target are valid.

    Args:
      logits: `[B, C]`, or `[B, 1]` for regression, of any float type.
      target: class `[B]` int32 in [0, C) (padding too), labels `[B, C]` in [0, 1], or regression `[B]` float.
      spec: the task.

    Raises:
      ValueError: if the shapes do not fit the task.
    """
    shape = (logits.shape[0], spec.outputs)
    expected = shape if spec.kind == "multilabel" else shape[:1]
    if logits.shape != shape or target.shape != expected:
        raise ValueError(
            f"{spec.kind}: logits {logits.shape} and target {target.shape}, expected {shape} and {expected}"
        )
    return TASKS[spec.kind](logits.astype(jnp.float32), target, spec)  # [B]


def _classification(logits: jax.Array, target: jax.Array, spec: Task) -> jax.Array:
    labels = optax.smooth_labels(jax.nn.one_hot(target, spec.outputs), spec.label_smoothing)  # [B, C]
    if spec.loss == "emd":
        # Between ordered classes the mass that must move is the difference of the cumulative shares.
        loss = jnp.square(jnp.cumsum(jax.nn.softmax(logits) - labels, axis=1)).sum(axis=1)
    elif spec.loss == "mse":
        loss = jnp.square(jax.nn.softmax(logits) - labels).sum(axis=1)
    elif spec.loss == "focal":
        logs = jax.nn.log_softmax(logits)
        wrong = jnp.maximum(-jnp.expm1(logs), 1e-12)  # the slope of 0^gamma would be infinite
        loss = -(labels * wrong**spec.gamma * logs).sum(axis=1)
    else:
        loss = optax.softmax_cross_entropy(logits, labels)
    # A one-hot row outside the classes is all zero, a loss of 0 that hides the mistake: make it loud.
    return jnp.where((target >= 0) & (target < spec.outputs), loss, jnp.nan)


def _multilabel(logits: jax.Array, target: jax.Array, spec: Task) -> jax.Array:
    labels = target.astype(jnp.float32) * (1 - spec.label_smoothing) + spec.label_smoothing / 2
    if spec.loss == "focal":
        loss = optax.sigmoid_focal_loss(logits, labels, gamma=spec.gamma)  # [B, C]
    else:
        loss = optax.sigmoid_binary_cross_entropy(logits, labels)
    return jnp.average(loss, axis=1, weights=jnp.asarray(spec.class_weights or (1.0,) * spec.outputs))


def _regression(logits: jax.Array, target: jax.Array, spec: Task) -> jax.Array:
    return REGRESSION_LOSSES[spec.loss or "mse"](logits[:, 0] - target.astype(jnp.float32))


REGRESSION_LOSSES = {"mse": jnp.square, "mae": jnp.abs, "huber": optax.huber_loss}


# Focal: Lin et al. 2017, arXiv:1708.02002. Of classes mse is Brier's score (1950). Squared earth mover's distance, for
# ordered classes: Hou et al. 2016, arXiv:1611.05916. Huber's threshold is 1.
LOSSES = {
    "classification": ("cross_entropy", "focal", "emd", "mse"),
    "multilabel": ("cross_entropy", "focal"),
    "regression": tuple(REGRESSION_LOSSES),
}


TASKS = {"classification": _classification, "multilabel": _multilabel, "regression": _regression}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskLoss(Term):
    """The loss of the joint head on a task."""

    spec: Task

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(task_weight(batch.targets[self.task], batch.loss_weight(self.task), self.spec))

    def total(self, context: Context) -> jax.Array:
        weight = task_weight(context.batch.targets[self.task], context.batch.loss_weight(self.task), self.spec)
        logits = context.outputs.logits[self.task]
        return context.target_sum(self.task, weight, lambda targets: task_loss(logits, targets, self.spec))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy(Term):
    """The share of rows whose class is predicted, a measure."""

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(batch.metric_weight(self.task))

    def total(self, context: Context) -> jax.Array:
        predicted = context.outputs.logits[self.task].argmax(axis=-1)
        weight = context.batch.metric_weight(self.task)
        return context.target_sum(self.task, weight, lambda targets: predicted == targets)


def task_terms(tasks: Mapping[str, Task], log_losses: bool) -> list[Term]:
    """Returns the loss of each task and the accuracy of each classification task; `log_losses` logs `task/NAME`."""
    losses: list[Term] = [
        TaskLoss(
            name=f"task/{task}", weight=spec.weight, task=task, head="joint", spec=spec,
            metric=f"task/{task}" if log_losses else "",
        )
        for task, spec in tasks.items()
    ]  # fmt: skip
    classified = [task for task, spec in tasks.items() if spec.kind == "classification"]
    names = {task: "accuracy" if len(classified) == 1 else f"{task}/accuracy" for task in classified}
    return losses + [Accuracy(name=name, task=task, metric=name) for task, name in names.items()]
