"""Randomness as a function of (seed, name, step, example id): no key is carried from step to step or saved."""

import zlib

import jax


def key(seed: int | jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """Returns the typed PRNG key of a seed with each name or number folded in."""
    return fold(jax.random.key(seed), *names)


def fold(base: jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """Returns a key with each name or number folded in."""
    for name in names:
        base = jax.random.fold_in(base, zlib.crc32(name.encode()) if isinstance(name, str) else name)
    return base


def row_keys(base: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns one key per example `[B]`, so that an example's draws do not depend on its position or device.

    Args:
      base: a typed PRNG key.
      ids: example ids `[B]` int32.
    """
    return jax.vmap(lambda row: jax.random.fold_in(base, row))(ids)
