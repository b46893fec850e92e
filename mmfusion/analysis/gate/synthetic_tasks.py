"""Synthetic tasks with known best accuracy: the label depends on one modality, is redundant, synergistic or random.

B batch · M modalities · N tokens per modality · D width
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MODALITIES = ("a", "b", "c", "d")
DISTRACTORS = 4  # number of uninformative tokens
NOISE = 0.1  # standard deviation of the noise on tokens, whose root mean square is 1
GARBAGE = 5.0  # standard deviation of the values at masked positions


def tasks(modalities: int) -> tuple[str, ...]:
    """Returns the tasks of M modalities: `unique_a` to `unique_c`, `none`, and for M > 1 `redundant` and `synergy`."""
    unique = tuple(f"unique_{m}" for m in MODALITIES[: min(modalities, 3)])
    return ("redundant", *unique, "synergy", "none") if modalities > 1 else (*unique, "none")


def joint(task: str, modalities: int, dial: float) -> np.ndarray:
    """Returns the joint distribution P(s_1, ..., s_M, y) `[2, ..., 2, 2]` of the modalities' symbols and the label.

    The label is s_m for `unique_m`, the symbol of all modalities for `redundant`, s_a XOR s_b for `synergy`, and random
    for `none`.

    Args:
      task: one of `tasks(modalities)`.
      modalities: M, one to four.
      dial: 0 to 1; the label is as above with probability (1 + dial) / 2, otherwise flipped.

    Raises:
      ValueError: there is no such task of M modalities, or `dial` is not in [0, 1].
    """
    if task not in tasks(modalities) or not 0 <= dial <= 1:
        raise ValueError(f"task {task!r} with dial {dial}: choose of {tasks(modalities)} and a dial in [0, 1]")
    table = np.zeros((2,) * (modalities + 1))
    for symbols in itertools.product((0, 1), repeat=modalities):
        if task == "redundant":
            if len(set(symbols)) > 1:
                continue
            probability, label = 1 / 2, symbols[0]
        elif task == "none":
            table[symbols] = 1 / 2 ** (modalities + 1)
            continue
        else:
            probability = 1 / 2**modalities
            label = symbols[0] ^ symbols[1] if task == "synergy" else symbols[MODALITIES.index(task[-1])]
        table[(*symbols, label)] += probability * (1 + dial) / 2
        table[(*symbols, 1 - label)] += probability * (1 - dial) / 2
    return table


def bayes_rate(
    task: str, modalities: int, dial: float, absent: float = 0.0, visible: Sequence[str] | None = None
) -> float:
    """Returns the Bayes-optimal accuracy, by enumeration of the symbols and of the present modalities.

    Args:
      task, modalities, dial: see `joint`.
      absent: probability that a modality is absent, independently of the others.
      visible: the modalities to predict from; None: all; empty: the majority rate.
    """
    table = joint(task, modalities, dial)
    usable = [MODALITIES[i] in (MODALITIES if visible is None else visible) for i in range(modalities)]
    rate = 0.0
    for present in itertools.product((False, True), repeat=modalities):
        probability = np.prod([1 - absent if p else absent for p in present])
        hidden = tuple(i for i in range(modalities) if not (present[i] and usable[i]))
        rate += probability * table.sum(axis=hidden).max(axis=-1).sum()
    return float(rate)


def draw(
    key: jax.Array,
    table: jax.Array,
    rows: int,
    tokens: int,
    width: int,
    padded: jax.Array | bool,
    absent: jax.Array | float,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """Samples examples from a table of `joint`; all arguments but the sizes may be traced, so tasks share a program.

    Args:
      key: a typed PRNG key.
      table: P(s_1, ..., s_M, y) `[2, ..., 2, 2]`.
      rows, tokens, width: B, N and D, which is at least 6.
      padded: whether a modality has a random number of real tokens, 1 to N, in each row; otherwise N.
      absent: probability that a modality is absent, independently of the others.

    Returns:
      Tokens `[B, N, D]` and mask `[B, N]` by modality, and the label `[B]` int32. One real token of a modality encodes
      its symbol; masked positions have random values.
    """
    modalities = table.ndim - 1
    keys = jax.random.split(key, 1 + modalities)
    uniform = jax.random.uniform(keys[0], (rows, 1))
    outcome = (uniform > jnp.cumsum(table.ravel())[:-1]).sum(axis=1)  # [B]
    *symbols, label = jnp.unravel_index(outcome, table.shape)
    inputs, mask = {}, {}
    for i, m in enumerate(MODALITIES[:modalities]):
        k = jax.random.split(keys[1 + i], 4)
        prototypes = jnp.asarray(_prototypes(i, width), jnp.float32)  # [2 + DISTRACTORS, D]
        uniform = jax.random.uniform(k[0], (3, rows))
        count = jnp.where(padded, 1 + jnp.floor(uniform[0] * tokens).astype(jnp.int32), tokens)  # [B]
        informative = jnp.floor(uniform[1] * count).astype(jnp.int32)  # [B]
        positions = jnp.arange(tokens)
        which = jax.random.randint(k[1], (rows, tokens), 2, 2 + DISTRACTORS)  # [B, N]
        which = jnp.where(positions == informative[:, None], symbols[i][:, None], which)
        mask[m] = (positions < count[:, None]) & (uniform[2] >= absent)[:, None]  # [B, N]
        x = prototypes[which] + NOISE * jax.random.normal(k[2], (rows, tokens, width))  # [B, N, D]
        inputs[m] = jnp.where(mask[m][:, :, None], x, GARBAGE * jax.random.normal(k[3], x.shape))
    return inputs, mask, label.astype(jnp.int32)


def sample(
    key: jax.Array,
    task: str,
    rows: int,
    modalities: int,
    tokens: int,
    width: int,
    dial: float,
    *,
    padded: bool = False,
    absent: float = 0.0,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """Samples examples of a task; for arguments and result see `joint` and `draw`."""
    return draw(key, jnp.asarray(joint(task, modalities, dial)), rows, tokens, width, padded, absent)


def _prototypes(modality: int, width: int) -> np.ndarray:
    """Returns orthogonal vectors of root mean square 1: one for each of the two symbols, and the distractors."""
    if width < 2 + DISTRACTORS:
        raise ValueError(f"width is {width}; it must be at least {2 + DISTRACTORS} for orthogonal tokens")
    basis, _ = np.linalg.qr(np.random.default_rng([2024, modality]).normal(size=(width, width)))
    return basis[: 2 + DISTRACTORS] * np.sqrt(width)
