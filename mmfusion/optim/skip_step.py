"""Losses far above those before: judged where the step is taken, so that every device and every attempt agree."""

import jax
import jax.numpy as jnp

WINDOW, ENOUGH = 100, 20  # losses that a spike is judged by, at most and at least
DEVIATION = 1.4826  # a normal distribution's standard deviation in median absolute deviations


def start() -> dict[str, jax.Array]:
    """Returns what is known before the first update: the newest sound `losses` `[WINDOW]`, and how many were `seen`."""
    return {"losses": jnp.zeros(WINDOW), "seen": jnp.zeros((), jnp.int32)}


def is_spike(known: dict[str, jax.Array], loss: jax.Array, threshold: float) -> jax.Array:
    """Returns whether a loss lies so many robust standard deviations above the median of those known; never if NaN."""
    losses = jnp.where(jnp.arange(WINDOW) < known["seen"], known["losses"], jnp.nan)
    middle = jnp.nanmedian(losses)
    spread = DEVIATION * jnp.nanmedian(jnp.abs(losses - middle))
    # losses that hardly differ shall not make a spike of the next one
    far = loss > middle + threshold * jnp.maximum(spread, 1e-3 * jnp.abs(middle))
    return far & (known["seen"] >= ENOUGH)


def remember(known: dict[str, jax.Array], loss: jax.Array) -> dict[str, jax.Array]:
    """Returns what is known after a sound loss, which takes the oldest one's place."""
    seen = known["seen"]
    return {"losses": known["losses"].at[seen % WINDOW].set(loss), "seen": seen + 1}
