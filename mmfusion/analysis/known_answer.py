"""Small tasks whose answer is known: which modality tells the label, or only both together, and the best rate there is.

Each modality shows a symbol, 0 or 1, in one of its tokens; the label follows the symbols as the task says.

B batch · M modalities · N tokens · D width
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("a", "b", "c", "d")
TASKS = ("redundant", "unique_a", "unique_b", "synergy", "none")


def joint(task: str, modalities: int, dial: float) -> np.ndarray:
    """Returns the probability `[2] * M + [2]` of the symbols and the label.

    With y' the label as it would be without noise, y = y' with probability (1 + dial) / 2. In `redundant` every
    modality shows y'; in `unique_a` modality a does; in `synergy` a is random and b = a xor y'; what is not said of a
    symbol is that it is random and tells nothing.

    Raises:
      ValueError: an unknown task, or one that needs more modalities.
    """
    needed = {"unique_b": 2, "synergy": 2, "unique_c": 3}.get(task, 1)
    if task not in (*TASKS, "unique_c") or modalities < needed:
        raise ValueError(f"no task {task!r} of {modalities} modalities")
    table = np.zeros((2,) * (modalities + 1))
    for *symbols, clean in itertools.product((0, 1), repeat=modalities + 1):
        if _shown(task, symbols, clean):
            table[(*symbols, clean)] += (1 + dial) / 2
            table[(*symbols, 1 - clean)] += (1 - dial) / 2
    return table / table.sum()


def _shown(task: str, symbols: list[int], clean: int) -> bool:
    """Returns whether these symbols may stand beside the noiseless label."""
    if task == "redundant":
        return all(symbol == clean for symbol in symbols)
    if task == "synergy":
        return symbols[0] ^ symbols[1] == clean
    return task == "none" or symbols[NAMES.index(task[-1])] == clean


def bayes_rate(table: np.ndarray, absent: float = 0.0, visible: tuple[int, ...] | None = None) -> float:
    """Returns the accuracy of the best possible guess.

    Args:
      table: of `joint`.
      absent: chance that a modality is absent, each by itself.
      visible: the modalities that are looked at, by place; None: all.
    """
    modalities = table.ndim - 1
    visible = tuple(range(modalities)) if visible is None else visible
    rate = 0.0
    for shown in itertools.product((False, True), repeat=len(visible)):
        kept = [m for m, there in zip(visible, shown, strict=True) if there]
        chance = np.prod([1 - absent if there else absent for there in shown])
        seen = table.sum(axis=tuple(m for m in range(modalities) if m not in kept))
        rate += chance * seen.max(axis=-1).sum()
    return float(rate)


def sample(
    key: jax.Array, table: jax.Array, rows: int, *, tokens: int, width: int, padded: jax.Array, absent: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """Draws examples of a task.

    Args:
      key: of the draw.
      table: of `joint`.
      rows: B.
      tokens: N of every modality.
      width: D.
      padded: whether each modality has a random number of real tokens (a bool, traced or not).
      absent: chance that a modality is absent.

    Returns:
      tokens `[B, N, D]` and their mask `[B, N]` by modality, and labels `[B]` int32. Padding holds noise.
    """
    modalities = table.ndim - 1
    key_row, key_rest = jax.random.split(key)
    drawn = jax.random.categorical(key_row, jnp.log(jnp.maximum(table, 1e-12)).ravel(), shape=(rows,))
    *symbols, label = jnp.unravel_index(drawn, table.shape)
    inputs, mask = {}, {}
    for m in range(modalities):
        keys = jax.random.split(jax.random.fold_in(key_rest, m), 4)
        prototypes = 2.0 * np.random.default_rng(m).normal(size=(2, width)).astype(np.float32)
        length = jnp.where(padded, jax.random.randint(keys[0], (rows,), 1, tokens + 1), tokens)  # [B]
        place = jnp.floor(jax.random.uniform(keys[1], (rows,)) * length).astype(jnp.int32)
        noise = 0.3 * jax.random.normal(keys[2], (rows, tokens, width))
        shown = jnp.arange(tokens) == place[:, None]  # [B, N]
        inputs[NAMES[m]] = noise + shown[:, :, None] * jnp.asarray(prototypes)[symbols[m]][:, None, :]
        there = jax.random.uniform(keys[3], (rows, 1)) >= absent
        mask[NAMES[m]] = (jnp.arange(tokens) < length[:, None]) & there
    return inputs, mask, label.astype(jnp.int32)
