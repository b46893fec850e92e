"""On-the-fly gradient modulation with generalisation enhancement, OGM-GE (Peng et al. 2022, arXiv:2203.15332)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.errors import UserError
from mmfusion.models.fusion.concat import Concat
from mmfusion.models.model import FusionModel
from mmfusion.objectives.base import Context, Objective, Requirements, Scalars, Term
from mmfusion.objectives.supervised import Task

if TYPE_CHECKING:
    from mmfusion.config import RunConfig

SCORE = "score/"
SCORES = ("head", "probes")
MODULATED = ("convolutions", "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnimodalScore(Term):
    """The mean probability that modality `head` alone gives the right class, a measure.

    Attributes:
      model: the model.
      joint: read the modality's columns of the joint head, not a head of its own.
    """

    model: FusionModel
    joint: bool

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(batch.metric_weight(self.task) * self.model.presence(batch)[self.head])

    def total(self, context: Context) -> jax.Array:
        logits = self._joint_logits(context) if self.joint else context.outputs.unimodal[self.task][self.head]
        present = self.model.presence(context.batch)[self.head]

        def probability(targets: jax.Array) -> jax.Array:
            probabilities = jax.nn.softmax(logits.astype(jnp.float32))
            return jnp.take_along_axis(probabilities, targets[:, None], axis=1)[:, 0]

        return context.target_sum(self.task, context.batch.metric_weight(self.task) * present, probability)

    def _joint_logits(self, context: Context) -> jax.Array:
        """Returns W_m x_m + b / M `[B, C]`, with W_m the columns of the joint head that read the modality."""
        names, head = self.model.modalities, context.params[f"heads_{self.task}"]
        i, width = names.index(self.head), context.outputs.features.shape[1] // len(names)
        columns = slice(i * width, (i + 1) * width)
        return context.outputs.features[:, columns] @ head["kernel"][columns] + head["bias"] / len(names)


def has_columns(model: FusionModel) -> bool:
    """Returns whether the joint head reads the concatenated modalities, each by columns of its own."""
    return isinstance(model.fusion, Concat) and model.fusion.layers == 0


@dataclasses.dataclass(frozen=True)
class OGMGE(Objective):
    """Slows the encoder of a modality that predicts better than the others do.

    ρ_m is the ratio of the probability that modality m alone gives the right class to the mean of the others'. Where it
    is above 1, the gradient of m's encoder is multiplied by 1 - tanh(α ρ_m); noise with the gradient's own standard
    deviation is added to every gradient that can be modulated. The first classification task scores the modalities.

    The authors modulate the convolution kernels (arrays of 4 dimensions), in epochs 0 to 50 of 100, and train a linear
    head on concatenated features with SGD: `fusion=concat` with `model.fusion.layers=0` and `optim.name=momentum`. An
    optimizer that divides by the gradient's size, such as Adam, undoes most of the factor and keeps the noise.

    Attributes:
      alpha: strength of the modulation.
      noise: add the noise.
      start: the first step that is modulated.
      until: steps after which gradients are left as they are; 0 modulates to the end.
      modulate: `convolutions`, as the authors, or `all` parameters of the encoders.
      scores: `head` scores a modality by its columns of the joint head and its share of the bias. Where the head has
        none, that is with any strategy but `concat` without layers, and with `probes`, heads behind a stop-gradient, or
        the heads of a decision-level strategy, score it.
    """

    alpha: float = 0.5
    noise: bool = True
    start: int = 0
    until: int = 0
    modulate: str = "convolutions"
    scores: str = "head"

    requires: ClassVar[Requirements] = Requirements(modalities=2, target_kind="classification")
    unimodal_heads: ClassVar[str] = "probes"

    @classmethod
    def validate(cls, path: str, options: Mapping[str, Any], config: "RunConfig") -> None:
        for key, choices in (("modulate", MODULATED), ("scores", SCORES)):
            if options[key] not in choices:
                raise UserError("unknown value", path=f"{path}.{key}", value=options[key], choices=choices)
        if options["until"] and options["until"] <= options["start"]:
            raise UserError(f"must be after start={options['start']}", path=f"{path}.until", value=options["until"])

    def terms(self, name: str, model: FusionModel, tasks: Mapping[str, Task]) -> Sequence[Term]:
        task = next(task for task, spec in tasks.items() if spec.kind == "classification")
        joint = self.scores == "head" and has_columns(model)
        return [
            UnimodalScore(name=SCORE + m, metric=SCORE + m, task=task, head=m, model=model, joint=joint)
            for m in model.modalities
        ]

    def transform_gradients(self, grads: Any, stats: Scalars, seed: jax.Array, step: jax.Array) -> Any:
        scores = {name.removeprefix(SCORE): mean for name, mean in stats.items() if name.startswith(SCORE)}
        return self.modulated(grads, scores, rng.key(seed, "ogm_ge", step), step)

    def modulated(self, grads: Any, scores: Mapping[str, jax.Array], key: jax.Array, step: jax.Array) -> Any:
        """Returns the gradients with those of the kernels of `encoders_<m>` modulated.

        Args:
          grads: of all parameters, summed over devices.
          scores: per modality the mean probability that it alone gives the right class.
          key: of this step's noise.
          step: updates done.

        Raises:
          UserError: no encoder has a convolution.
        """
        if len(scores) < 2:
            return grads
        if not any(self._is_modulated(g) for m in scores for g in jax.tree.leaves(grads.get(f"encoders_{m}", {}))):
            raise UserError("no encoder has a convolution; choose all", path="ogm_ge.modulate", value=self.modulate)
        result = dict(grads)
        active = (step >= self.start) & ((step < self.until) if self.until else True)
        for m, factor in self.factors(scores).items():
            name = f"encoders_{m}"
            if name not in grads:  # it shares another's encoder
                continue
            leaves, structure = jax.tree.flatten(grads[name])
            modulated = []
            for number, g in enumerate(leaves):
                if not self._is_modulated(g):
                    modulated.append(g)
                    continue
                new = factor * g
                if self.noise:
                    deviation = jnp.std(g, ddof=min(g.size - 1, 1)) + 1e-8
                    new += deviation * jax.random.normal(rng.fold(key, m, number), g.shape, g.dtype)
                modulated.append(jnp.where(active, new, g))
            result[name] = jax.tree.unflatten(structure, modulated)
        return result

    def _is_modulated(self, gradient: jax.Array) -> bool:
        return self.modulate == "all" or gradient.ndim == 4

    def factors(self, scores: Mapping[str, jax.Array]) -> Scalars:
        """Returns the factor of each modality's gradient."""
        total = sum(scores.values())
        ratios = {m: score * (len(scores) - 1) / jnp.maximum(total - score, 1e-9) for m, score in scores.items()}
        return {m: jnp.where(ratio > 1, 1 - jnp.tanh(self.alpha * ratio), 1.0) for m, ratio in ratios.items()}
