"""Gradients of a batch in micro-batches, added up.

B batch · K micro-batches
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Stats = dict[str, jax.Array]
LossFn = Callable[[Any, Any, Any], tuple[jax.Array, tuple[Any, Stats]]]


def split(batch: Any, count: int, group: int) -> Any:
    """Returns the batch as `[K, B / K, ...]`; `group` rows in sequence stay together.

    Every K-th group goes to one micro-batch, so that under `jit` each is spread over all devices.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, count, group, *x.shape[1:]).swapaxes(0, 1).reshape(count, -1, *x.shape[1:]), batch
    )


def gradients(loss_fn: LossFn, params: Any, batch_stats: Any, rows: Any) -> tuple[Any, tuple[Any, Stats]]:
    """Returns the gradient of the loss, or of each of several losses `[n]`, and what else `loss_fn` returns."""
    losses, pullback, aux = jax.vjp(lambda params: loss_fn(params, batch_stats, rows), params, has_aux=True)
    if losses.ndim:
        return tuple(pullback(one)[0] for one in jnp.eye(losses.size)), aux
    return pullback(jnp.ones_like(losses))[0], aux


def sum_gradients(
    loss_fn: LossFn, params: Any, batch_stats: Any, batch: Any, *, count: int, group: int, unroll: bool
) -> tuple[Any, Any, Stats]:
    """Returns the gradients and the `stats`, added over micro-batches, and the batch statistics after the last.

    Args:
      loss_fn: `(params, batch_stats, rows) -> loss, (batch_stats, stats)`, whose loss is a sum over rows, or several
        such losses `[n]`, each of which has a gradient of its own: the gradients are a tuple of trees then.
      params, batch_stats: where it is evaluated.
      batch: this device's rows under `pmap`, all rows under `jit`.
      count: K.
      group: rows in sequence that stay in one micro-batch.
      unroll: write the micro-batches out (fast on CPU, where convolutions inside a scan are slow) or scan them.
    """
    if count == 1:
        grads, (batch_stats, stats) = gradients(loss_fn, params, batch_stats, batch)
        return grads, batch_stats, stats
    micro_batches = split(batch, count, group)

    def add(carry: tuple[Any, Any, Stats], rows: Any) -> tuple[tuple[Any, Any, Stats], None]:
        grads, batch_stats, stats = carry
        more_grads, (batch_stats, more_stats) = gradients(loss_fn, params, batch_stats, rows)
        return (jax.tree.map(jnp.add, grads, more_grads), batch_stats, jax.tree.map(jnp.add, stats, more_stats)), None

    def rows_of(k: int) -> Any:
        return jax.tree.map(lambda x: x[k], micro_batches)

    losses, (_, shapes) = jax.eval_shape(loss_fn, params, batch_stats, rows_of(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    carry = ((zeros,) * losses.size if losses.ndim else zeros, batch_stats, jax.tree.map(jnp.zeros_like, shapes))
    if unroll:
        for k in range(count):
            carry, _ = add(carry, rows_of(k))
    else:
        carry, _ = jax.lax.scan(add, carry, micro_batches)
    return carry
