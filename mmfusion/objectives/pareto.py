"""Gradients of the joint and of each modality's loss, balanced by MMPareto (Wei & Hu 2024, arXiv:2405.17730)."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from mmfusion.errors import UserError
from mmfusion.objectives.base import Objective, Requirements

if TYPE_CHECKING:
    from mmfusion.config import RunConfig


@dataclasses.dataclass(frozen=True)
class MMPareto(Objective):
    """Adds a head for each modality, and gives an encoder the Pareto gradient where its two losses conflict.

    With a the joint loss's gradient of an encoder and b that of its own head: 2 (α a + (1 - α) b), where α is 1/2 if
    a · b > 0, and otherwise the α of the smallest norm. Each array is then scaled up to the norm of a + b where it is
    smaller, and multiplied by γ. All other parameters get the sum. Encoders that several modalities share are left as
    they are. The authors train with SGD; Adam undoes γ and the scale, and keeps the direction.

    Attributes:
      gamma: γ, above 0.
    """

    gamma: float = 1.5

    requires: ClassVar[Requirements] = Requirements(
        modalities=2, excludes=("gradient_blending", "gradnorm", "uncertainty")
    )
    unimodal_heads: ClassVar[str] = "heads"
    separates_losses: ClassVar[bool] = True

    @classmethod
    def validate(cls, path: str, options: Mapping[str, Any], config: "RunConfig") -> None:
        if options["gamma"] <= 0:
            raise UserError("must be above 0", path=f"{path}.gamma", value=options["gamma"])

    def combine_gradients(self, grads: Mapping[str, Any]) -> Any:
        total: Any = jax.tree.map(lambda *parts: sum(parts[1:], start=parts[0]), *grads.values())
        result = dict(total)
        for m in filter(None, grads):
            name = f"encoders_{m}"
            if name in total and jax.tree.leaves(total[name]):
                result[name] = self._balanced(grads[""][name], grads[m][name], total[name])
        return result

    def _balanced(self, joint: Any, own: Any, total: Any) -> Any:
        product: Any = optax.tree.vdot(joint, own)
        joint_norm, own_norm = (jnp.square(optax.tree.norm(x)) for x in (joint, own))
        smallest = (own_norm - product) / jnp.maximum(joint_norm + own_norm - 2 * product, 1e-30)
        share = jnp.where(product > 0, 0.5, jnp.clip(smallest, 0.0, 1.0))  # α

        def scaled(a: jax.Array, b: jax.Array, both: jax.Array) -> jax.Array:
            new = 2 * (share * a + (1 - share) * b)
            ratio = jnp.linalg.norm(both.ravel()) / jnp.maximum(jnp.linalg.norm(new.ravel()), 1e-30)
            return self.gamma * jnp.maximum(ratio, 1.0) * new

        return jax.tree.map(scaled, joint, own, total)
