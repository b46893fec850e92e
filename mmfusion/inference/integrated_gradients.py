"""Integrated gradients by adaptive quadrature, each row with its own steps.

B batch
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 0.01  # of the sum of attributions, relative to the change of the output, or absolute if that is below 1
STEP_TOLERANCE = TOLERANCE / 20  # of one step, as there are up to some tens whose errors have either sign
FIRST_STEP, SMALLEST_STEP = 1 / 8, 1e-5
MAX_STEPS = 300
# Radau's rule with three points on [0, 1]. It evaluates the end, where the output is needed, and not the start, as the
# norm of a baseline of zeros may have no gradient.
NODES = ((4 - math.sqrt(6)) / 10, (4 + math.sqrt(6)) / 10, 1.0)
WEIGHTS = ((16 - math.sqrt(6)) / 36, (16 + math.sqrt(6)) / 36, 1 / 9)

Tree = Any  # of arrays [B, ...]


class Integrated(NamedTuple):
    """Attributions of B outputs.

    Attributes:
      attributions: a tree like the inputs, NumPy float64; NaN for a row whose gradients are not finite.
      value: the output at the inputs `[B]`.
      baseline: the output at the baseline `[B]`.
      gap: |sum of the attributions - (value - baseline)| `[B]`.
    """

    attributions: Tree
    value: np.ndarray
    baseline: np.ndarray
    gap: np.ndarray


def integrated_gradients(output: Callable[[Any, Tree], jax.Array]) -> Callable[[Any, Tree, Tree], Integrated]:
    """Returns a function of (context, inputs, baseline) to integrated gradients (Sundararajan et al. 2017).

    arXiv:1703.01365: (inputs - baseline) times the gradient, averaged on the straight line between them. It sums to the
    change of the output (completeness). That also holds for each part of the line, and decides about its steps: a step
    whose sum misses the change of the output by more than `STEP_TOLERANCE` is halved twice. So steps are small where
    gradients change, as near the zero of a normalisation layer, and few elsewhere.

    Args:
      output: (context, inputs) -> outputs `[B]`, each of which depends on its own row alone; traced.
    """

    @jax.jit
    def evaluate(context: Any, inputs: Tree, baseline: Tree, position: jax.Array) -> tuple[jax.Array, Tree]:
        """Returns the outputs `[B]` at positions `[B]` of the line, and their gradients times inputs - baseline."""
        point = jax.tree.map(lambda x, zero: zero + _rows(position, x) * (x - zero), inputs, baseline)

        def total(x: Tree) -> tuple[jax.Array, jax.Array]:
            outputs = output(context, x).astype(jnp.float32)
            return outputs.sum(), outputs

        (_, outputs), gradients = jax.value_and_grad(total, has_aux=True)(point)
        return outputs, jax.tree.map(lambda g, x, zero: g * (x - zero), gradients, inputs, baseline)

    def integrate(context: Any, inputs: Tree, baseline: Tree) -> Integrated:
        def at(position: np.ndarray) -> tuple[np.ndarray, Tree]:
            outputs, slope = jax.device_get(evaluate(context, inputs, baseline, position.astype(np.float32)))
            return outputs.astype(np.float64), slope

        rows = len(jax.tree.leaves(inputs)[0])
        position, size = np.zeros(rows), np.full(rows, FIRST_STEP)
        before, value = at(position)[0], at(np.ones(rows))[0]
        change, baseline_value = value - before, before
        tolerance = STEP_TOLERANCE * np.maximum(np.abs(change), 1.0)  # [B]
        total = jax.tree.map(lambda x: np.zeros(x.shape), inputs)
        for remaining in reversed(range(MAX_STEPS)):
            end = np.minimum(position + size, 1.0) if remaining else np.ones(rows)
            results = [at(position + (end - position) * node) for node in NODES]
            after = results[-1][0]
            part = jax.tree.map(functools.partial(_quadrature, end - position), *(slope for _, slope in results))
            error = np.abs(_sum(part) - (after - before))
            failed = ~np.isfinite(error)
            done = (error <= tolerance) | (end - position <= SMALLEST_STEP) | failed | (remaining == 0)
            total = jax.tree.map(lambda t, x, done=done: t + np.where(_rows(done, x), x, 0), total, part)
            size = np.where(done, (end - position) * np.where(error <= tolerance / 8, 2, 1), (end - position) / 4)
            position, before = np.where(failed, 1.0, np.where(done, end, position)), np.where(done, after, before)
            if (position == 1).all():
                break
        return Integrated(total, value, baseline_value, np.abs(_sum(total) - change))

    return integrate


def _quadrature(length: np.ndarray, *slopes: np.ndarray) -> np.ndarray:
    """Returns the integral over a part of the line of a length `[B]` from the slopes at `NODES`, each `[B, ...]`."""
    return _rows(length, slopes[0]) * sum(weight * x for weight, x in zip(WEIGHTS, slopes, strict=True))


def _rows(x: Any, like: Any) -> Any:
    """Returns `x [B]` with axes of size 1 appended, so that it broadcasts with `like [B, ...]`."""
    return x.reshape(-1, *[1] * (like.ndim - 1))


def _sum(tree: Tree) -> np.ndarray:
    """Returns the sum over all leaves and axes but the first, `[B]` float64."""
    sums = [np.sum(x, axis=tuple(range(1, x.ndim)), dtype=np.float64) for x in jax.tree.leaves(tree)]
    return np.sum(sums, axis=0)
