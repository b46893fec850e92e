"""Which parameters do not learn yet, or never: what `freeze` of an encoder's config says."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mmfusion.models.pretrained.weights import from_run, unpublished


@dataclasses.dataclass(frozen=True)
class Freezing:
    """The frozen encoders of a run; false where there is none.

    Where an encoder begins at published weights, what makes tokens of its cells learns all the same: it is drawn at
    random, since no publication has it.

    Attributes:
      steps: module -> for how many steps it is held.
      published: those modules that begin at published weights.
      total: steps of the run.
    """

    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    published: frozenset[str] = frozenset()
    total: int = 0

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def always(self) -> frozenset[str]:
        """The modules that are held for the whole run."""
        return frozenset(name for name, steps in self.steps.items() if steps >= self.total)

    def held(self, variables: Mapping[str, Any], step: jax.Array) -> dict[str, Any]:
        """Returns for each leaf of parameters or statistics whether update `step` leaves it as it is, scalar bool."""
        return self._each(variables, {name: step < steps for name, steps in self.steps.items()})

    def stopped(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the parameters, without a gradient where they never learn: no one computes it then."""
        never = self._each(params, dict.fromkeys(self.always, True))
        return jax.tree.map(lambda x, held: jax.lax.stop_gradient(x) if held else x, dict(params), never)

    def _each(self, variables: Mapping[str, Any], answers: Mapping[str, Any]) -> dict[str, Any]:
        result = {}
        for name, layers in variables.items():
            answer = answers.get(name, False)
            result[name] = jax.tree.map(lambda _, answer=answer: answer, layers)
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
