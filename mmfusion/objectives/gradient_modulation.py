"""On-the-fly gradient modulation with generalisation enhancement, OGM-GE (Peng et al. 2022, arXiv:2203.15332)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel
from mmfusion.objectives.base import Context, Objective, Requirements, Scalars, Term
from mmfusion.objectives.supervised import Task

SCORE = "score/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnimodalScore(Term):
    """The mean probability that modality `head` alone gives the right class, a measure."""

    model: FusionModel

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(batch.metric_weight(self.task) * self.model.presence(batch)[self.head])

    def total(self, context: Context) -> jax.Array:
        logits = context.outputs.unimodal[self.task][self.head]
        present = self.model.presence(context.batch)[self.head]

        def probability(targets: jax.Array) -> jax.Array:
            probabilities = jax.nn.softmax(logits.astype(jnp.float32))
            return jnp.take_along_axis(probabilities, targets[:, None], axis=1)[:, 0]

        return context.target_sum(self.task, context.batch.metric_weight(self.task) * present, probability)


@dataclasses.dataclass(frozen=True)
class OGMGE(Objective):
    """Slows the encoder of a modality that predicts better than the others do.

    ρ_m is the ratio of the probability that modality m alone gives the right class to the mean of the others'. Where it
    is above 1, the gradient of m's encoder is multiplied by 1 - tanh(α ρ_m); noise with the gradient's own standard
    deviation is added to the gradient of every encoder. The first classification task scores the modalities.

    Attributes:
      alpha: strength of the modulation.
      noise: add the noise.
      until: steps after which gradients are left as they are; 0 modulates throughout.
    """

    alpha: float = 0.5
    noise: bool = True
    until: int = 0

    requires: ClassVar[Requirements] = Requirements(modalities=2, target_kind="classification")
    unimodal_heads: ClassVar[str] = "probes"

    def terms(self, name: str, model: FusionModel, tasks: Mapping[str, Task]) -> Sequence[Term]:
        task = next(task for task, spec in tasks.items() if spec.kind == "classification")
        return [
            UnimodalScore(name=SCORE + m, metric=SCORE + m, task=task, head=m, model=model) for m in model.modalities
        ]

    def transform_gradients(self, grads: Any, stats: Scalars, seed: jax.Array, step: jax.Array) -> Any:
        scores = {name.removeprefix(SCORE): mean for name, mean in stats.items() if name.startswith(SCORE)}
        return self.modulate(grads, scores, rng.key(seed, "ogm_ge", step), step)

    def modulate(self, grads: Any, scores: Mapping[str, jax.Array], key: jax.Array, step: jax.Array) -> Any:
        """Returns the gradients with those of `encoders_<m>` modulated.

        Args:
          grads: of all parameters, summed over devices.
          scores: per modality the mean probability that it alone gives the right class.
          key: of this step's noise.
          step: updates done.
        """
        if len(scores) < 2:
            return grads
        result = dict(grads)
        active = (step < self.until) if self.until else True
        for m, factor in self.factors(scores).items():
            name = f"encoders_{m}"
            if name not in grads:  # it shares another's encoder
                continue
            leaves, structure = jax.tree.flatten(grads[name])
            modulated = []
            for number, g in enumerate(leaves):
                new = factor * g
                if self.noise:
                    new += jnp.std(g) * jax.random.normal(rng.fold(key, m, number), g.shape, g.dtype)
                modulated.append(jnp.where(active, new, g))
            result[name] = jax.tree.unflatten(structure, modulated)
        return result

    def factors(self, scores: Mapping[str, jax.Array]) -> Scalars:
        """Returns the factor of each modality's gradient."""
        total = sum(scores.values())
        ratios = {m: score * (len(scores) - 1) / jnp.maximum(total - score, 1e-9) for m, score in scores.items()}
        return {m: jnp.where(ratio > 1, 1 - jnp.tanh(self.alpha * ratio), 1.0) for m, ratio in ratios.items()}
