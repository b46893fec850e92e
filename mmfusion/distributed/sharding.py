"""Which mesh axis divides which axis of a state's arrays: rules by name, and the longest axis for the rest.

D width · V vocabulary
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FSDP, MODEL = AXES = ("data", "fsdp", "model")
# Array axis that the model axis divides, by the end of a path (Shoeybi et al. 2019, arXiv:1909.08053): heads and hidden
# units, so that each of a block's two products needs one sum over devices.
RULES = (
    (re.compile(r"(query|key|value|mlp_in)/(kernel|bias)$"), -1),  # [D, heads · D / heads], [D, hidden]
    (re.compile(r"(attention/out|mlp_out)/kernel$"), 0),  # [heads · D / heads, D], [hidden, D]
    (re.compile(r"embed/embedding$"), 0),  # [V, D]
)
MIN_SIZE = 2**12  # smaller arrays are replicated


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns how an array of a state is divided: by name over the model axis, along its longest axis over fsdp.

    An axis that does not divide evenly stays whole. Paths of an optimizer's arrays end in the names of their
    parameters, so they are divided like those.
    """
    axes: list[str | None] = [None] * len(shape)
    size = 1
    for length in shape:
        size *= length
    if size < MIN_SIZE:
        return PartitionSpec()
    for pattern, axis in RULES:
        if pattern.search(path) and shape[axis] % mesh.shape[MODEL] == 0:
            axes[axis] = MODEL
            break
    free = [i for i, name in enumerate(axes) if name is None and shape[i] % mesh.shape[FSDP] == 0]
    if free:
        axes[max(free, key=lambda i: shape[i])] = FSDP
    return PartitionSpec(*axes)


def of_state(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each array of a state; only shapes are used."""

    def sharding(path: Any, x: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(jax.tree_util.keystr(path, simple=True, separator="/"), x.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)
