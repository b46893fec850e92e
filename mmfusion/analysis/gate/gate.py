"""The known-answer gate: whether a strategy learns what it declares, and nothing that it should not.

Everything goes through the model and the step that training uses, with encoders that pass the tokens through.

R replicas (one a task and variant) · B batch · M modalities · N tokens · D width
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmfusion import rng
from mmfusion.analysis.gate import contract_checks, synthetic_tasks
from mmfusion.analysis.gate.contract_checks import TASK, as_batch, declaration, model_of, path_name
from mmfusion.data.batch import Batch
from mmfusion.objectives import Task, build_objectives
from mmfusion.training.eval_step import eval_step
from mmfusion.training.state import init_state
from mmfusion.training.step import StepSpec, train_step

VARIANTS = ("plain", "padded", "absent")
SHORT_OF_BAYES, ABOVE_CHANCE = 0.03, 0.06
UNDECIDED = 0.1  # a probability this near to one half is no decision, and counts as half right
EARLY = 10  # steps within which every parameter must have changed
WARMUP = 20
LONGER = 3
SHORT = "short of the Bayes rate"


@dataclasses.dataclass(frozen=True)
class Size:
    """How large and long the gate trains.

    Attributes:
      width, tokens, heads: D, N, and the attention heads of strategies that have any.
      steps, batch, learning_rate: of Adam, with a short warmup and a cosine to 0; what falls short is trained once
        more, `LONGER` times as many steps.
      rows: fresh examples that are scored.
      dial, absent: how sure the label is, and how often a modality is missing in the variant `absent`.
      variants: of VARIANTS: whole, with padded tokens, with those and absent modalities.
    """

    width: int = 16
    tokens: int = 4
    heads: int = 4
    steps: int = 400
    batch: int = 64
    learning_rate: float = 5e-3
    rows: int = 2048
    dial: float = 0.9
    absent: float = 0.25
    variants: tuple[str, ...] = VARIANTS


@dataclasses.dataclass(frozen=True)
class Cell:
    """One task in one variant: what was reached, the best there is, and what is wrong (empty: nothing)."""

    task: str
    modalities: int
    variant: str
    score: float
    bayes: float
    failure: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What the gate found of one strategy: its cells, every failure in words, and the seconds it took."""

    cells: tuple[Cell, ...]
    failures: tuple[str, ...]
    seconds: float


def check(
    kind: type[nn.Module],
    options: Mapping[str, Any] | None = None,
    size: Size = Size(),
    modalities: Sequence[int] = (2, 3),
) -> Report:
    """Returns what the gate finds of a strategy: parameters, learning, masks, declaration, absence and jit.

    Args:
      kind: the strategy's class.
      options: of the strategy; the others are at their defaults, but for the heads.
      size: how large and long it trains.
      modalities: how many modalities the tasks have, those that it refuses left out; masks are checked with one
        and these, declarations with one to four.
    """
    start = time.perf_counter()
    strategy = build(kind, options, size)
    failures = contract_checks.failures(strategy, sorted({1, *modalities}))
    cells = []
    for count in contract_checks.taken(strategy, modalities):
        more, unmoved = learn(strategy, count, size)
        if any(SHORT in cell.failure for cell in more):  # a slow start: what cannot be learned is short again
            more, _ = learn(strategy, count, dataclasses.replace(size, steps=LONGER * size.steps))
        cells += more
        failures += unmoved
    failures += [cell.failure for cell in cells if cell.failure]
    return Report(tuple(cells), tuple(failures), time.perf_counter() - start)


def build(kind: type[nn.Module], options: Mapping[str, Any] | None, size: Size) -> nn.Module:
    """Returns the strategy at the gate's width and heads, with the options given."""
    fields = {field.name for field in dataclasses.fields(kind)}
    sizes = {name: getattr(size, name) for name in ("width", "heads") if name in fields}
    return kind(**{**sizes, **(options or {})})


def variants(size: Size, modalities: int) -> list[str]:
    """Returns the variants that tasks of M modalities are trained in: of two all, of others what holds the rest."""
    return [v for v in size.variants if modalities == 2 or v != "padded"]


def learn(strategy: nn.Module, modalities: int, size: Size) -> tuple[list[Cell], list[str]]:
    """Trains and scores every task and variant of M modalities at once, in one program.

    Returns:
      The cells, and a failure for each parameter that had no gradient or did not change in the first steps.
    """
    names = _replicas(modalities, size)
    run = jax.jit(lambda train, test: _train(strategy, modalities, size, train, test))
    scores, recorded = jax.device_get(run(*_drawn(modalities, size)))
    cells = [
        _cell(strategy, task, modalities, variant, float(score), size)
        for (task, variant), score in zip(names, scores, strict=True)
    ]
    return cells, _unmoved(recorded, modalities)


def _replicas(modalities: int, size: Size) -> list[tuple[str, str]]:
    """Returns the tasks and variants that are trained side by side."""
    return [(task, v) for v in variants(size, modalities) for task in synthetic_tasks.tasks(modalities)]


