"""The known-answer gate: does a strategy learn what it declares, and only that?"""

import dataclasses
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmfusion.analysis import known_answer
from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel
from mmfusion.objectives import Task
from mmfusion.step import task_losses

WIDTH, TOKENS, BATCH, STEPS, TEST, DIAL, ABSENT = 16, 3, 64, 400, 2048, 0.9, 0.25
TASK = Task(kind="classification", outputs=2, loss="", label_smoothing=0.0, class_weights=(), weight=1.0)
BELOW_BAYES, ABOVE_CHANCE, UNDECIDED = 0.03, 0.06, 0.1


class Cell(NamedTuple):
    """One task as it is trained and scored.

    Attributes:
      task: a name of `known_answer.TASKS`, or `unique_c`.
      padded: whether modalities have random lengths.
      absent: chance that a modality is absent.
    """

    task: str
    padded: bool = False
    absent: float = 0.0


class Result(NamedTuple):
    """What a cell came to.

    Attributes:
      score: test accuracy, where a prediction with |p - 1/2| < 0.1 counts as half right.
      bayes: the best rate there is.
      failure: empty, or why it is not what the strategy declares.
    """

    score: float
    bayes: float
    failure: str


CELLS = (*(Cell(task) for task in known_answer.TASKS), Cell("redundant", True), Cell("synergy", True),
         Cell("redundant", absent=ABSENT), Cell("synergy", absent=ABSENT))  # fmt: skip


