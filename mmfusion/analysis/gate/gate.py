"""The known-answer gate: trains a strategy on tasks with known best accuracy, and compares with its declaration.

The gate uses the model and the train step of regular training, with identity encoders.

R replicas (one per task and variant) · B batch · M modalities · N tokens · D width
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
from mmfusion.analysis.gate.contract_checks import declaration, path_name
from mmfusion.analysis.gate.token_model import TASK, as_batch, model_of
from mmfusion.data.batch import Batch
from mmfusion.models.convolution import as_patches
from mmfusion.objectives import Task, build_objectives
from mmfusion.training.eval_step import eval_step
from mmfusion.training.state import init_state
from mmfusion.training.step import StepSpec, train_step

VARIANTS = ("plain", "padded", "absent")
SHORT_OF_BAYES, ABOVE_CHANCE = 0.03, 0.06
UNDECIDED = 0.1  # a probability this close to 0.5 counts as half correct
EARLY = 10  # steps within which every parameter must have changed
WARMUP = 20
LONGER = 3  # factor on the steps of the second attempt
SHORT = "short of the Bayes rate"


@dataclasses.dataclass(frozen=True)
class Size:
    """Model, data and training sizes of the gate.

    Attributes:
      width, tokens, heads: D, N, and the number of attention heads, if the strategy has any.
      steps, batch, learning_rate: of Adam with a short warmup and cosine decay to 0. All tasks are trained again for
        `LONGER` times the steps if one falls short.
      rows: the number of test examples.
      dial, absent: the reliability of the label (see `joint`), and the rate of absence in the variant `absent`.
      variants: a subset of VARIANTS: no padding, padded tokens, padded tokens and absent modalities.
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
    """One task in one variant: the accuracy reached, the Bayes rate, and a failure message or ""."""

    task: str
    modalities: int
    variant: str
    score: float
    bayes: float
    failure: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The gate's result for one strategy: its cells, all failure messages, and the run time in seconds."""

    cells: tuple[Cell, ...]
    failures: tuple[str, ...]
    seconds: float


def check(
    kind: type[nn.Module],
    options: Mapping[str, Any] | None = None,
    size: Size = Size(),
    modalities: Sequence[int] = (2, 3),
) -> Report:
    """Checks a strategy: its parameters, learning, masks, declaration, absent modalities and jit.

    Args:
      kind: the strategy's class.
      options: options of the strategy; others have their defaults, except width and heads.
      size: sizes of the model and of training.
      modalities: numbers of modalities of the tasks; numbers that the strategy rejects are skipped. Masks are checked
        with 1 and these, declarations with 1 to 4.
    """
    start = time.perf_counter()
    strategy = build(kind, options, size)
    failures = contract_checks.failures(strategy, sorted({1, *modalities}))
    cells = []
    for count in contract_checks.supported(strategy, modalities):
        learned, untrained = learn(strategy, count, size)
        if any(SHORT in cell.failure for cell in learned):  # it may only learn slowly
            learned, _ = learn(strategy, count, dataclasses.replace(size, steps=LONGER * size.steps))
        cells += learned
        failures += untrained
    failures += [cell.failure for cell in cells if cell.failure]
    return Report(tuple(cells), tuple(failures), time.perf_counter() - start)


def build(kind: type[nn.Module], options: Mapping[str, Any] | None, size: Size) -> nn.Module:
    """Returns the strategy with the gate's width and heads and the given options."""
    fields = {field.name for field in dataclasses.fields(kind)}
    sizes = {name: getattr(size, name) for name in ("width", "heads") if name in fields}
    return kind(**{**sizes, **(options or {})})


def variants(size: Size, modalities: int) -> list[str]:
    """Returns the variants to train with M modalities: without `padded` unless M = 2, as `absent` is padded, too."""
    return [v for v in size.variants if modalities == 2 or v != "padded"]


def learn(strategy: nn.Module, modalities: int, size: Size) -> tuple[list[Cell], list[str]]:
    """Trains and scores all tasks and variants of M modalities in one program.

    Returns:
      The cells, and a failure for each parameter without a gradient or without a change in the first steps.
    """
    names = _replicas(modalities, size)
    run = jax.jit(lambda train, test: _train(strategy, modalities, size, train, test))
    with as_patches():  # vmapped convolutions would be grouped
        scores, records = jax.device_get(run(*_batches(modalities, size)))
    cells = [
        _cell(strategy, task, modalities, variant, float(score), size)
        for (task, variant), score in zip(names, scores, strict=True)
    ]
    return cells, _untrained(records, modalities)


def _replicas(modalities: int, size: Size) -> list[tuple[str, str]]:
    """Returns the (task, variant) of each replica."""
    return [(task, v) for v in variants(size, modalities) for task in synthetic_tasks.tasks(modalities)]


