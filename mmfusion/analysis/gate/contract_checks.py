"""Checks of a strategy without training: its declaration in both directions, and the contract of every strategy.

Each check returns a list of failure messages, empty if the strategy passes.

B batch · M modalities · N tokens · D width · C classes
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.analysis.gate.synthetic_tasks import MODALITIES
from mmfusion.analysis.gate.token_model import CLASSES, TASK, Masks, Tokens, as_batch, model_of
from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration

ROWS, TOKENS = 8, 4  # four tokens also form a square grid
SAME, DIFFERENT = 1e-5, 1e-4  # relative to the largest value: rounding is below SAME, an effect above DIFFERENT


def path_name(path: tuple) -> str:
    """Returns a parameter's path, joined by slashes."""
    return "/".join(str(getattr(part, "key", part)) for part in path)


def declaration(strategy: nn.Module) -> Declaration:
    """Returns the declaration of a strategy's class."""
    return cast(Any, type(strategy)).declares


def failures(strategy: nn.Module, modalities: Iterable[int] = (1, 2)) -> list[str]:
    """Returns all failures of a strategy without training; masks are checked with these numbers of modalities."""
    found = any_modalities(strategy)
    for count in supported(strategy, modalities):
        found += masks(strategy, count)
    models = [_RandomModel(strategy, m) for m in supported(strategy, (2, 3))]
    return found + declared(strategy, models) + [f for model in models[-1:] for f in jit_is_eager(model)]


def supported(strategy: nn.Module, modalities: Iterable[int]) -> list[int]:
    """Returns the numbers of modalities for which the strategy raises no UserError."""
    return [count for count in modalities if _shapes(strategy, count) is not None]


def any_modalities(strategy: nn.Module) -> list[str]:
    """Returns a failure unless `any_modalities` is declared exactly if M = 1 to 4 raise no UserError."""
    rejected = [str(m) for m in (1, 2, 3, 4) if not supported(strategy, [m])]
    if declaration(strategy).any_modalities == (not rejected):
        return []
    if rejected:
        return [f"declares any_modalities=True, but rejects M={', '.join(rejected)}"]
    return ["declares any_modalities=False, but rejects none of M=1 to 4"]


