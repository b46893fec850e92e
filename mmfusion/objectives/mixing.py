"""MixUp (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899).

Each row is mixed with its neighbour in the batch, and is trained on both targets. Pairs stay together on any number of
devices and in micro-batches, and a pair's draw depends on the ids of its rows and the step alone. Rows are mixed only
where both have weight and the same modalities.

B batch · H W image · C channels
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.errors import UserError
from mmfusion.objectives.base import Objective, Requirements

if TYPE_CHECKING:
    from mmfusion.config import RunConfig

WHERE = ("features", "input")


def draw(batch: Batch, alpha: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns how rows are mixed: the share `[B]` of the row itself, and a corner `[B, 2]`, both in [0, 1]."""
    partner = batch.partner
    keys = rng.row_keys(key, jnp.minimum(batch.id, batch.id[partner]))
    share = jax.vmap(lambda k: jax.random.beta(k, alpha, alpha))(keys)
    corner = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1), (2,)))(keys)
    weighted = (batch.weight > 0) & (batch.weight[partner] > 0)
    same = [present == present[partner] for present in batch.present.values()]
    return jnp.where(jnp.stack([weighted, *same]).all(axis=0), share, 1.0), corner


def require_images(path: str, config: "RunConfig") -> None:
    """Raises UserError unless every modality is an image."""
    for m, options in config.data.modalities.items():
        if options.kind != "image":
            raise UserError(
                f"mixes images, and the modality {m!r} is of kind {options.kind}: use mixup with where=features",
                path=path,
            )


def require_positive(path: str, alpha: float) -> None:
    """Raises UserError unless the parameter of the Beta distribution is above 0."""
    if not 0 < alpha < float("inf"):
        raise UserError("must be above 0", path=path, value=alpha)


@dataclasses.dataclass(frozen=True)
class MixUp(Objective):
    """Mixes two rows by a weighted mean.

    Attributes:
      alpha: the share is drawn from Beta(alpha, alpha).
      where: `features`, what the heads read, or `input`, where every modality must be an image.
    """

    alpha: float = 0.2
    where: str = "features"

    requires: ClassVar[Requirements] = Requirements(excludes=("cutmix",), group=2)

    @classmethod
    def validate(cls, path: str, options: Mapping[str, Any], config: "RunConfig") -> None:
        if options["where"] not in WHERE:
            raise UserError("is unknown", path=f"{path}.where", value=options["where"], choices=WHERE)
        require_positive(f"{path}.alpha", options["alpha"])
        if options["where"] == "input":
            require_images(path, config)

    def transform_batch(self, batch: Batch, seed: jax.Array, step: jax.Array) -> Batch:
        share, _ = draw(batch, self.alpha, rng.key(seed, "mixing", step))
        if self.where == "features":
            return batch.replace(mix={"targets": share, "features": share})
        weight, partner = share[:, None, None, None], batch.partner
        mixed = {m: weight * x + (1 - weight) * x[partner] for m, x in batch.inputs.items()}  # [B, H, W, C]
        return batch.replace(inputs=mixed, mix={"targets": share})


@dataclasses.dataclass(frozen=True)
class CutMix(Objective):
    """Replaces a rectangle of every image by the partner's; the share is that of the area which remains.

    Attributes:
      alpha: the share is drawn from Beta(alpha, alpha).
    """

    alpha: float = 1.0

    requires: ClassVar[Requirements] = Requirements(excludes=("mixup",), group=2)

    @classmethod
    def validate(cls, path: str, options: Mapping[str, Any], config: "RunConfig") -> None:
        require_positive(f"{path}.alpha", options["alpha"])
        require_images(path, config)

    def transform_batch(self, batch: Batch, seed: jax.Array, step: jax.Array) -> Batch:
        drawn, corner = draw(batch, self.alpha, rng.key(seed, "mixing", step))
        inputs, partner, share = dict(batch.inputs), batch.partner, drawn
        for m, x in batch.inputs.items():  # [B, H, W, C]
            outside = outside_rectangle(x.shape[1], x.shape[2], drawn, corner)  # [B, H, W, 1]
            inputs[m], share = jnp.where(outside, x, x[partner]), outside.mean((1, 2, 3))
        return batch.replace(inputs=inputs, mix={"targets": share})


def outside_rectangle(height: int, width: int, share: jax.Array, corner: jax.Array) -> jax.Array:
    """Returns the mask `[B, H, W, 1]` outside a rectangle with the image's aspect ratio and 1 - share of its area."""
    sides = jnp.sqrt(1 - share)[:, None]  # of the rectangle, relative to the image's
    start = corner * (1 - sides)  # [B, 2]
    inside = jnp.array(True)
    for axis, length in enumerate((height, width)):
        position = (jnp.arange(length) + 0.5) / length
        shape = (-1, length, 1, 1) if axis == 0 else (-1, 1, length, 1)
        within = (position >= start[:, axis : axis + 1]) & (position < start[:, axis : axis + 1] + sides)  # [B, length]
        inside = inside & within.reshape(shape)
    return ~inside
