"""Weights of losses that are learned or measured: GradNorm and Gradient-Blending."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class GradNorm:
    """Weights of several tasks that keep their gradients of one size (Chen et al. 2018, arXiv:1711.02257).

    G_i, the norm of task i's weighted gradient, is drawn to the mean of all, times r_i^α, where r_i is how much of its
    first loss a task has left, over the mean of all. The gradient is taken at the features that the heads read, where
    it costs nothing (as Sener & Koltun 2018, arXiv:1810.04650, do), in place of the last shared layer's weights.

    Attributes:
      alpha: how much more a task counts that learns slowly.
      rate: learning rate of the weights, whose mean stays 1. What they move by is in proportion to the gradients, which
        are smaller in a larger batch.
    """

    alpha: float = 1.5
    rate: float = 0.025

    def start(self, tasks: Iterable[str]) -> dict[str, Any]:
        """Returns what the state holds of it before the first step."""
        return {"tasks": {task: jnp.ones(()) for task in tasks}, "first": {task: jnp.zeros(()) for task in tasks}}

    def __call__(
        self,
        balance: Mapping[str, Any],
        losses: Mapping[str, jax.Array],
        norms: Mapping[str, jax.Array],
    ) -> dict[str, Any]:
        """Returns what the state holds after a step.

        Args:
          balance: what it held before.
          losses: each task's mean loss, unweighted.
          norms: of each one's gradient, with its fixed weight.
        """
        first = {task: jnp.where(old > 0, old, losses[task]) for task, old in balance["first"].items()}
        left = {task: loss / jnp.maximum(first[task], 1e-9) for task, loss in losses.items()}
        each = {task: balance["tasks"][task] * norm for task, norm in norms.items()}
        mean_left, mean = (sum(values.values()) / len(losses) for values in (left, each))
        weights = {}
        for task, norm in norms.items():
            wanted = mean * (left[task] / jnp.maximum(mean_left, 1e-9)) ** self.alpha
            slope = jnp.sign(each[task] - wanted) * norm  # of |G_i - wanted|, which is held fixed
            weights[task] = jnp.maximum(balance["tasks"][task] - self.rate * slope, 1e-2)
        total = sum(weights.values())
        return {"tasks": {task: w * len(weights) / total for task, w in weights.items()}, "first": first}


@dataclasses.dataclass(frozen=True)
class GradientBlending:
    """Weights of the joint and of each modality's own head, by who generalises (Wang et al. 2020, arXiv:1905.12681).

    w ∝ G / O²: G is how far a head's validation loss fell since the last validation, O how much its distance from the
    training loss grew. The paper measures both in runs of each head alone; here they are measured in the run itself, on
    validation and on as many training rows, both as in evaluation. A head without weight would hardly fall again, so
    each keeps a least one.

    Attributes:
      floor: least |O|, in nats; below it a measurement is noise.
      least: weight of the head that generalises worst, where 1 is the mean.
    """

    floor: float = 0.05
    least: float = 0.1

    def start(self, modalities: Iterable[str]) -> dict[str, Any]:
        """Returns what the state holds of it before the first validation."""
        return {"heads": {head: jnp.ones(()) for head in ("joint", *modalities)}}

    def weights(
        self, before: Mapping[str, tuple[float, float]], now: Mapping[str, tuple[float, float]]
    ) -> dict[str, float] | None:
        """Returns each head's weight, 1 on average; None where no head got better, and nothing changes.

        Args:
          before: each head's loss on (training, validation) rows at the last validation.
          now: the same at this one.
        """
        scores = {}
        for head, (train, valid) in now.items():
            gained = max(before[head][1] - valid, 0.0)
            overfitted = (valid - train) - (before[head][1] - before[head][0])
            scores[head] = gained / max(abs(overfitted), self.floor) ** 2
        total = sum(scores.values())
        if not np.isfinite(total) or total <= 0:
            return None
        return {head: self.least + (1 - self.least) * score * len(scores) / total for head, score in scores.items()}
