"""Generated tasks whose best accuracy is known: a label that one, each or only both of the modalities tell.

B batch · M modalities · N tokens a modality · D width
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

MODALITIES = ("a", "b", "c", "d")
DISTRACTORS = 4  # kinds of token that say nothing
NOISE = 0.1  # standard deviation on every number of every token, whose root mean square is 1
GARBAGE = 5.0  # standard deviation of what stands at padded positions


def tasks(modalities: int) -> tuple[str, ...]:
    """Returns the tasks of M modalities: unique_a ... (up to c), none, from two up redundant and synergy of a and b."""
    unique = tuple(f"unique_{m}" for m in MODALITIES[: min(modalities, 3)])
    return ("redundant", *unique, "synergy", "none") if modalities > 1 else (*unique, "none")


def joint(task: str, modalities: int, dial: float) -> np.ndarray:
    """Returns the exact table P(s_1, ..., s_M, y) `[2, ..., 2, 2]` of the symbols shown and the label.

    Args:
      task: one of `tasks(modalities)`.
      modalities: M, one to four.
      dial: 0 to 1; the label is what the symbols say with probability (1 + dial) / 2, else the other.

    Raises:
      ValueError: there is no such task of M modalities, or the dial is not within 0 and 1.
    """
    if task not in tasks(modalities) or not 0 <= dial <= 1:
        raise ValueError(f"task {task!r} with dial {dial}: choose of {tasks(modalities)} and a dial in [0, 1]")
    table = np.zeros((2,) * (modalities + 1))
    for symbols in itertools.product((0, 1), repeat=modalities):
        if task == "redundant":
            if len(set(symbols)) > 1:
                continue
            chance, said = 1 / 2, symbols[0]
        elif task == "none":
            table[symbols] = 1 / 2 ** (modalities + 1)
            continue
        else:
            chance = 1 / 2**modalities
            said = symbols[0] ^ symbols[1] if task == "synergy" else symbols[MODALITIES.index(task[-1])]
        table[(*symbols, said)] += chance * (1 + dial) / 2
        table[(*symbols, 1 - said)] += chance * (1 - dial) / 2
    return table


def bayes_rate(
    task: str, modalities: int, dial: float, absent: float = 0.0, visible: Sequence[str] | None = None
) -> float:
    """Returns the best accuracy there is, by enumeration of symbols and of which modalities are there.

    Args:
      task, modalities, dial: as of `joint`.
      absent: chance that a modality is absent, each for itself.
      visible: the modalities that may be looked at; all by default, none for the majority rate.
    """
    table = joint(task, modalities, dial)
    seen = [MODALITIES[i] in (MODALITIES if visible is None else visible) for i in range(modalities)]
    rate = 0.0
    for present in itertools.product((False, True), repeat=modalities):
        chance = np.prod([1 - absent if p else absent for p in present])
        hidden = tuple(i for i in range(modalities) if not (present[i] and seen[i]))
        rate += chance * table.sum(axis=hidden).max(axis=-1).sum()
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
    """Draws examples of a table of `joint`; everything but the sizes may be traced, so that tasks share a program.

    Args:
      key: a typed PRNG key.
      table: P(s_1, ..., s_M, y) `[2, ..., 2, 2]`.
      rows, tokens, width: B, N and D, which is at least 6.
      padded: whether a modality has 1 to N real tokens, drawn for each row, or N.
      absent: chance that a modality is absent, each for itself.

    Returns:
      Tokens `[B, N, D]` and mask `[B, N]` by modality, and the label `[B]` int32. One real token of a modality shows
      its symbol; padded positions and absent modalities hold garbage.
    """
    modalities = table.ndim - 1
    keys = jax.random.split(key, 1 + modalities)
    chance = jax.random.uniform(keys[0], (rows, 1))
    outcome = (chance > jnp.cumsum(table.ravel())[:-1]).sum(axis=1)  # [B]
    *symbols, label = jnp.unravel_index(outcome, table.shape)
    shown, mask = {}, {}
    for i, m in enumerate(MODALITIES[:modalities]):
        k = jax.random.split(keys[1 + i], 4)
        kinds = jnp.asarray(_prototypes(i, width), jnp.float32)  # [2 + DISTRACTORS, D]
        uniform = jax.random.uniform(k[0], (3, rows))
        count = jnp.where(padded, 1 + jnp.floor(uniform[0] * tokens).astype(jnp.int32), tokens)  # [B]
        place = jnp.floor(uniform[1] * count).astype(jnp.int32)  # [B]
        positions = jnp.arange(tokens)
        kind = jax.random.randint(k[1], (rows, tokens), 2, 2 + DISTRACTORS)  # [B, N]
        kind = jnp.where(positions == place[:, None], symbols[i][:, None], kind)
        mask[m] = (positions < count[:, None]) & (uniform[2] >= absent)[:, None]  # [B, N]
        clean = kinds[kind] + NOISE * jax.random.normal(k[2], (rows, tokens, width))  # [B, N, D]
        shown[m] = jnp.where(mask[m][:, :, None], clean, GARBAGE * jax.random.normal(k[3], clean.shape))
    return shown, mask, label.astype(jnp.int32)


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
    """Draws examples of a task; arguments and result are those of `joint` and `draw`."""
    return draw(key, jnp.asarray(joint(task, modalities, dial)), rows, tokens, width, padded, absent)


def _prototypes(modality: int, width: int) -> np.ndarray:
    """Returns orthogonal vectors of root mean square 1: two that show a symbol, and the distractors."""
    if width < 2 + DISTRACTORS:
        raise ValueError(f"width {width} has no room for {2 + DISTRACTORS} orthogonal tokens")
    basis, _ = np.linalg.qr(np.random.default_rng([2024, modality]).normal(size=(width, width)))
    return basis[: 2 + DISTRACTORS] * np.sqrt(width)