@functools.lru_cache(maxsize=4)
def _drawn(modalities: int, size: Size) -> tuple[Batch, Batch]:
    """Returns the batches to train with `[steps, R, B, ...]` and those to score `[R, B, ...]`, the same for all."""
    names = _replicas(modalities, size)
    tables = np.stack([synthetic_tasks.joint(task, modalities, size.dial) for task, _ in names]).astype(np.float32)
    padded = np.array([variant != "plain" for _, variant in names])
    absent = np.array([size.absent if variant == "absent" else 0.0 for _, variant in names], np.float32)

    def fresh(key: jax.Array, rows: int) -> Batch:
        # One key for all replicas: the random numbers, most of the work, are drawn once.
        draw = lambda *cell: as_batch(*synthetic_tasks.draw(key, cell[0], rows, size.tokens, size.width, *cell[1:]))  # noqa: E731
        return jax.vmap(draw)(tables, padded, absent)

    train = jax.jit(lambda steps: jax.lax.map(lambda step: fresh(rng.key(0, "train", step), size.batch), steps))
    return train(jnp.arange(size.steps)), jax.jit(lambda: fresh(rng.key(0, "test"), size.rows))()


def _train(strategy: nn.Module, modalities: int, size: Size, train: Batch, test: Batch) -> tuple[jax.Array, Any]:
    """Returns the score of each replica `[R]`, and the optimizer's record of each `[R, ...]`; call it under jit.

    Args:
      strategy, modalities, size: as of `learn`.
      train, test: as of `_drawn`.
    """
    model, tasks = model_of(strategy, modalities), {TASK: Task("classification", 2)}
    optimizer = optax.inject_hyperparams(lambda learning_rate: _recorded(optax.adam(learning_rate)))(learning_rate=0.0)
    rate = optax.warmup_cosine_decay_schedule(0.0, size.learning_rate, min(WARMUP, size.steps // 2), size.steps)

    def same(batch: Any, key: Any) -> Any:
        return batch

    spec = StepSpec(model, optimizer, build_objectives(model, tasks), same)

    def step(states: Any, given: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        number, batches = given
        one = lambda state, batch: train_step(  # noqa: E731
            state, batch, cast(jax.Array, rate(number + 1)), spec=spec
        )[0]  # fmt: skip
        return jax.vmap(one)(states, batches), None

    first = jax.tree.map(lambda x: x[0, 0, :1], train)  # its shape is what counts
    seeds = jnp.arange(test.id.shape[0], dtype=jnp.uint32)
    states = jax.vmap(lambda seed: init_state(model, optimizer, first, same, seed))(seeds)
    states, _ = jax.lax.scan(step, states, (jnp.arange(size.steps), train))

    def score(state: Any, batch: Any) -> jax.Array:
        result = eval_step(
            state.params, state.batch_stats, batch, model=model, tasks=tasks, preprocess=same, axis_name=None
        )
        chance = jax.nn.softmax(result["logits"][TASK])[:, 1]
        right = (chance > 0.5) == (batch.targets[TASK] == 1)
        return jnp.where(jnp.abs(chance - 0.5) < UNDECIDED, 0.5, right).mean()

    scores = jax.vmap(score)(states, test)
    return scores, states.opt_state.inner_state[:2]


def _recorded(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimizer with two records first in its state: the largest gradient and early change of parameters.

    Both are `[ΣN]`, at each index of each of a parameter's axes, so that a rank or a chunk that stands still is seen.
    """

    def largest(x: jax.Array) -> jax.Array:
        axes = range(x.ndim)
        each = [jnp.abs(x).max(axis=[other for other in axes if other != axis]) for axis in axes]
        return jnp.concatenate(each) if each else jnp.abs(x)[None]

    def init(params: Any) -> tuple:
        zeros = jax.tree.map(lambda p: jnp.zeros(max(sum(p.shape), 1)), params)
        return zeros, zeros, jnp.zeros((), jnp.int32), inner.init(params)

    def update(gradients: Any, state: tuple, params: Any) -> tuple[Any, tuple]:
        gradient, change, count, rest = state
        updates, rest = inner.update(gradients, rest, params)
        gradient = jax.tree.map(lambda most, g: jnp.maximum(most, largest(g)), gradient, gradients)
        moved = jax.tree.map(lambda p, u: largest(p + u - p), params, updates)
        change = jax.tree.map(lambda most, u: jnp.where(count < EARLY, jnp.maximum(most, u), most), change, moved)
        return updates, (gradient, change, count + 1, rest)

    return optax.GradientTransformation(init, cast(optax.TransformUpdateFn, update))


def _unmoved(recorded: tuple[Any, Any], modalities: int) -> list[str]:
    failures = []
    for record, what in zip(recorded, ("gets no gradient", f"does not change in {EARLY} steps"), strict=True):
        for path, most in jax.tree_util.tree_leaves_with_path(record):
            still = ~(np.max(most, axis=0) > 0)
            if still.any():
                part = "" if still.all() else f"part of {still.sum()} of the {still.size} indices of "
                failures.append(f"M={modalities}: {part}parameter {path_name(path)} {what}")
    return failures


def _cell(strategy: nn.Module, task: str, modalities: int, variant: str, score: float, size: Size) -> Cell:
    declares = declaration(strategy)
    bayes = synthetic_tasks.bayes_rate(task, modalities, size.dial, size.absent if variant == "absent" else 0.0)
    failure = ""
    where = f"M={modalities} {task}, {variant}"
    if task == "none":
        if score > 0.5 + ABOVE_CHANCE:
            failure = f"{where}: {score:.3f}, above chance where nothing tells the label"
    elif task == "synergy" and not declares.synergy:
        # An additive model decides nothing of XOR; without being additive, three of its four cells at the most.
        chance = 0.5 if declares.additive else (3 * bayes + 1 - bayes) / 4
        if score > chance + ABOVE_CHANCE:
            failure = f"{where}: {score:.3f}, though it declares no synergy"
    elif not score >= bayes - SHORT_OF_BAYES:
        failure = f"{where}: {score:.3f}, {SHORT} {bayes:.3f}"
    return Cell(task, modalities, variant, score, bayes, failure)