def masks(strategy: nn.Module, modalities: int) -> list[str]:
    """Returns failures of masking and sharding: influence of masked values, gradients, and non-finite values.

    The strategy is called without the model, which would zero masked tokens. A parameter whose name ends in that of a
    modality is taken to belong to it.
    """
    call = _StrategyCall(strategy, modalities)
    found, where = [], f"M={modalities}"
    none = {m: np.zeros_like(mask) for m, mask in call.real.items()}
    for m in call.names:
        to_params, _, _ = call(call.real | {m: none[m]}, garbage=0.0)
        for path, gradient in jax.tree_util.tree_leaves_with_path(to_params):
            if any(str(part.key).endswith(f"_{m}") for part in path) and gradient.any():
                found.append(f"{where}: parameter {path_name(path)} gets a gradient where {m} is absent in every row")
    for mask, case in ((call.real, "padding or absence"), (none, "all absent")):
        to_params, to_inputs, _ = with_nan = call(mask, garbage=np.nan)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(with_nan)):
            found.append(f"{where}: NaN at masked positions reaches the output or a gradient ({case})")
            continue
        if modalities == 1 and mask is call.real:  # with more modalities, training checks the gradients
            flat = jax.tree_util.tree_leaves_with_path(to_params)
            found += [f"{where}: parameter {path_name(path)} gets no gradient" for path, g in flat if not g.any()]
        for m in call.names:
            if any((given[m][~mask[m]] != 0).any() for given in to_inputs):
                found.append(f"{where}: masked positions of {m} get a gradient ({case})")
        with_7 = call(mask, garbage=7.0)
        if any((x != y).any() for x, y in zip(jax.tree.leaves(with_nan), jax.tree.leaves(with_7), strict=True)):
            found.append(f"{where}: values at masked positions change the output or a gradient ({case})")
    if modalities == 2:
        found += [f"{where}: {failure} in evaluation" for failure in call.evaluation_failures()]
    if modalities == 2 and not found:
        full = call(call.real, garbage=0.0)
        halves = [call(call.real, garbage=0.0, rows=slice(i, i + ROWS // 2)) for i in (0, ROWS // 2)]
        # Relative to the halves, as their gradients may cancel.
        errors = [
            _relative(x - y - z, np.stack((y, z)))
            for x, y, z in zip(*map(jax.tree.leaves, (full[0], *(half[0] for half in halves))), strict=True)
        ]
        outputs = np.concatenate([half[2] for half in halves])
        errors.append(_relative(full[2] - outputs, outputs))
        if max(errors) > SAME:
            found.append(f"{where}: two devices with half the rows each differ from one")
    return found


class _StrategyCall:
    """A strategy without a model, with random parameters and inputs and compiled gradients."""

    def __init__(self, strategy: nn.Module, modalities: int):
        level, width = declaration(strategy).level, _width(strategy)
        self.names: tuple[str, ...] = MODALITIES[:modalities]
        random = np.random.default_rng(0)
        shape = (ROWS, TOKENS, width) if level == "feature" else (ROWS, CLASSES)
        draw = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
        self.inputs = ({m: draw(*shape) for m in self.names},)
        if level == "mixed":
            self.inputs += ({m: draw(ROWS, width) for m in self.names},)
        self.real = {m: _mask(i) if level == "feature" else _mask(i).any(axis=1) for i, m in enumerate(self.names)}
        self.weights = draw(ROWS, width if level == "feature" else CLASSES)

        def apply(function: Any, first: Any, inputs: tuple, mask: Masks, train: bool = True, **more: Any) -> Any:
            features = {"features": inputs[1]} if level == "mixed" else {}
            return function(first, inputs[0], mask, **features, train=train, **more)

        key = jax.random.key(0)
        variables = _perturbed(jax.eval_shape(lambda: apply(strategy.init, key, self.inputs, self.real)))
        self.params = variables.pop("params", {})

        def loss(params: Any, inputs: tuple, mask: Masks, ids: jax.Array, weights: jax.Array) -> tuple:
            out, _ = apply(
                strategy.apply, {**variables, "params": params, "rows": {"id": ids}}, inputs, mask,
                rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"],
            )  # fmt: skip
            out = out.features if level == "feature" else out
            return (out * weights).sum(), out

        def evaluate(params: Any, inputs: tuple, mask: Masks) -> jax.Array:
            out = apply(strategy.apply, {**variables, "params": params}, inputs, mask, train=False)
            return out.features if level == "feature" else out

        self._run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        self._evaluate = jax.jit(evaluate)

    def evaluation_failures(self) -> list[str]:
        """Returns a failure if the values or the number of masked positions change the output in evaluation."""
        found = []
        with_nan, with_7 = (
            self._evaluate(self.params, self._fill_masked(self.real, x), self.real) for x in (np.nan, 7.0)
        )
        if not (np.isfinite(with_nan).all() and np.array_equal(with_nan, with_7)):
            found.append("values at masked positions change the output")
        if any(mask.ndim > 1 for mask in self.real.values()):
            longer = {m: np.pad(mask, ((0, 0), (0, 1))) for m, mask in self.real.items()}
            inputs = tuple({m: np.pad(x, ((0, 0), (0, 1), (0, 0))) for m, x in given.items()} for given in self.inputs)
            with contextlib.suppress(UserError):  # strategies that need a grid reject another number of tokens
                out = self._evaluate(self.params, inputs, longer)
                if not found and _relative(np.asarray(out - with_7), np.asarray(with_7)) > SAME:
                    found.append("one more masked position changes the output")
        return found

    def _fill_masked(self, mask: Masks, garbage: float) -> tuple:
        """Returns the inputs with `garbage` wherever the mask is False."""

        def fill(x: np.ndarray, kept: np.ndarray) -> np.ndarray:
            return np.where(kept[(..., *[None] * (x.ndim - kept.ndim))], x, np.float32(garbage))

        return tuple({m: fill(x, mask[m]) for m, x in given.items()} for given in self.inputs)

    def __call__(self, mask: Masks, garbage: float, rows: slice = slice(None)) -> tuple[Any, tuple, np.ndarray]:
        """Returns the gradients of parameters and inputs, and the output, with `garbage` wherever the mask is False."""
        sliced = jax.tree.map(
            lambda x: x[rows], (self._fill_masked(mask, garbage), mask, np.arange(ROWS), self.weights)
        )
        (to_params, to_inputs), out = jax.device_get(self._run(self.params, *sliced))
        return to_params, to_inputs, out


class _RandomModel:
    """A model with random parameters and tokens, compiled once for all checks that compare its logits."""

    def __init__(self, strategy: nn.Module, modalities: int):
        self.names: tuple[str, ...] = MODALITIES[:modalities]
        random = np.random.default_rng(1)
        self.tokens, self.other = (
            {m: random.normal(size=(ROWS, TOKENS, _width(strategy))).astype(np.float32) for m in self.names}
            for _ in range(2)
        )
        self.mask = {m: _mask(i) | (np.arange(ROWS) < 2)[:, None] for i, m in enumerate(self.names)}
        self.variables = _perturbed(cast(dict, _shapes(strategy, modalities)))
        model = model_of(strategy, modalities)

        def logits(variables: dict, tokens: Tokens, mask: Masks) -> jax.Array:
            batch = as_batch(tokens, mask, jnp.zeros(ROWS, jnp.int32))
            out: Any = model.apply(variables, batch, train=False)
            return out.logits[TASK]

        self.eager = logits
        self._jitted = jax.jit(logits)

    def __call__(self, tokens: Tokens, mask: Masks, variables: dict | None = None) -> np.ndarray:
        """Returns the logit of class 1 minus that of class 0 `[B]`, which determines the prediction."""
        logits = np.asarray(self._jitted(variables or self.variables, tokens, mask), np.float64)
        return logits[:, 1] - logits[:, 0]


def declared(strategy: nn.Module, models: list[_RandomModel]) -> list[str]:
    """Returns a failure for each of additive, symmetric and needs_tokens whose declaration is false."""
    declares = declaration(strategy)
    measured = {
        "additive": all(_interaction(model) < DIFFERENT for model in models),
        "symmetric": all(_renamed(model) < DIFFERENT for model in models),
        "needs_tokens": any(_pooled(model) > DIFFERENT for model in models),
    }
    found = [
        f"declares {name}={getattr(declares, name)}, but behaves as {name}={value}"
        for name, value in measured.items()
        if value != getattr(declares, name)
    ]
    if declares.additive and declares.synergy:
        found.append("declares additive and synergy, which exclude each other")
    return found


def jit_is_eager(model: _RandomModel) -> list[str]:
    """Returns a failure if the compiled logits differ from those computed without jit."""
    eager = np.asarray(model.eager(model.variables, model.tokens, model.mask), np.float64)
    change = _relative(eager[:, 1] - eager[:, 0] - model(model.tokens, model.mask), eager)
    return [f"jit differs from eager by {change:.1e} of the largest logit"] if not change <= SAME else []


def _interaction(model: _RandomModel) -> float:
    """Returns the largest mixed second difference over pairs of modalities, relative to the logits."""
    unmasked = {m: np.ones_like(mask) for m, mask in model.mask.items()}
    largest = 0.0
    for pair in itertools.combinations(model.names, 2):
        out = [
            model(model.tokens | {m: model.other[m] for m, change in zip(pair, changed, strict=True) if change},
                  unmasked)
            for changed in itertools.product((False, True), repeat=2)
        ]  # fmt: skip
        largest = max(largest, _relative(out[0] - out[1] - out[2] + out[3], np.stack(out)))
    return largest


def _renamed(model: _RandomModel) -> float:
    """Returns the relative change of the logits when the names of modalities and of their parameters are rotated."""
    new = dict(zip(model.names, model.names[1:] + model.names[:1], strict=True))
    paths = dict(jax.tree_util.tree_leaves_with_path(model.variables))
    named = {tuple(part.key for part in path): leaf for path, leaf in paths.items()}
    moved = {tuple(_rename(part, new) for part in path): leaf for path, leaf in named.items()}
    if {k: v.shape for k, v in moved.items()} != {k: v.shape for k, v in named.items()}:
        return np.inf
    variables = jax.tree_util.tree_map_with_path(
        lambda path, _: moved[tuple(part.key for part in path)], model.variables
    )
    rename = lambda tree: {new[m]: x for m, x in tree.items()}  # noqa: E731
    before = model(model.tokens, model.mask)
    return _relative(model(rename(model.tokens), rename(model.mask), variables) - before, before)


def _rename(part: str, new: dict[str, str]) -> str:
    for m, other in new.items():
        if part == m or part.endswith(f"_{m}"):
            return part[: -len(m)] + other
    return part


def _pooled(model: _RandomModel) -> float:
    """Returns the relative change of the logits when each modality's tokens are replaced by one token, their mean."""
    tokens, mask = {}, {}
    for m, real in model.mask.items():
        mean = np.where(real[:, :, None], model.tokens[m], 0).sum(axis=1) / np.maximum(real.sum(axis=1), 1)[:, None]
        tokens[m] = np.zeros_like(model.tokens[m])
        tokens[m][:, 0] = mean
        mask[m] = np.zeros_like(real)
        mask[m][:, 0] = real.any(axis=1)
    before = model(model.tokens, model.mask)
    return _relative(model(tokens, mask) - before, before)


def _relative(difference: np.ndarray, values: np.ndarray) -> float:
    return float(np.abs(difference).max() / max(np.abs(values).max(), 1e-12))


@functools.lru_cache(maxsize=8)  # several checks of a strategy need them
def _shapes(strategy: nn.Module, modalities: int) -> dict | None:
    """Returns the shapes of the model's variables, None if the strategy rejects this number of modalities."""
    names = MODALITIES[:modalities]
    tokens = {m: jnp.zeros((ROWS, TOKENS, _width(strategy))) for m in names}
    batch = as_batch(tokens, {m: jnp.ones((ROWS, TOKENS), bool) for m in names}, jnp.zeros(ROWS, jnp.int32))
    try:
        return jax.eval_shape(lambda: model_of(strategy, modalities).init(jax.random.key(0), batch, train=False))
    except UserError:
        return None


def _perturbed(shapes: dict) -> dict:
    """Returns variables of these shapes with random parameters, around 1 for scales, so that none is exactly 0 or 1."""
    random = np.random.default_rng(2)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[0].key == "batch_stats":
            return np.full(leaf.shape, float(path[-1].key == "var"), np.float32)
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.3 * random.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _mask(modality: int) -> np.ndarray:
    """Returns a mask `[B, N]`: row 0 unpadded, one row per modality without it, the last row empty, others padded."""
    mask = np.arange(TOKENS) < 1 + (np.arange(ROWS)[:, None] + modality) % TOKENS
    mask[0] = True
    mask[1 + modality] = False
    mask[ROWS - 1] = False
    return mask


def _width(strategy: nn.Module) -> int:
    return getattr(strategy, "width", 16)
