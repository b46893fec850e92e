"""Layer-wise learning-rate decay."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import optax

from mmfusion.models.encoders import ENCODERS
from mmfusion.registry import lookup


def layerwise_lr_decay(encoders: Mapping[str, Any]) -> optax.GradientTransformation:
    """Returns a transformation that scales the updates of each encoder's layers by their distance from its output.

    The last layer of an encoder with `layer_decay` d keeps its updates, the layer before it has them times d, the one
    before times d², and so on (Howard & Ruder 2018, arXiv:1801.06146). The order is the encoder's `layer_order`.

    Args:
      encoders: the section `model.encoders` of a config.
    """
    decays = {}
    for m, options in encoders.items():
        if options.layer_decay != 1:
            encoder: Any = lookup(ENCODERS, options.name, f"config.model.encoders.{m}.name")
            decays[f"encoders_{m}"] = options.layer_decay, encoder.layer_order

    def scale(updates: Any, params: Any) -> Any:
        del params
        result = dict(updates)
        for name, (decay, order) in decays.items():
            factors = decay_factors(updates[name], order, decay)
            result[name] = {
                layer: jax.tree.map(lambda x, factor=factors[layer]: x * factor, leaves)
                for layer, leaves in updates[name].items()
            }
        return result

    return optax.stateless(scale)


def decay_factors(layers: Collection[str], order: Sequence[str], decay: float) -> dict[str, float]:
    """Returns `decay ** distance from the last layer` for each layer.

    Args:
      layers: names of an encoder's top-level submodules and parameters.
      order: regular expressions of these names, from the input to the output; layers that match the same expression
        are ordered by the numbers in their names.
      decay: factor from each layer to the one before it.
    """
    depths = {layer: _depth(layer, order) for layer in layers}
    from_last = sorted(set(depths.values()), reverse=True)
    return {layer: decay ** from_last.index(depth) for layer, depth in depths.items()}


def _depth(layer: str, order: Sequence[str]) -> tuple[int, ...]:
    for position, pattern in enumerate(order):
        if re.fullmatch(pattern, layer):
            return (position, *(int(number) for number in re.findall(r"\d+", layer)))
    raise ValueError(f"layer_order={order} of the encoder does not match its layer {layer!r}")
