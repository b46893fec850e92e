"""What a strategy costs by itself, without encoders and heads: parameters, operations, memory, and how they grow.

M modalities · N tokens a modality · D width · C classes
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ROWS = 1  # operations are counted for one example


@dataclasses.dataclass(frozen=True)
class Size:
    """The size at which a strategy is measured.

    Attributes:
      modalities, tokens, width, classes: M, N (of each modality), D and C.
    """

    modalities: int = 2
    tokens: int = 64
    width: int = 64
    classes: int = 10


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one forward pass of one example costs.

    Attributes:
      parameters: how many numbers are learned.
      flops: floating-point operations, as XLA counts them before it optimises.
      memory: bytes of temporaries of the compiled program; None where nothing was compiled.
    """

    parameters: int
    flops: float
    memory: int | None


def inputs(kind: type[nn.Module], size: Size) -> tuple[tuple[dict, dict], dict[str, Any]]:
    """Returns the positional and keyword arguments of a strategy at a size, as shapes."""
    names = [f"m{i}" for i in range(size.modalities)]

    def shaped(*shape: int, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
        return {m: jax.ShapeDtypeStruct((ROWS, *shape), dtype) for m in names}

    if kind.declares.level == "feature":
        return (shaped(size.tokens, size.width), shaped(size.tokens, dtype=bool)), {}
    more = {"features": shaped(size.width)} if kind.declares.level == "mixed" else {}
    return (shaped(size.classes), shaped(dtype=bool)), more


def cost(kind: type[nn.Module], size: Size, *, compiled: bool = False) -> Cost:
    """Returns the cost of a strategy with its default options.

    Args:
      kind: the strategy.
      size: at which it is measured.
      compiled: whether to compile it for this device, which tells its memory.

    Raises:
      UserError: the strategy refuses the size, for instance for its budget.
    """
    fields = {field.name for field in dataclasses.fields(kind)}
    module = kind(**({"width": size.width} if "width" in fields else {}))
    args, more = inputs(kind, size)

    def forward(variables: dict, args: tuple, more: dict) -> jax.Array:
        out = module.apply(variables, *args, **more, train=False)
        return out.features if kind.declares.level == "feature" else out  # weights that nobody reads cost nothing

    def init(args: tuple, more: dict) -> dict:
        return module.init(jax.random.key(0), *args, **more, train=False)

    variables = jax.eval_shape(init, args, more)
    lowered = jax.jit(forward).lower(variables, args, more)
    flops = (lowered.cost_analysis() or {}).get("flops", math.nan)
    memory = lowered.compile().memory_analysis().temp_size_in_bytes if compiled else None
    parameters = int(np.sum([math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)], dtype=np.int64))
    return Cost(parameters, flops, memory)
