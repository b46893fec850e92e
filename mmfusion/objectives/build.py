"""The objectives of one run, as the train step reads them."""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel
from mmfusion.objectives.base import Objective, Scalars, Term
from mmfusion.objectives.of_strategy import strategy_objectives
from mmfusion.objectives.supervised import Task, task_terms
from mmfusion.objectives.unimodal import unimodal_terms

LossWeights = dict[str, dict[str, Any]]  # state of the loss weights, by objective


@dataclasses.dataclass(frozen=True)
class Objectives:
    """Everything that a run learns: its terms, and the objectives that weight, transform or modulate.

    Attributes:
      terms: loss terms and measures.
      by_name: the objectives.
    """

    terms: tuple[Term, ...]
    by_name: Mapping[str, Objective] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> int:
        """How many rows in sequence must stay in one micro-batch."""
        return max((objective.requires.group for objective in self.by_name.values()), default=1)

    @property
    def need_head_losses(self) -> bool:
        """Whether loss weights depend on the losses of each head at a validation."""
        return any(objective.needs_head_losses for objective in self.by_name.values())

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads whose losses have gradients of their own, "" for all but those of modalities; empty if none has."""
        separate = any(objective.separates_losses for objective in self.by_name.values())
        return tuple(dict.fromkeys(["", *map(_modality, self.terms)])) if separate else ()

    def transform_batch(self, batch: Batch, seed: jax.Array, step: jax.Array) -> Batch:
        """Returns the preprocessed batch after all batch transforms."""
        for objective in self.by_name.values():
            batch = objective.transform_batch(batch, seed, step)
        return batch

    def counts(self, batch: Batch) -> Scalars:
        """Returns the count of each term whose mean is divided by one."""
        counts = {term.name: term.count(batch) for term in self.terms}
        return {name: count for name, count in counts.items() if count is not None}

    def transform_gradients(self, grads: Any, stats: Scalars, seed: jax.Array, step: jax.Array) -> Any:
        """Returns the summed gradients, of each of `heads` if there are any, after all gradient transforms."""
        for objective in self.by_name.values():
            if objective.separates_losses:
                grads = objective.combine_gradients(dict(zip(self.heads, grads, strict=True)))
        for objective in self.by_name.values():
            grads = objective.transform_gradients(grads, stats, seed, step)
        return grads

    def init_weights(self) -> LossWeights:
        """Returns the loss weights before the first step, by objective; objectives without any are left out."""
        made = {name: objective.init_weights(self.terms) for name, objective in self.by_name.items()}
        return {name: weights for name, weights in made.items() if weights}

    def coefficients(self, weights: LossWeights, params: Any) -> Scalars:
        """Returns the coefficient of each loss term."""
        result: Scalars = {term.name: term.weight for term in self.terms if term.weight is not None}
        for name, objective in self.by_name.items():
            factors = objective.coefficients(weights.get(name, {}), params, self.terms)
            result = {term: value * factors[term] if term in factors else value for term, value in result.items()}
        return result

    def losses(self, coefficients: Scalars, means: Scalars) -> jax.Array:
        """Returns Σ coefficient · mean, a scalar, or `[K]` with the sum of the terms of each of `heads`."""
        if not self.heads:
            return weighted_sum(coefficients, means)
        of = {term.name: _modality(term) for term in self.terms}
        parts = [{name: x for name, x in coefficients.items() if of[name] == head} for head in self.heads]
        return jnp.stack([jnp.asarray(weighted_sum(part, means)) for part in parts])

    def update_weights(self, weights: LossWeights, stats: Scalars, coefficients: Scalars) -> LossWeights:
        """Returns the loss weights after a step with these means by term."""
        return {name: self.by_name[name].update_weights(own, stats, coefficients) for name, own in weights.items()}

    def on_validation(
        self, before: Mapping[str, tuple[float, float]], now: Mapping[str, tuple[float, float]]
    ) -> LossWeights:
        """Returns the loss weights that change after a validation, see `Objective.on_validation`."""
        made = {name: objective.on_validation(before, now) for name, objective in self.by_name.items()}
        return {name: weights for name, weights in made.items() if weights is not None}

    def metrics(self, stats: Scalars, weights: LossWeights, params: Any) -> Scalars:
        """Returns the means that are logged, and the loss weights as `weight/NAME`."""
        result: Scalars = {}
        for term in self.terms:
            if term.metric:
                mean = term.metric_weight * stats[term.name]
                result[term.metric] = result[term.metric] + mean if term.metric in result else mean
        for name, objective in self.by_name.items():
            logged = objective.logged_weights(weights.get(name, {}), params, self.terms)
            result |= {f"weight/{key}": value for key, value in logged.items()}
        return result


def _modality(term: Term) -> str:
    return term.head if term.head != "joint" else ""


def weighted_sum(coefficients: Mapping[str, Any], means: Scalars) -> jax.Array:
    """Returns Σ coefficient · mean."""
    return functools.reduce(lambda total, name: total + coefficients[name] * means[name], coefficients, 0.0)


def build_objectives(
    model: FusionModel, tasks: Mapping[str, Task], by_name: Mapping[str, Objective] = MappingProxyType({})
) -> Objectives:
    """Returns the objectives of a run: those of its tasks, heads of single modalities and strategy, and `by_name`."""
    by_name = {**by_name, **strategy_objectives(model.fusion)}
    own = unimodal_terms(model, tasks, by_name)
    more = [term for name, objective in by_name.items() for term in objective.terms(name, model, tasks)]
    several = len(tasks) > 1 or bool(own) or bool(model.auxiliaries)
    return Objectives((*task_terms(tasks, log_losses=several), *own, *more), by_name)
