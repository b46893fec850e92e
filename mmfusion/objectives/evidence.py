"""The loss of evidential classification, of `tmc` (Han et al. 2021, arXiv:2102.02051; Sensoy et al. 2018, 1806.01768).

B batch · C classes
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import digamma, gammaln

from mmfusion.data.batch import Batch
from mmfusion.errors import UserError
from mmfusion.models.model import FusionModel
from mmfusion.objectives.base import Context, Objective, Scalars, Term
from mmfusion.objectives.supervised import Task, TaskLoss, task_weight
from mmfusion.objectives.unimodal import UnimodalLoss


def evidential_loss(log_alpha: jax.Array, labels: jax.Array, annealing: jax.Array | float) -> jax.Array:
    """Returns each example's loss `[B]`: the expected cross-entropy, and evidence for wrong classes.

    Under p ~ Dir(α), E[-log p_y] = ψ(Σα) - ψ(α_y). The second summand is KL(Dir(α'), Dir(1)), with α' = α but 1 for the
    right class.

    Args:
      log_alpha: log α `[B, C]`.
      labels: the targets' probabilities `[B, C]`, such as one-hot.
      annealing: factor of the second summand.
    """
    alpha = jnp.exp(log_alpha.astype(jnp.float32))
    expected = (labels * (digamma(alpha.sum(axis=1, keepdims=True)) - digamma(alpha))).sum(axis=1)
    wrong = 1 + (alpha - 1) * (1 - labels)
    total = wrong.sum(axis=1, keepdims=True)
    divergence = gammaln(total[:, 0]) - gammaln(wrong).sum(axis=1) - gammaln(float(wrong.shape[1]))
    divergence += ((wrong - 1) * (digamma(wrong) - digamma(total))).sum(axis=1)
    return expected + annealing * divergence


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvidenceLoss(Term):
    """The evidential loss of `head` on a task, over rows that have it, divided by the weight of all rows.

    Attributes:
      spec: the task.
      anneal: steps over which the weight of the divergence rises from 0 to 1; 0: it is 1.
    """

    spec: Task
    anneal: int

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(task_weight(batch.targets[self.task], batch.loss_weight(self.task), self.spec))

    def total(self, context: Context) -> jax.Array:
        outputs, batch = context.outputs, context.batch
        joint = self.head == "joint"
        log_alpha = outputs.logits[self.task] if joint else outputs.unimodal[self.task][self.head]
        present = True if joint else outputs.present[self.head]
        annealing = jnp.minimum(context.step / self.anneal, 1.0) if self.anneal else 1.0

        def loss(targets: jax.Array) -> jax.Array:
            labels = optax.smooth_labels(jax.nn.one_hot(targets, self.spec.outputs), self.spec.label_smoothing)
            return jnp.where(present, evidential_loss(log_alpha, labels, annealing), 0.0)

        weight = task_weight(batch.targets[self.task], batch.loss_weight(self.task), self.spec)
        return context.target_sum(self.task, weight, loss)


@dataclasses.dataclass(frozen=True)
class Evidence(Objective):
    """Replaces the cross-entropy of the joint head and of each modality's by the evidential loss.

    The cross-entropy is still logged as `task/NAME` and `objective/unimodal`, and is the loss of evaluations.

    Attributes:
      anneal: see `EvidenceLoss`.
    """

    anneal: int

    def terms(self, name: str, model: FusionModel, tasks: Mapping[str, Task]) -> Sequence[Term]:
        for task, spec in tasks.items():
            if spec.loss not in ("", "cross_entropy"):
                message = f"replaces the cross-entropy, and {task} has the loss {spec.loss!r}; choose task"
                raise UserError(message, path="tmc.loss", value="digamma")
        return [
            EvidenceLoss(
                name=f"evidence/{task}/{head}", weight=spec.weight, task=task, head=head, spec=spec, anneal=self.anneal,
                metric="objective/tmc", metric_weight=spec.weight,
            )
            for task, spec in tasks.items() for head in ("joint", *model.modalities)
        ]  # fmt: skip

    def coefficients(self, weights: Mapping[str, Any], params: Any, terms: Sequence[Term]) -> Scalars:
        return {term.name: 0.0 for term in terms if isinstance(term, TaskLoss | UnimodalLoss)}