class Given(nn.Module):
    """The encoder of data that are tokens already."""

    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns tokens `[B, N, D]` and their mask as they came."""
        del train
        return x, mask


def model_of(kind: type[nn.Module], modalities: int, width: int = WIDTH) -> FusionModel:
    """Returns a strategy with its default options between given tokens and a linear head of two classes."""
    fields = {field.name for field in dataclasses.fields(kind)}
    fusion = kind(**({"width": width} if "width" in fields else {}))
    encoders = flax.core.FrozenDict({m: Given() for m in known_answer.NAMES[:modalities]})
    return FusionModel(encoders=encoders, fusion=fusion, tasks=(("label", 2),))


def batch_of(tokens: dict[str, jax.Array], mask: dict[str, jax.Array], label: jax.Array) -> Batch:
    """Returns the Batch of tokens, masks and labels."""
    rows = label.shape[0]
    return Batch(
        inputs=tokens, mask=mask, present={m: mask[m].any(axis=1) for m in mask}, targets={"label": label},
        weight=jnp.ones(rows), id=jnp.arange(rows),
    )  # fmt: skip


def learn(
    kind: type[nn.Module], modalities: int, cells: tuple[Cell, ...] = CELLS, *, steps: int = STEPS, seed: int = 0
) -> tuple[dict[Cell, Result], list[str]]:
    """Trains a strategy on every cell, all at once as one program, each step on fresh examples.

    Args:
      kind: the strategy, used with its default options.
      modalities: M.
      cells: what is trained and scored.
      steps: Adam steps of 64 examples.
      seed: of parameters and data.

    Returns:
      The result of each cell, and the parameters that got no gradient or did not change in ten steps, in any cell.
    """
    model = model_of(kind, modalities)
    tables = np.stack([known_answer.joint(cell.task, modalities, DIAL) for cell in cells])
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def draw(key: jax.Array, table: jax.Array, padded: jax.Array, absent: jax.Array, rows: int) -> Batch:
        return batch_of(
            *known_answer.sample(key, table, rows, tokens=TOKENS, width=WIDTH, padded=padded, absent=absent)
        )

    def one(table: jax.Array, padded: jax.Array, absent: jax.Array) -> tuple[jax.Array, Any, Any]:
        key = jax.random.key(seed)
        params = model.init(key, draw(key, table, padded, absent, 2), train=False)["params"]

        def update(carry: tuple[Any, Any], step: jax.Array) -> tuple[tuple[Any, Any], Any]:
            params, state = carry
            batch = draw(jax.random.fold_in(key, step), table, padded, absent, BATCH)

            def loss(params: Any) -> jax.Array:
                variables = {"params": params, "rows": {"id": batch.id}}
                rngs = {"dropout": jax.random.fold_in(key, step)}
                outputs = model.apply(variables, batch, train=True, rngs=rngs)
                return task_losses(outputs, batch, "label", TASK).mean()

            grads = jax.grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            largest = jax.tree.map(lambda g: jnp.abs(g).max(), grads)
            return (optax.apply_updates(params, updates), state), largest

        begun, first = jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(10))
        moved = jax.tree.map(lambda new, old: jnp.abs(new - old).max(), begun[0], params)
        (trained, _), _ = jax.lax.scan(update, begun, jnp.arange(10, steps))
        test = draw(jax.random.fold_in(key, steps), table, padded, absent, TEST)
        logits = model.apply({"params": trained}, test, train=False).logits["label"]
        right = jax.nn.softmax(logits)[jnp.arange(TEST), test.targets["label"]]
        scores = jnp.where(jnp.abs(right - 0.5) < UNDECIDED, 0.5, (right > 0.5).astype(jnp.float32))
        return scores.mean(), jax.tree.map(lambda g: g.max(), first), moved

    settings = (
        tables,
        np.array([cell.padded for cell in cells]),
        np.array([cell.absent for cell in cells], np.float32),
    )
    scores, gradients, moved = jax.device_get(jax.jit(jax.vmap(one))(*settings))
    still = [
        jax.tree_util.keystr(path)
        for (path, g), d in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(moved), strict=True)
        if not (np.max(g) > 1e-8 and np.max(d) > 1e-8)
    ]
    results = {}
    for cell, table, score in zip(cells, tables, scores, strict=True):
        bayes = known_answer.bayes_rate(table, cell.absent)
        results[cell] = Result(float(score), bayes, judged(kind, cell, float(score), bayes))
    return results, still


def judged(kind: type[nn.Module], cell: Cell, score: float, bayes: float) -> str:
    """Returns why a score is not what the strategy declares; empty where it is."""
    if cell.task == "none" and abs(score - 0.5) > ABOVE_CHANCE:
        return f"scores {score:.3f} where nothing can be learned"
    if cell.task == "synergy" and not kind.declares.synergy:
        return f"scores {score:.3f} on what it declares it cannot learn" if score > 0.5 + ABOVE_CHANCE else ""
    return f"scores {score:.3f}, the best is {bayes:.3f}" if score < bayes - BELOW_BAYES else ""


def interaction(kind: type[nn.Module], modalities: int = 2, seed: int = 0) -> float:
    """Returns the largest mixed second difference of the logits, over their size, at random parameters.

    It is f(a, b) - f(a', b) - f(a, b') + f(a', b') with f the logits less the first class's, 0 for an additive one.
    """
    model, draw = model_of(kind, modalities), np.random.default_rng(seed)
    names = known_answer.NAMES[:modalities]
    two = {m: draw.normal(size=(2, TOKENS, WIDTH)).astype(np.float32) for m in names}
    which = {m: np.array([0, 1, 0, 1]) if m == names[0] else np.array([0, 0, 1, 1]) for m in names}
    mask = {m: np.ones((4, TOKENS), bool) for m in names}
    batch = batch_of({m: two[m][which[m]] for m in names}, mask, np.zeros(4, np.int32))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, train=False))
    variables = jax.tree.map(lambda leaf: 0.5 * draw.normal(size=leaf.shape).astype(np.float32), shapes)
    logits = model.apply(variables, batch, train=False).logits["label"]
    f = np.asarray(logits[:, 1] - logits[:, 0])
    return float(abs(f[0] - f[1] - f[2] + f[3]) / max(np.abs(f).max(), 1e-6))


def failures(kind: type[nn.Module], modalities: int, results: dict[Cell, Result], still: list[str]) -> list[str]:
    """Returns every way in which a strategy is not what it declares; empty where the gate is passed."""
    found = [f"{cell.task}{' padded' * cell.padded}{' absent' * bool(cell.absent)}: {result.failure}"
             for cell, result in results.items() if result.failure]  # fmt: skip
    found += [f"no gradient, or no change in ten steps: {path}" for path in still]
    if modalities > 1:
        mixed = interaction(kind, modalities)
        if (mixed < 1e-4) != kind.declares.additive:
            declared = "additive" if kind.declares.additive else "not additive"
            found.append(f"declared {declared}, but the mixed second difference is {mixed:.1e}")
    return [f"M={modalities}: {one}" for one in found]
