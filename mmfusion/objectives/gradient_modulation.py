"""Keeping one modality from learning at the others' expense: OGM-GE."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmfusion import rng


@dataclasses.dataclass(frozen=True)
class OGMGE:
    """On-the-fly gradient modulation with generalisation enhancement (Peng et al. 2022, arXiv:2203.15332).

    ρ_m is how much more probability modality m alone gives the right class than the others do on average; where it is
    above 1 the gradient of m's encoder is multiplied by 1 - tanh(α ρ_m), and noise of the gradient's own deviation is
    added to that of every encoder.

    Attributes:
      alpha: how strongly it is held back.
      noise: add the noise.
      until: steps after which nothing is changed; 0: never.
    """

    alpha: float = 0.5
    noise: bool = True
    until: int = 0

    def __call__(self, grads: Any, scores: Mapping[str, jax.Array], key: jax.Array, step: jax.Array) -> Any:
        """Returns the gradients with those of `encoders_<m>` changed.

        Args:
          grads: of all parameters, summed over devices.
          scores: per modality the mean probability that it alone gives the right class.
          key: of this step's noise.
          step: steps taken.
        """
        if len(scores) < 2:
            return grads
        result = dict(grads)
        acts = (step < self.until) if self.until else True
        for m, factor in self.factors(scores).items():
            name = f"encoders_{m}"
            if name not in grads:  # it shares another's
                continue
            leaves, structure = jax.tree.flatten(grads[name])
            changed = []
            for number, g in enumerate(leaves):
                new = factor * g
                if self.noise:
                    new += jnp.std(g) * jax.random.normal(rng.fold(key, m, number), g.shape, g.dtype)
                changed.append(jnp.where(acts, new, g))
            result[name] = jax.tree.unflatten(structure, changed)
        return result

    def factors(self, scores: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns what each modality's gradient is multiplied by."""
        total = sum(scores.values())
        ratios = {m: score * (len(scores) - 1) / jnp.maximum(total - score, 1e-9) for m, score in scores.items()}
        return {m: jnp.where(ratio > 1, 1 - jnp.tanh(self.alpha * ratio), 1.0) for m, ratio in ratios.items()}
