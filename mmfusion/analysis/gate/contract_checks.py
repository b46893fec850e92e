"""What a strategy declares, checked both ways without training, and what every strategy must hold.

Each check returns its failures in words, none where the strategy is as it should be.

B batch · M modalities · N tokens · D width · C classes
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable
from typing import Any, cast

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.analysis.gate.synthetic_tasks import MODALITIES
from mmfusion.data.batch import Batch
from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration
from mmfusion.models.model import FusionModel

TASK = "label"
ROWS, TOKENS, CLASSES = 8, 4, 2  # four tokens are a square grid, too
SAME, DIFFERENT = 1e-5, 1e-4  # of the largest number compared: rounding stays below, an effect lies above

Tokens = dict[str, Any]  # modality -> array [B, N, D] of NumPy or JAX
Masks = dict[str, Any]  # modality -> array [B, N] of NumPy or JAX


class Given(nn.Module):
    """The encoder that passes tokens and mask through."""

    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns its input `[B, N, D]` and `[B, N]`."""
        del train
        return x, mask


def model_of(strategy: nn.Module, modalities: int) -> FusionModel:
    """Returns the model of a strategy over the first M modalities, which are given as tokens."""
    encoders = flax.core.FrozenDict({m: Given() for m in MODALITIES[:modalities]})
    return FusionModel(encoders=encoders, fusion=strategy, tasks=((TASK, CLASSES),))


def as_batch(tokens: Tokens, mask: Masks, label: jax.Array) -> Batch:
    """Returns a batch whose inputs are tokens `[B, N, D]` with masks `[B, N]` and labels `[B]`."""
    rows = label.shape[0]
    return Batch(
        inputs=tokens,
        mask=mask,
        present={m: real.any(axis=1) for m, real in mask.items()},
        targets={TASK: label},
        weight=jnp.ones(rows),
        id=jnp.arange(rows),
    )


def path_name(path: tuple) -> str:
    """Returns a parameter's path, joined by slashes."""
    return "/".join(str(getattr(part, "key", part)) for part in path)


def declaration(strategy: nn.Module) -> Declaration:
    """Returns what a strategy's class declares."""
    return cast(Any, type(strategy)).declares


def failures(strategy: nn.Module, modalities: Iterable[int] = (1, 2)) -> list[str]:
    """Returns every failure of a strategy that shows without training, masks with these numbers of modalities."""
    found = any_modalities(strategy)
    for count in taken(strategy, modalities):
        found += masks(strategy, count)
    several = [_Random(strategy, m) for m in taken(strategy, (2, 3))]
    return found + declared(strategy, several) + [f for random in several[-1:] for f in jit_is_eager(random)]


def taken(strategy: nn.Module, modalities: Iterable[int]) -> list[int]:
    """Returns which numbers of modalities the strategy does not refuse by a UserError."""
    return [count for count in modalities if _shapes(strategy, count) is not None]


def any_modalities(strategy: nn.Module) -> list[str]:
    """Returns a failure unless M = 1 to 4 are taken where declared, and one is refused by a UserError elsewhere."""
    refused = [str(m) for m in (1, 2, 3, 4) if not taken(strategy, [m])]
    if declaration(strategy).any_modalities == (not refused):
        return []
    if refused:
        return [f"declares any_modalities=True, and refuses M={', '.join(refused)}"]
    return ["declares any_modalities=False, and refuses none of M=1 to 4"]


