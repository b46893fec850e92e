"""The cost of a fusion strategy without encoders and heads: parameters, FLOPs and memory at a given size.

M modalities · N tokens per modality · D width · C classes
"""

import dataclasses
import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

BATCH = 1  # FLOPs are per example


@dataclasses.dataclass(frozen=True)
class FusionSize:
    """The size at which a strategy is measured.

    Attributes:
      modalities: M.
      tokens: N, of each modality.
      width: D.
      classes: C.
    """

    modalities: int = 2
    tokens: int = 64
    width: int = 64
    classes: int = 10


@dataclasses.dataclass(frozen=True)
class FusionCost:
    """The cost of one forward pass of one example.

    Attributes:
      parameters: the number of parameters.
      flops: floating-point operations, as XLA counts them before optimisation.
      memory: bytes of temporaries of the compiled program; None without compilation.
    """

    parameters: int
    flops: float
    memory: int | None


def fusion_cost(strategy: Any, size: FusionSize, *, compiled: bool = False) -> FusionCost:
    """Returns the cost of a strategy with its default options.

    Args:
      strategy: the class, a Flax module with a declaration.
      size: the size to measure it at.
      compiled: whether to compile it for this device, to measure its memory.

    Raises:
      UserError: the strategy does not support the size, for instance because of its size limit.
    """
    fields = {field.name for field in dataclasses.fields(strategy)}
    module: nn.Module = strategy(**({"width": size.width} if "width" in fields else {}))
    level = strategy.declares.level
    inputs, features = _inputs(level, size)

    def forward(variables: Any, inputs: tuple, features: dict[str, Any]) -> Any:
        out: Any = module.apply(variables, *inputs, **features, train=False)
        return out.features if level == "feature" else out  # the attention weights would add to the cost

    def init(inputs: tuple, features: dict[str, Any]) -> Any:
        return module.init(jax.random.key(0), *inputs, **features, train=False)

    variables = jax.eval_shape(init, inputs, features)
    lowered = jax.jit(forward).lower(variables, inputs, features)
    flops = (lowered.cost_analysis() or {}).get("flops", math.nan)
    memory = cast(Any, lowered.compile().memory_analysis()).temp_size_in_bytes if compiled else None
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    return FusionCost(parameters, flops, memory)


def _inputs(level: str, size: FusionSize) -> tuple[tuple[dict, dict], dict[str, Any]]:
    """Returns the shapes of the positional and keyword arguments of a strategy of the given level."""
    names = [f"m{i}" for i in range(size.modalities)]

    def shaped(*shape: int, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
        return {m: jax.ShapeDtypeStruct((BATCH, *shape), dtype) for m in names}

    if level == "feature":
        return (shaped(size.tokens, size.width), shaped(size.tokens, dtype=bool)), {}
    features = {"features": shaped(size.width)} if level == "mixed" else {}
    return (shaped(size.classes), shaped(dtype=bool)), features
