"""Randomness as a function of (seed, name, step, example id): nothing is carried, so resuming needs no saved key."""

import zlib

import jax


def key(seed: int | jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """Returns the typed PRNG key of `seed` folded with each name or number in turn."""
    return fold(jax.random.key(seed), *names)


def fold(base: jax.Array, *names: str | int | jax.Array) -> jax.Array:
    """Returns the key `base` folded with each name or number in turn."""
    for name in names:
        base = jax.random.fold_in(base, zlib.crc32(name.encode()) if isinstance(name, str) else name)
    return base


def row_keys(base: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns one key an example `[B]`, so that a row's draw does not depend on its place or device.

    Args:
      base: a typed PRNG key.
      ids: example ids `[B]` int32.
    """
    return jax.vmap(lambda row: jax.random.fold_in(base, row))(ids)
