"""What the machine allows: the rate of a large matrix product, and of a copy between arrays beyond the caches."""

import math
import time
from collections.abc import Callable
from typing import Any

SIZE, COPIED = 1024, 1 << 27  # rows of the matrices, bytes of the array


def limits() -> tuple[dict[str, Any], Any]:
    """A contender; a round's value is seconds, and its facts `flops` and `bytes` a second are the best so far."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    matrix = jnp.ones((SIZE, SIZE), jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    multiply(matrix).block_until_ready()
    source, target = np.ones(COPIED // 4, np.float32), np.zeros(COPIED // 4, np.float32)
    peak = {"flops": 0.0, "bytes": 0.0}

    def one_round() -> dict[str, Any]:
        first = time.perf_counter()
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(5):
                multiply(matrix).block_until_ready()
            peak["flops"] = max(peak["flops"], 5 * 2 * SIZE**3 / (time.perf_counter() - start))
            start = time.perf_counter()
            np.copyto(target, source)
            peak["bytes"] = max(peak["bytes"], 2 * COPIED / (time.perf_counter() - start))  # read and written
        return {"value": time.perf_counter() - first, **peak}

    one_round()
    return dict(peak), one_round


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """Returns the operations of a function's matrix products and convolutions, each multiplication and addition as one.

    XLA's own count has the body of a loop once, and elementwise operations, which need no time at a product's rate.
    """
    import jax

    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        result = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * result * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
            dilated = math.prod(equation.params["lhs_dilation"])  # the zeros in between need no products
            total += 2 * result * math.prod(kernel) / out_channels / dilated
        inner = [getattr(each, "jaxpr", each) for value in equation.params.values()
                 for each in (value if isinstance(value, tuple | list) else (value,))]  # fmt: skip
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += repeats * sum(_count(each) for each in inner if hasattr(each, "eqns"))
    return total