def masks(strategy: nn.Module, modalities: int) -> list[str]:
    """Returns failures of padding, absence and division: influence, gradients, and numbers that are not finite.

    The strategy is called by itself, since the model would zero what is masked before it. Parameters whose name ends
    in a modality's are taken for that one's.
    """
    call = _Called(strategy, modalities)
    found, where = [], f"M={modalities}"
    none = {m: np.zeros_like(mask) for m, mask in call.real.items()}
    for m in call.names:
        to_params, _, _ = call(call.real | {m: none[m]}, garbage=0.0)
        for path, gradient in jax.tree_util.tree_leaves_with_path(to_params):
            if any(str(part.key).endswith(f"_{m}") for part in path) and gradient.any():
                found.append(f"{where}: parameter {path_name(path)} gets a gradient where {m} is absent in every row")
    for mask, case in ((call.real, "padding or absence"), (none, "all absent")):
        to_params, to_inputs, _ = spoilt = call(mask, garbage=np.nan)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(spoilt)):
            found.append(f"{where}: NaN under the mask reaches the output or a gradient ({case})")
            continue
        if modalities == 1 and mask is call.real:  # those of more are seen while training
            flat = jax.tree_util.tree_leaves_with_path(to_params)
            found += [f"{where}: parameter {path_name(path)} gets no gradient" for path, g in flat if not g.any()]
        for m in call.names:
            if any((given[m][~mask[m]] != 0).any() for given in to_inputs):
                found.append(f"{where}: masked positions of {m} get a gradient ({case})")
        again = call(mask, garbage=7.0)
        if any((x != y).any() for x, y in zip(jax.tree.leaves(spoilt), jax.tree.leaves(again), strict=True)):
            found.append(f"{where}: what stands under the mask changes the output or a gradient ({case})")
    if modalities == 2:
        found += [f"{where}: {failure} in evaluation" for failure in call.evaluated()]
    if modalities == 2 and not found:
        whole = call(call.real, garbage=0.0)
        parts = [call(call.real, garbage=0.0, rows=slice(i, i + ROWS // 2)) for i in (0, ROWS // 2)]
        # Relative to the parts, which may cancel each other.
        apart = [
            _relative(x - y - z, np.stack((y, z)))
            for x, y, z in zip(*map(jax.tree.leaves, (whole[0], *(part[0] for part in parts))), strict=True)
        ]
        outputs = np.concatenate([part[2] for part in parts])
        apart.append(_relative(whole[2] - outputs, outputs))
        if max(apart) > SAME:
            found.append(f"{where}: two devices with half the rows each differ from one")
    return found


class _Called:
    """A strategy by itself with random parameters and inputs, its gradients compiled."""

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

    def evaluated(self) -> list[str]:
        """Returns what is wrong with the output in evaluation: what stands under the mask, or how much, changes it."""
        found = []
        nan, seven = (self._evaluate(self.params, self._spoilt(self.real, g), self.real) for g in (np.nan, 7.0))
        if not (np.isfinite(nan).all() and np.array_equal(nan, seven)):
            found.append("what stands under the mask changes the output")
        if any(mask.ndim > 1 for mask in self.real.values()):
            longer = {m: np.pad(mask, ((0, 0), (0, 1))) for m, mask in self.real.items()}
            inputs = tuple({m: np.pad(x, ((0, 0), (0, 1), (0, 0))) for m, x in given.items()} for given in self.inputs)
            with contextlib.suppress(UserError):  # a grid of tokens cannot have one more
                out = self._evaluate(self.params, inputs, longer)
                if not found and _relative(np.asarray(out - seven), np.asarray(seven)) > SAME:
                    found.append("one more masked position changes the output")
        return found

    def _spoilt(self, mask: Masks, garbage: float) -> tuple:
        """Returns the inputs with garbage wherever the mask is False."""

        def spoil(x: np.ndarray, kept: np.ndarray) -> np.ndarray:
            return np.where(kept[(..., *[None] * (x.ndim - kept.ndim))], x, np.float32(garbage))

        return tuple({m: spoil(x, mask[m]) for m, x in given.items()} for given in self.inputs)

    def __call__(self, mask: Masks, garbage: float, rows: slice = slice(None)) -> tuple[Any, tuple, np.ndarray]:
        """Returns the gradients by parameters and inputs, and the output, with garbage wherever the mask is False."""
        cut = jax.tree.map(lambda x: x[rows], (self._spoilt(mask, garbage), mask, np.arange(ROWS), self.weights))
        (to_params, to_inputs), out = jax.device_get(self._run(self.params, *cut))
        return to_params, to_inputs, out


class _Random:
    """A model with random parameters and tokens, compiled once for the checks that compare its logits."""

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
        """Returns the logits of class 1 over class 0 `[B]`, which is all that a prediction depends on."""
        logits = np.asarray(self._jitted(variables or self.variables, tokens, mask), np.float64)
        return logits[:, 1] - logits[:, 0]


def declared(strategy: nn.Module, several: list[_Random]) -> list[str]:
    """Returns a failure for each of additive, symmetric and needs_tokens that is not as declared."""
    declares = declaration(strategy)
    seen = {
        "additive": all(_interaction(random) < DIFFERENT for random in several),
        "symmetric": all(_renamed(random) < DIFFERENT for random in several),
        "needs_tokens": any(_pooled(random) > DIFFERENT for random in several),
    }
    found = [
        f"declares {what}={getattr(declares, what)}, and is {'' if is_so else 'not '}so"
        for what, is_so in seen.items()
        if is_so != getattr(declares, what)
    ]
    if declares.additive and declares.synergy:
        found.append("declares additive and synergy, which exclude each other")
    return found


def jit_is_eager(random: _Random) -> list[str]:
    """Returns a failure where the compiled logits differ from those computed operation by operation."""
    eager = np.asarray(random.eager(random.variables, random.tokens, random.mask), np.float64)
    change = _relative(eager[:, 1] - eager[:, 0] - random(random.tokens, random.mask), eager)
    return [f"jit differs from eager by {change:.1e} of the largest logit"] if not change <= SAME else []


def _interaction(random: _Random) -> float:
    """Returns the largest mixed second difference of any two modalities, relative to the logits."""
    everything = {m: np.ones_like(mask) for m, mask in random.mask.items()}
    largest = 0.0
    for pair in itertools.combinations(random.names, 2):
        out = [
            random(random.tokens | {m: random.other[m] for m, change in zip(pair, changed, strict=True) if change},
                   everything)
            for changed in itertools.product((False, True), repeat=2)
        ]  # fmt: skip
        largest = max(largest, _relative(out[0] - out[1] - out[2] + out[3], np.stack(out)))
    return largest


def _renamed(random: _Random) -> float:
    """Returns how much the logits change when every modality, with its parameters, takes the next one's name."""
    new = dict(zip(random.names, random.names[1:] + random.names[:1], strict=True))
    paths = dict(jax.tree_util.tree_leaves_with_path(random.variables))
    named = {tuple(part.key for part in path): leaf for path, leaf in paths.items()}
    moved = {tuple(_rename(part, new) for part in path): leaf for path, leaf in named.items()}
    if {k: v.shape for k, v in moved.items()} != {k: v.shape for k, v in named.items()}:
        return np.inf
    variables = jax.tree_util.tree_map_with_path(
        lambda path, _: moved[tuple(part.key for part in path)], random.variables
    )
    rename = lambda tree: {new[m]: x for m, x in tree.items()}  # noqa: E731
    before = random(random.tokens, random.mask)
    return _relative(random(rename(random.tokens), rename(random.mask), variables) - before, before)


def _rename(part: str, new: dict[str, str]) -> str:
    for m, other in new.items():
        if part == m or part.endswith(f"_{m}"):
            return part[: -len(m)] + other
    return part


def _pooled(random: _Random) -> float:
    """Returns how much the logits change when each modality's tokens become one, their mean."""
    tokens, mask = {}, {}
    for m, real in random.mask.items():
        mean = np.where(real[:, :, None], random.tokens[m], 0).sum(axis=1) / np.maximum(real.sum(axis=1), 1)[:, None]
        tokens[m] = np.zeros_like(random.tokens[m])
        tokens[m][:, 0] = mean
        mask[m] = np.zeros_like(real)
        mask[m][:, 0] = real.any(axis=1)
    before = random(random.tokens, random.mask)
    return _relative(random(tokens, mask) - before, before)


def _relative(difference: np.ndarray, values: np.ndarray) -> float:
    return float(np.abs(difference).max() / max(np.abs(values).max(), 1e-12))


@functools.lru_cache(maxsize=8)  # one strategy's: many checks ask
def _shapes(strategy: nn.Module, modalities: int) -> dict | None:
    """Returns the shapes of the model's variables, None where the strategy refuses so many modalities."""
    names = MODALITIES[:modalities]
    tokens = {m: jnp.zeros((ROWS, TOKENS, _width(strategy))) for m in names}
    batch = as_batch(tokens, {m: jnp.ones((ROWS, TOKENS), bool) for m in names}, jnp.zeros(ROWS, jnp.int32))
    try:
        return jax.eval_shape(lambda: model_of(strategy, modalities).init(jax.random.key(0), batch, train=False))
    except UserError:
        return None


def _perturbed(shapes: dict) -> dict:
    """Returns variables of these shapes with random parameters, around 1 for scales: none is at a special point."""
    random = np.random.default_rng(2)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[0].key == "batch_stats":
            return np.full(leaf.shape, float(path[-1].key == "var"), np.float32)
        near = 1.0 if path[-1].key == "scale" else 0.0
        return (near + 0.3 * random.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _mask(modality: int) -> np.ndarray:
    """Returns a mask `[B, N]`: row 0 whole, one row a modality without it, one without any, the rest padded."""
    mask = np.arange(TOKENS) < 1 + (np.arange(ROWS)[:, None] + modality) % TOKENS
    mask[0] = True
    mask[1 + modality] = False
    mask[ROWS - 1] = False
    return mask


def _width(strategy: nn.Module) -> int:
    return getattr(strategy, "width", 16)
