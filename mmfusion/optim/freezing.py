"""Frozen encoders: parameters that do not learn for some steps, or never, as `freeze` of an encoder's config says."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmfusion.models.pretrained.weights import from_run, unpublished


@dataclasses.dataclass(frozen=True)
class Freezing:
    """The frozen encoders of a run; false where there is none.

    Where an encoder starts from published weights, the layers that no publication has learn all the same.

    Attributes:
      steps: module -> for how many steps it is frozen.
      published: those of the modules that start from published weights.
      total: steps of the run.
    """

    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    published: frozenset[str] = frozenset()
    total: int = 0

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def always(self) -> frozenset[str]:
        """The modules that are frozen for the whole run."""
        return frozenset(name for name, steps in self.steps.items() if steps >= self.total)

    def frozen_mask(self, variables: Mapping[str, Any], step: jax.Array) -> dict[str, Any]:
        """Returns for each leaf of parameters or statistics whether `step` leaves it as it is: False, or a scalar."""
        return self._fill(variables, {name: step < steps for name, steps in self.steps.items()})

    def stop_gradient(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters, without a gradient where they never learn, so that none is computed."""
        return jax.tree.map(lambda x, on: x if on else jax.lax.stop_gradient(x), dict(params), self.learns(params))

    def learns(self, params: Mapping[str, Any], *, never: bool = False) -> dict[str, Any]:
        """Returns for each parameter whether it ever learns, or whether it never does."""
        return jax.tree.map(lambda frozen: frozen == never, self._fill(params, dict.fromkeys(self.always, True)))

    def keep_frozen(self, old: Mapping[str, Any], new: Mapping[str, Any], step: jax.Array) -> Mapping[str, Any]:
        """Returns the new batch statistics, but the old ones of what is frozen at `step`."""
        return jax.tree.map(jnp.where, self.frozen_mask(new, step), old, new) if self else new

    def zero_updates(self) -> optax.GradientTransformationExtraArgs:
        """Returns a transformation that zeroes the updates of frozen parameters; its extra argument is `step`."""

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            mask = self.frozen_mask(updates, extra["step"])
            return jax.tree.map(lambda x, frozen: jnp.where(frozen, jnp.zeros_like(x), x), updates, mask), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    def _fill(self, variables: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a tree like `variables` with a module's value at each of its leaves, False in other modules."""
        result = {}
        for name, layers in variables.items():
            value = values.get(name, False)
            result[name] = jax.tree.map(lambda _, value=value: value, layers)
            if name in self.published:
                learning = {layer: layers[layer] for layer in unpublished(layers) if layer in layers}
                result[name] = {**result[name], **jax.tree.map(lambda _: False, learning)}
        return result


NOTHING = Freezing()


def make(encoders: Mapping[str, Any], total: int) -> Freezing:
    """Returns what the section `model.encoders` of a config freezes in a run of `total` steps."""
    steps = {f"encoders_{m}": options.freeze for m, options in encoders.items() if options.freeze}
    published = {f"encoders_{m}" for m, options in encoders.items() if options.init and not from_run(options.init)}
    return Freezing(steps, frozenset(published & set(steps)), total)