@functools.lru_cache(maxsize=4)
def _batches(modalities: int, size: Size) -> tuple[Batch, Batch]:
    """Returns training batches `[steps, R, B, ...]` and the test batch `[R, B, ...]`, the same for all strategies."""
    names = _replicas(modalities, size)
    tables = np.stack([synthetic_tasks.joint(task, modalities, size.dial) for task, _ in names]).astype(np.float32)
    padded = np.array([variant != "plain" for _, variant in names])
    absent = np.array([size.absent if variant == "absent" else 0.0 for _, variant in names], np.float32)

    def sample(key: jax.Array, rows: int) -> Batch:
        # All replicas share one key, so that the random numbers, which take most of the time, are generated once.
        draw = lambda *cell: as_batch(*synthetic_tasks.draw(key, cell[0], rows, size.tokens, size.width, *cell[1:]))  # noqa: E731
        return jax.vmap(draw)(tables, padded, absent)

    train = jax.jit(lambda steps: jax.lax.map(lambda step: sample(rng.key(0, "train", step), size.batch), steps))
    return train(jnp.arange(size.steps)), jax.jit(lambda: sample(rng.key(0, "test"), size.rows))()


def _train(strategy: nn.Module, modalities: int, size: Size, train: Batch, test: Batch) -> tuple[jax.Array, Any]:
    """Returns the score of each replica `[R]` and the records of its optimizer `[R, ...]`; call it under jit.

    Args:
      strategy, modalities, size: see `learn`.
      train, test: see `_batches`.
    """
    model, tasks = model_of(strategy, modalities), {TASK: Task("classification", 2)}
    optimizer = optax.inject_hyperparams(lambda learning_rate: _with_records(optax.adam(learning_rate)))(
        learning_rate=0.0
    )
    rate = optax.warmup_cosine_decay_schedule(0.0, size.learning_rate, min(WARMUP, size.steps // 2), size.steps)

    def identity(batch: Any, key: Any) -> Any:
        return batch

    spec = StepSpec(model, optimizer, build_objectives(model, tasks), identity)

    def step(states: Any, inputs: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        index, batches = inputs
        update = lambda state, batch: train_step(  # noqa: E731
            state, batch, cast(jax.Array, rate(index + 1)), spec=spec
        )[0]  # fmt: skip
        return jax.vmap(update)(states, batches), None

    example = jax.tree.map(lambda x: x[0, 0, :1], train)  # for its shape
    seeds = jnp.arange(test.id.shape[0], dtype=jnp.uint32)
    states = jax.vmap(lambda seed: init_state(model, optimizer, example, identity, seed))(seeds)
    states, _ = jax.lax.scan(step, states, (jnp.arange(size.steps), train))

    def score(state: Any, batch: Any) -> jax.Array:
        result = eval_step(
            state.params, state.batch_stats, batch, model=model, tasks=tasks, preprocess=identity, axis_name=None
        )
        probability = jax.nn.softmax(result["logits"][TASK])[:, 1]
        correct = (probability > 0.5) == (batch.targets[TASK] == 1)
        return jnp.where(jnp.abs(probability - 0.5) < UNDECIDED, 0.5, correct).mean()

    scores = jax.vmap(score)(states, test)
    return scores, states.opt_state.inner_state[:2]


def _with_records(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimizer with the largest gradients and the largest early parameter changes first in its state.

    Both are `[ΣN]`: the maximum at each index of each axis of a parameter, so that an untrained rank or chunk is found.
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
        gradient = jax.tree.map(lambda high, g: jnp.maximum(high, largest(g)), gradient, gradients)
        moved = jax.tree.map(lambda p, u: largest(p + u - p), params, updates)
        change = jax.tree.map(lambda high, u: jnp.where(count < EARLY, jnp.maximum(high, u), high), change, moved)
        return updates, (gradient, change, count + 1, rest)

    return optax.GradientTransformation(init, cast(optax.TransformUpdateFn, update))


def _untrained(records: tuple[Any, Any], modalities: int) -> list[str]:
    failures = []
    for record, problem in zip(records, ("gets no gradient", f"does not change in {EARLY} steps"), strict=True):
        for path, maxima in jax.tree_util.tree_leaves_with_path(record):
            zero = ~(np.max(maxima, axis=0) > 0)
            if zero.any():
                part = "" if zero.all() else f"part of {zero.sum()} of the {zero.size} indices of "
                failures.append(f"M={modalities}: {part}parameter {path_name(path)} {problem}")
    return failures


def _cell(strategy: nn.Module, task: str, modalities: int, variant: str, score: float, size: Size) -> Cell:
    declares = declaration(strategy)
    bayes = synthetic_tasks.bayes_rate(task, modalities, size.dial, size.absent if variant == "absent" else 0.0)
    failure = ""
    where = f"M={modalities} {task}, {variant}"
    if task == "none":
        if score > 0.5 + ABOVE_CHANCE:
            failure = f"{where}: {score:.3f}, above chance, though the label is independent of the inputs"
    elif task == "synergy" and not declares.synergy:
        # On XOR an additive model is at chance; any other model without synergy gets at most three of the four cells.
        chance = 0.5 if declares.additive else (3 * bayes + 1 - bayes) / 4
        if score > chance + ABOVE_CHANCE:
            failure = f"{where}: {score:.3f}, though it declares no synergy"
    elif not score >= bayes - SHORT_OF_BAYES:
        failure = f"{where}: {score:.3f}, {SHORT} {bayes:.3f}"
    return Cell(task, modalities, variant, score, bayes, failure)
