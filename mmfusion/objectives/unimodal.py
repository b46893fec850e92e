"""Losses of each modality alone: of heads of its own, or of probes that only measure."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel
from mmfusion.objectives.base import Context, Objective, Term
from mmfusion.objectives.supervised import Task, task_loss, task_weight


@dataclasses.dataclass(frozen=True)
class Unimodal(Objective):
    """Adds a head for each modality, trained on the tasks beside the joint one, to any fusion strategy."""

    weight: float = 1.0

    unimodal_heads: ClassVar[str] = "heads"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnimodalLoss(Term):
    """The loss of modality `head` alone on a task, over rows that have it, divided by the weight of all rows.

    Attributes:
      spec: the task.
      probe: the head only measures, so that uncertainty weighting passes over it.
    """

    spec: Task
    probe: bool

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(task_weight(batch.targets[self.task], batch.loss_weight(self.task), self.spec))

    def total(self, context: Context) -> jax.Array:
        logits, present = context.outputs.unimodal[self.task][self.head], context.outputs.present[self.head]
        weight = task_weight(context.batch.targets[self.task], context.batch.loss_weight(self.task), self.spec)

        def loss(targets: jax.Array) -> jax.Array:
            return jnp.where(present, task_loss(logits, targets, self.spec), 0.0)

        return context.target_sum(self.task, weight, loss)


def unimodal_terms(model: FusionModel, tasks: Mapping[str, Task], by_name: Mapping[str, Objective]) -> Sequence[Term]:
    """Returns a term for each task and modality that the model scores alone, weighted by the objective `unimodal`."""
    if not model.has_unimodal_losses:
        return ()
    unimodal = by_name.get("unimodal")
    weight = unimodal.weight if isinstance(unimodal, Unimodal) else 1.0
    return [
        UnimodalLoss(
            name=f"unimodal/{task}/{m}", weight=spec.weight * weight, task=task, head=m, spec=spec,
            probe=model.uses_probes, metric="objective/unimodal", metric_weight=spec.weight,
        )
        for task, spec in tasks.items() for m in model.modalities
    ]  # fmt: skip
