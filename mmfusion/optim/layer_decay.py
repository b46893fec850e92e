"""Layer-wise learning-rate decay."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

# Layers without a number that read the input; others without one come last, since they make the tokens.
READS_INPUT = (
    "embed",
    "place",
    "segment",
    "norm_embed",
    "patches",
    "class",
    "positions",
    "bands",
    "conv_stem",
    "norm_stem",
)


def slowed(encoders: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    """Returns what makes the updates of slowed encoders smaller; None where there is none.

    The last layer of an encoder with `layer_decay` d learns at the whole rate, the one before at d, then d², and so on
    (Howard & Ruder 2018, arXiv:1801.06146).
    """
    decays = {f"encoders_{m}": options.layer_decay for m, options in encoders.items() if options.layer_decay != 1}
    if not decays:
        return None

    def scale(updates: Any) -> Any:
        result = dict(updates)
        for name, decay in decays.items():
            order = sorted({depth(layer) for layer in updates[name]}, reverse=True)
            times = {layer: decay ** order.index(depth(layer)) for layer in updates[name]}
            result[name] = {
                layer: jax.tree.map(lambda x, factor=times[layer]: x * factor, leaves)
                for layer, leaves in updates[name].items()
            }
        return result

    return scale


# Encoders whose layers' names do not say their order, or that branch.
UNORDERED = (
    "cnn_rnn", "inception_v1", "inception_v3", "textcnn", "frame_cnn", "table_mlp", "ft_transformer",
    "knowledge_attention",
)  # fmt: skip


def depth(name: str) -> tuple[float, ...]:
    """Returns what a layer of an encoder sorts by: its numbers; before them what reads the input, last the rest."""
    if name in READS_INPUT:
        return (-1.0,)
    if name == "top":  # dense layers, of which tokens are made
        return (1e6,)
    numbers = tuple(float(number) for number in re.findall(r"\d+", name))
    return numbers or (float("inf"),)
