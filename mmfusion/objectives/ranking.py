"""The regulariser of `qmf`, which ranks confidences by past losses (Zhang et al. 2023, arXiv:2306.02050).

B batch · S slots of the history
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mmfusion.data.batch import Batch
from mmfusion.models.fusion.late import QMF, energy_confidence
from mmfusion.models.model import FusionModel
from mmfusion.objectives.base import Context, Objective, Requirements, Scalars, Term
from mmfusion.objectives.supervised import Task, task_loss, task_weight

SCALE = 10  # the authors rank a tenth of the negative energy
History = Mapping[str, jax.Array]  # `losses` and `times`, `[S]` each


def normalised_losses(history: History, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean past loss at `slots [B]`, scaled to [0, 1] over all slots, and whether there was any, `[B]`."""
    seen = history["times"] > 0
    means = history["losses"] / jnp.maximum(history["times"], 1)
    low = jnp.min(means, where=seen, initial=jnp.inf)
    span = jnp.maximum(jnp.max(means, where=seen, initial=-jnp.inf) - low, 1e-9)
    return jnp.where(seen[slots], (means[slots] - low) / span, 0.0), seen[slots]  # finite: 0 · NaN would be NaN


def ranking_loss(confidence: jax.Array, past: jax.Array, partner: jax.Array) -> jax.Array:
    """Returns max(0, g (c_i - c_j) + |κ_i - κ_j|) `[B]`, with g the sign of κ_i - κ_j: a higher loss, less confidence.

    This is the paper's formula; its authors' code subtracts the margin |κ_i - κ_j|.

    Args:
      confidence: c `[B]`.
      past: κ `[B]`, the mean past loss in [0, 1].
      partner: j `[B]`, the row that each is compared with.
    """
    difference = past - past[partner]
    hinge = jnp.sign(difference) * (confidence - confidence[partner]) + jnp.abs(difference)
    return jnp.where(difference != 0, jnp.maximum(hinge, 0.0), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PastLosses(Term):
    """Sums by slot the losses of modality `head` and how often it was there, `[2, S]`: a measure, no mean.

    Attributes:
      spec: the task.
      size: number of slots S; an example's is its id modulo S.
    """

    spec: Task
    size: int

    def total(self, context: Context) -> jax.Array:
        batch = context.batch
        losses = task_loss(context.outputs.unimodal[self.task][self.head], batch.targets[self.task], self.spec)
        valid = context.outputs.present[self.head] & (batch.loss_weight(self.task) > 0)
        rows = jnp.stack([jnp.where(valid, losses, 0.0), valid.astype(jnp.float32)])  # [2, B]
        return jnp.zeros((2, self.size)).at[:, batch.id % self.size].add(rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingLoss(Term):
    """The ranking loss of modality `head`, over pairs of neighbours that both have it and a past loss.

    Attributes:
      spec: the task.
      fusion: the strategy, for its confidences.
      objective: the name that the history is kept under.
    """

    spec: Task
    fusion: QMF
    objective: str

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(task_weight(batch.targets[self.task], batch.loss_weight(self.task), self.spec))

    def total(self, context: Context) -> jax.Array:
        if self.objective not in context.loss_weights:  # without a history there is nothing to rank
            return jnp.zeros(())
        batch, fusion = context.batch, self.fusion
        logits = context.outputs.unimodal[self.task][self.head].astype(jnp.float32)
        confidence = energy_confidence(logits, fusion.temperature, fusion.centred)[:, 0] / SCALE
        past, seen = normalised_losses(
            context.loss_weights[self.objective][self.task][self.head], batch.id % fusion.history
        )
        weight = task_weight(batch.targets[self.task], batch.loss_weight(self.task), self.spec)
        valid = context.outputs.present[self.head] & seen & (weight > 0)
        losses = ranking_loss(confidence, past, batch.partner)
        return jnp.sum(jnp.where(valid & valid[batch.partner], weight * losses, 0.0))


@dataclasses.dataclass(frozen=True)
class Ranking(Objective):
    """Draws a modality's confidence below a neighbour's where its past losses of the example are higher.

    The past losses are those of all earlier steps; in the first epoch there are none. They are part of the state, so
    that a continued run has them.

    Attributes:
      fusion: the strategy, whose options these are.
    """

    fusion: QMF

    requires: ClassVar[Requirements] = Requirements(group=2)

    def terms(self, name: str, model: FusionModel, tasks: Mapping[str, Task]) -> Sequence[Term]:
        pairs = [(task, spec, m) for task, spec in tasks.items() for m in model.modalities]
        return [
            RankingLoss(
                name=f"ranking/{task}/{m}", weight=self.fusion.ranking, task=task, head=m, spec=spec,
                fusion=self.fusion, objective=name, metric="objective/qmf",
            )
            for task, spec, m in pairs
        ] + [
            PastLosses(name=f"past/{task}/{m}", task=task, head=m, spec=spec, size=self.fusion.history)
            for task, spec, m in pairs
        ]  # fmt: skip

    def init_weights(self, terms: Sequence[Term]) -> dict[str, Any]:
        history: dict[str, Any] = {}
        for term in terms:
            if isinstance(term, PastLosses):
                slots = {"losses": jnp.zeros(term.size), "times": jnp.zeros(term.size)}
                history.setdefault(term.task, {})[term.head] = slots
        return history

    def update_weights(self, weights: Mapping[str, Any], stats: Scalars, coefficients: Scalars) -> dict[str, Any]:
        def updated(history: History, sums: jax.Array) -> History:
            return {"losses": history["losses"] + sums[0], "times": history["times"] + sums[1]}

        return {
            task: {m: updated(history, stats[f"past/{task}/{m}"]) for m, history in heads.items()}
            for task, heads in weights.items()
        }
