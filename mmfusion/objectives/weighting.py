"""Loss weights that are learned or measured: uncertainty weighting, GradNorm and Gradient-Blending.

B batch · D width
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel
from mmfusion.objectives.base import Context, Objective, Requirements, Scalars, Term
from mmfusion.objectives.supervised import Task, task_loss, task_weight
from mmfusion.objectives.unimodal import UnimodalLoss

LOG_VARIANCE = "log_variance_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLogVariance(Term):
    """Half a task's log variance, which keeps the learned variances small."""

    spec: Task

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(task_weight(batch.targets[self.task], batch.loss_weight(self.task), self.spec))

    def total(self, context: Context) -> jax.Array:
        return self.count(context.batch) * context.params[LOG_VARIANCE + self.task] / 2


@dataclasses.dataclass(frozen=True)
class Uncertainty(Objective):
    """Weights each task by a learned variance s² = e^v (Kendall et al. 2018, arXiv:1705.07115).

    The loss L becomes L / s² + v / 2, or L / (2 s²) + v / 2 for a regression task.
    """

    requires: ClassVar[Requirements] = Requirements(excludes=("gradnorm",))

    def parameters(self, tasks: Sequence[str]) -> tuple[str, ...]:
        return tuple(LOG_VARIANCE + task for task in sorted(tasks))

    def terms(self, name: str, model: FusionModel, tasks: Mapping[str, Task]) -> Sequence[Term]:
        return [
            HalfLogVariance(name=LOG_VARIANCE + task, weight=spec.weight, spec=spec, task=task)
            for task, spec in tasks.items()
        ]

    def coefficients(self, weights: Mapping[str, Any], params: Any, terms: Sequence[Term]) -> Scalars:
        precisions = self.logged_weights(weights, params, terms)
        return {
            term.name: precisions[term.task]
            for term in terms
            if term.head and not (isinstance(term, UnimodalLoss) and term.probe)
        }

    def logged_weights(self, weights: Mapping[str, Any], params: Any, terms: Sequence[Term]) -> Scalars:
        return {
            term.task: (0.5 if term.spec.kind == "regression" else 1.0) * jnp.exp(-params[LOG_VARIANCE + term.task])
            for term in terms
            if isinstance(term, HalfLogVariance)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSlope(Term):
    """Σ over rows of the squared norm of d(mean task loss)/d(features), a measure.

    The gradient is taken at the features that the head reads, where it costs nothing.
    """

    spec: Task

    def total(self, context: Context) -> jax.Array:
        kernel = context.params[f"heads_{self.task}"]["kernel"]
        weight = task_weight(context.batch.targets[self.task], context.batch.loss_weight(self.task), self.spec)
        weight = weight / jnp.maximum(context.counts[f"task/{self.task}"], 1e-9)

        def loss(logits: jax.Array) -> jax.Array:
            return context.target_sum(self.task, weight, lambda targets: task_loss(logits, targets, self.spec))

        slope = jax.grad(loss)(context.outputs.logits[self.task]) @ kernel.T  # [B, D]
        return jnp.sum(jnp.square(slope))


@dataclasses.dataclass(frozen=True)
class GradNorm(Objective):
    """Weights tasks so that their gradients have similar norms (Chen et al. 2018, arXiv:1711.02257).

    G_i, the norm of task i's weighted gradient, is drawn to the mean of all, times r_i^α, where r_i is the share of its
    first loss that a task has left, over the mean of all. The gradient is taken at the features that the heads read
    (as Sener & Koltun 2018, arXiv:1810.04650, do), in place of the last shared layer's weights.

    Attributes:
      alpha: how much more a task counts that learns slowly.
      rate: learning rate of the weights, whose mean stays 1. Their change is proportional to the gradients, which are
        smaller in a larger batch.
    """

    alpha: float = 1.5
    rate: float = 0.025

    requires: ClassVar[Requirements] = Requirements(tasks=2, level="feature", excludes=("uncertainty",))

    def terms(self, name: str, model: FusionModel, tasks: Mapping[str, Task]) -> Sequence[Term]:
        return [HeadSlope(name=f"slope/{task}", task=task, spec=spec) for task, spec in tasks.items()]

    def init_weights(self, terms: Sequence[Term]) -> dict[str, Any]:
        tasks = [term.task for term in terms if isinstance(term, HeadSlope)]
        return {"tasks": {task: jnp.ones(()) for task in tasks}, "first": {task: jnp.zeros(()) for task in tasks}}

    def coefficients(self, weights: Mapping[str, Any], params: Any, terms: Sequence[Term]) -> Scalars:
        return {term.name: weights["tasks"][term.task] for term in terms if term.task}

    def update_weights(self, weights: Mapping[str, Any], stats: Scalars, coefficients: Scalars) -> dict[str, Any]:
        tasks = list(weights["tasks"])
        losses = {task: stats[f"task/{task}"] for task in tasks}
        norms = {task: coefficients[f"task/{task}"] * jnp.sqrt(stats[f"slope/{task}"]) for task in tasks}
        return self.balance(weights, losses, norms)

    def balance(
        self, weights: Mapping[str, Any], losses: Mapping[str, jax.Array], norms: Mapping[str, jax.Array]
    ) -> dict[str, Any]:
        """Returns the state after a step.

        Args:
          weights: the state before it.
          losses: the mean loss of each task, unweighted.
          norms: of the gradient of each task's weighted loss.
        """
        before = weights["tasks"]
        first = {task: jnp.where(old > 0, old, losses[task]) for task, old in weights["first"].items()}
        left = {task: loss / jnp.maximum(first[task], 1e-9) for task, loss in losses.items()}
        mean_left, mean_norm = (sum(values.values()) / len(losses) for values in (left, norms))
        after = {}
        for task, norm in norms.items():
            wanted = mean_norm * (left[task] / jnp.maximum(mean_left, 1e-9)) ** self.alpha
            slope = jnp.sign(norm - wanted) * norm / before[task]  # of |G_i - wanted|, with `wanted` constant
            after[task] = jnp.maximum(before[task] - self.rate * slope, 1e-2)
        total = sum(after.values())
        complete = jnp.stack(list(losses.values())).all()  # without a label of some task there is nothing to balance
        after = {task: jnp.where(complete, weight * len(after) / total, before[task]) for task, weight in after.items()}
        return {"tasks": after, "first": first}

    def logged_weights(self, weights: Mapping[str, Any], params: Any, terms: Sequence[Term]) -> Scalars:
        return dict(weights["tasks"])


@dataclasses.dataclass(frozen=True)
class GradientBlending(Objective):
    """Weights the joint head and each modality's by how well it generalises (Wang et al. 2020, arXiv:1905.12681).

    w ∝ G / O²: G is the fall of a head's validation loss since the last validation, O the growth of its distance from
    the training loss. The paper measures both in separate runs of each head; here they are measured in the run itself,
    on validation and on as many training rows, both in evaluation mode. A head without weight would hardly improve
    again, so each keeps a minimum.

    Attributes:
      floor: minimum of |O|, in nats; below it a measurement is noise.
      least: weight of the head that generalises worst, where 1 is the mean.
    """

    floor: float = 0.05
    least: float = 0.1

    requires: ClassVar[Requirements] = Requirements(excludes=("unimodal",))
    unimodal_heads: ClassVar[str] = "heads"
    needs_head_losses: ClassVar[bool] = True

    def init_weights(self, terms: Sequence[Term]) -> dict[str, Any]:
        return {term.head: jnp.ones(()) for term in terms if term.head and term.weight is not None}

    def coefficients(self, weights: Mapping[str, Any], params: Any, terms: Sequence[Term]) -> Scalars:
        return {term.name: weights[term.head] for term in terms if term.head and term.weight is not None}

    def logged_weights(self, weights: Mapping[str, Any], params: Any, terms: Sequence[Term]) -> Scalars:
        return dict(weights)

    def on_validation(
        self, before: Mapping[str, tuple[float, float]], now: Mapping[str, tuple[float, float]]
    ) -> dict[str, Any] | None:
        scores = {}
        for head, (train, valid) in now.items():
            gained = max(before[head][1] - valid, 0.0)
            overfitted = (valid - train) - (before[head][1] - before[head][0])
            scores[head] = gained / max(abs(overfitted), self.floor) ** 2
        total = sum(scores.values())
        if not math.isfinite(total) or total <= 0:
            return None
        return {head: self.least + (1 - self.least) * score * len(scores) / total for head, score in scores.items()}
