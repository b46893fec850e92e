"""Skipping bad steps: those with a loss or gradient that is not finite, or with a loss that is a spike.

Spikes are judged inside the step, so that every device and every retry agrees.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

WINDOW, MIN_HISTORY = 100, 20  # most and fewest losses that a spike is judged by
DEVIATION = 1.4826  # a normal distribution's standard deviation in median absolute deviations
T = TypeVar("T")
History = dict[str, jax.Array]


def init_history() -> History:
    """Returns the loss history before the first step: the newest good `losses` `[WINDOW]`, and how many were `seen`."""
    return {"losses": jnp.zeros(WINDOW), "seen": jnp.zeros((), jnp.int32)}


def is_spike(history: History, loss: jax.Array, threshold: float) -> jax.Array:
    """Returns whether a loss is `threshold` robust standard deviations above the median; never if it is NaN."""
    losses = jnp.where(jnp.arange(WINDOW) < history["seen"], history["losses"], jnp.nan)
    median = jnp.nanmedian(losses)
    deviation = DEVIATION * jnp.nanmedian(jnp.abs(losses - median))
    # Losses that hardly differ must not make a spike of the next one.
    far = loss > median + threshold * jnp.maximum(deviation, 1e-3 * jnp.abs(median))
    return far & (history["seen"] >= MIN_HISTORY)


def append(history: History, loss: jax.Array) -> History:
    """Returns the history with a good loss in place of the oldest."""
    seen = history["seen"]
    return {"losses": history["losses"].at[seen % WINDOW].set(loss), "seen": seen + 1}


def guard(
    old: T, new: T, history: History, loss: jax.Array, grad_norm: jax.Array, spike_threshold: float
) -> tuple[T, History, dict[str, jax.Array]]:
    """Returns the new state where the step is good and the old one where it is not.

    Args:
      old: state before the step.
      new: state after it.
      history: of losses; empty where spikes are not judged.
      loss, grad_norm: of the step.
      spike_threshold: see `is_spike`; 0 judges no spikes.

    Returns:
      The state, the loss history, and `skipped` (1 where the loss or the gradient was not finite) and, with a
      threshold, `spike` (1 where the loss was one).
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    good, metrics = finite, {"skipped": 1.0 - finite}
    if spike_threshold:
        spike = is_spike(history, loss, spike_threshold)
        good, metrics["spike"] = finite & ~spike, 1.0 * (finite & spike)
        history = keep(good, append(history, loss), history)
    return keep(good, new, old), history, metrics


def keep(condition: jax.Array, new: T, old: T) -> T:
    """Returns `new` where the scalar condition holds, else `old`: chosen with `where`, since NaN times zero is NaN."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
