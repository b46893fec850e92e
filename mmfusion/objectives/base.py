"""The contract of objectives: what a run learns beside its tasks, and what the train step asks of it.

An objective offers any of: loss terms and measures (`terms`), loss weights (`init_weights`, `coefficients`,
`update_weights`, `on_validation`), a batch transform (`transform_batch`) and a gradient transform
(`transform_gradients`). The step sums terms and counts over micro-batches, devices and hosts and divides once.

B batch · D width · C outputs of a task
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel, Outputs

if TYPE_CHECKING:
    from mmfusion.config import RunConfig

Scalars = dict[str, Any]  # scalar arrays, or floats where a value is constant


@flax.struct.dataclass
class Context:
    """What a term reads of one micro-batch.

    Attributes:
      batch: the rows, after all batch transforms.
      outputs: of the model.
      params: of the model.
      counts: of every term, over the whole batch and all devices.
      step: updates done.
      loss_weights: state of the objectives, see `Objective.init_weights`.
    """

    batch: Batch
    outputs: Outputs
    params: Any
    counts: Scalars
    step: jax.Array | int = 0
    loss_weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def target_sum(self, task: str, weight: jax.Array, values: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Returns Σ weight · values(targets) over rows; a mixed row counts its own target and its partner's."""
        targets, share = self.batch.targets[task], self.batch.mix.get("targets")
        if share is None:
            return jnp.sum(weight * values(targets))
        partner = self.batch.partner
        return jnp.sum(share * weight * values(targets) + (1 - share) * weight[partner] * values(targets[partner]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
    """A loss term, or a measure: its mean is Σ `total` / Σ `count` over micro-batches, devices and hosts.

    Attributes:
      name: unique among the terms of a run.
      weight: its coefficient before loss weighting; None for a measure, which is no part of the loss.
      task: the task that it belongs to, or "".
      head: the head that it scores, `joint` or a modality, or "".
      metric: the metric that it is logged as, or ""; terms of one metric are added.
      metric_weight: its factor there.
    """

    name: str
    weight: float | None = None
    task: str = ""
    head: str = ""
    metric: str = ""
    metric_weight: float = 1.0

    def count(self, batch: Batch) -> jax.Array | None:
        """Returns the denominator of the mean, a scalar that depends on no parameter; None makes the mean a sum."""
        return None

    def total(self, context: Context) -> jax.Array:
        """Returns the numerator of the mean for one micro-batch, a scalar."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What a config must have for an objective to apply; config checks follow from it.

    Attributes:
      modalities: the fewest modalities.
      tasks: the fewest tasks.
      target_kind: a kind that one of the targets must have, or "".
      level: the level that the fusion strategy must have, or "".
      excludes: objectives that it cannot be combined with.
      group: rows that must stay in one micro-batch.
    """

    modalities: int = 1
    tasks: int = 1
    target_kind: str = ""
    level: str = ""
    excludes: tuple[str, ...] = ()
    group: int = 1


class Objective:
    """Base class: contributes nothing. A subclass is a frozen dataclass, or a module; its fields are config options."""

    requires: ClassVar[Requirements] = Requirements()
    unimodal_heads: ClassVar[str] = ""  # `heads` or `probes`: the model also scores each modality by itself
    needs_head_losses: ClassVar[bool] = False  # `on_validation` is called after each validation
    separates_losses: ClassVar[bool] = False  # `combine_gradients` is called

    @classmethod
    def validate(cls, path: str, options: Mapping[str, Any], config: "RunConfig") -> None:
        """Raises UserError where the options, at `path` of the config, do not fit the config."""

    def parameters(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Returns names of scalar parameters, initialised to 0, that the model holds for this objective."""
        return ()

    def terms(self, name: str, model: FusionModel, tasks: Mapping[str, Any]) -> Sequence[Term]:
        """Returns the loss terms and measures; `name` is the objective's, `tasks` are the run's `Task`s by name."""
        return ()

    def transform_batch(self, batch: Batch, seed: jax.Array, step: jax.Array) -> Batch:
        """Returns the preprocessed training batch transformed, row by row, by example id and step."""
        return batch

    def combine_gradients(self, grads: Mapping[str, Any]) -> Any:
        """Returns one gradient, of those of the loss of each modality's head and, under "", of all others."""
        raise NotImplementedError

    def transform_gradients(self, grads: Any, stats: Scalars, seed: jax.Array, step: jax.Array) -> Any:
        """Returns the gradients, summed over the whole batch, transformed; `stats` are the means by term."""
        return grads

    def init_weights(self, terms: Sequence[Term]) -> dict[str, Any]:
        """Returns the state of the loss weights before the first step; empty where it has none."""
        return {}

    def coefficients(self, weights: Mapping[str, Any], params: Any, terms: Sequence[Term]) -> Scalars:
        """Returns a factor of each weighted term, by the term's name."""
        return {}

    def update_weights(self, weights: Mapping[str, Any], stats: Scalars, coefficients: Scalars) -> dict[str, Any]:
        """Returns the state of the loss weights after a step with these means and total coefficients by term."""
        return dict(weights)

    def logged_weights(self, weights: Mapping[str, Any], params: Any, terms: Sequence[Term]) -> Scalars:
        """Returns the loss weights that are logged as `weight/NAME`."""
        return {}

    def on_validation(
        self, before: Mapping[str, tuple[float, float]], now: Mapping[str, tuple[float, float]]
    ) -> dict[str, Any] | None:
        """Returns the state of the loss weights after a validation, on the host; None leaves it as it is.

        Args:
          before: each head's loss on (training, validation) rows at the previous validation.
          now: the same at this one.
        """
        return None
