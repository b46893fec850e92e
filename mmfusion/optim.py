"""Optimizers, and learning rates evaluated on the host: the rate is an argument of the step, so it never recompiles."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmfusion.errors import UserError

# Layers without a number that read the input; others without one come last, since they make the tokens.
READS_INPUT = (
    "embed",
    "place",
    "segment",
    "norm_embed",
    "patches",
    "class",
    "positions",
    "bands",
    "conv_stem",
    "norm_stem",
)

ASIDE = ("auxiliaries_", "probes_")  # modules beside the model: of auxiliary objectives, and what only watches


def make(config: Mapping) -> optax.GradientTransformation:
    """Returns the optimizer that a config's `name`, `clip_norm` and own options describe.

    Weight decay spares parameters of fewer than two axes (biases, norms). Clipping is by the global norm of the
    gradients it is given, so they must be summed over devices and micro-batches before; one non-finite gradient would
    make all of them non-finite, so the step must skip such an update. What auxiliary objectives and probes have for
    themselves is clipped by its own norm: however large, it does not shorten the steps of the model. Nor does what
    `update` is told is `held`, a tree of bool like the gradients, since it does not learn yet.

    Args:
      config: `name`, `learning_rate` (initial; see `with_learning_rate`), `clip_norm` (0 is off), and every key of
        `options(name)`.

    Raises:
      UserError: if the name is unknown or an option is missing.
    """
    name = config["name"]
    missing = [key for key in options(name) if key not in config]
    if missing:
        raise UserError(f"optim.{missing[0]} is missing; optim.name={name!r} reads {', '.join(options(name))}")
    build, _ = OPTIMIZERS[name]
    own = {key: float(config[key]) for key in options(name)}
    clip = float(config["clip_norm"])

    def inner(learning_rate):
        return optax.chain(_clipped(clip) if clip else optax.identity(), build(learning_rate=learning_rate, **own))

    return optax.inject_hyperparams(inner, hyperparam_dtype=jnp.float32)(learning_rate=float(config["learning_rate"]))


def _clipped(limit: float) -> optax.GradientTransformationExtraArgs:
    """Returns what clips the gradients of the model, of what stands beside it, and of what is held, each for itself."""

    def clip(updates, state, params=None, *, held=None, **_):
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        aside = [jax.tree_util.keystr(path[:1], simple=True).startswith(ASIDE) for path, _ in leaves]
        # Of each leaf False, or a scalar bool: what never waits costs nothing.
        waits = [False] * len(leaves) if held is None else jax.tree.leaves(held)
        squares = [jnp.sum(jnp.square(x)) for _, x in leaves]

        def factor(counts):
            own = [jnp.where(one, square, 0.0) for one, square in zip(counts, squares, strict=True) if one is not False]
            norm = jnp.sqrt(sum(own))
            return jnp.where(norm < limit, 1.0, limit / norm)

        beside = factor(aside)
        model = factor([not a if w is False else jnp.logical_not(w) for a, w in zip(aside, waits, strict=True)])
        waiting = factor(waits)
        factors = [
            beside if a else model if w is False else jnp.where(w, waiting, model)
            for a, w in zip(aside, waits, strict=True)
        ]
        shorter = [(x * one).astype(x.dtype) for (_, x), one in zip(leaves, factors, strict=True)]
        return jax.tree.unflatten(tree, shorter), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clip)


def options(name: str) -> dict[str, float]:
    """Returns the default options of an optimizer, each of which it reads; raises UserError if there is none such."""
    return dict(_lookup(OPTIMIZERS, name, "optim.name")[1])


def with_learning_rate(opt_state, learning_rate: float | jax.Array):
    """Returns the optimizer state with the learning rate of the next update, a scalar that may be traced."""
    rate = jnp.asarray(learning_rate, jnp.float32)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": rate})


def _decays(params):
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def _sgd(learning_rate, weight_decay, momentum=None):
    return optax.chain(optax.add_decayed_weights(weight_decay, _decays), optax.sgd(learning_rate, momentum))


def _adamw(learning_rate, b1, b2, weight_decay):
    return optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay, mask=_decays)


def _lion(learning_rate, b1, b2, weight_decay):
    return optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=_decays)


OPTIMIZERS = {
    "sgd": (_sgd, {"weight_decay": 0.0}),
    "momentum": (_sgd, {"momentum": 0.9, "weight_decay": 0.0}),
    "adam": (optax.adam, {"b1": 0.9, "b2": 0.999}),
    "adamw": (_adamw, {"b1": 0.9, "b2": 0.999, "weight_decay": 1e-4}),
    "lion": (_lion, {"b1": 0.9, "b2": 0.99, "weight_decay": 1e-3}),
}


def learning_rate(config: Mapping, peak: float, step: int, total_steps: int, scale: float = 1.0) -> float:
    """Returns the learning rate of update `step` (0-based), a Python float for the step's argument.

    Args:
      config: `name` and every key of `schedule_options(name)`.
      peak: the rate after warmup.
      step: updates done so far.
      total_steps: updates of the whole run.
      scale: the plateau state's `scale`.

    Raises:
      UserError: if the name is unknown or an option is missing.
    """
    name = config["name"]
    missing = [key for key in schedule_options(name) if key not in config]
    if missing:
        raise UserError(f"schedule option {missing[0]} is missing; {name!r} reads {', '.join(schedule_options(name))}")
    return float(peak * scale * SCHEDULES[name][0](config, step, total_steps))


def schedule_options(name: str) -> dict:
    """Returns the default options of a schedule, each of which it reads; raises UserError if there is none such."""
    return dict(_lookup(SCHEDULES, name, "schedule name")[1])


def _warmup(config, step, total_steps):
    # The first update already learns, and the one before the warmup's end has the peak rate.
    return min(1.0, (step + 1) / config["warmup_steps"]) if config["warmup_steps"] else 1.0


def _warmup_cosine(config, step, total_steps):
    start, end = config["warmup_steps"], config["end_factor"]
    progress = min(max((step - start) / max(total_steps - start, 1), 0.0), 1.0)
    return _warmup(config, step, total_steps) * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


def _step(config, step, total_steps):
    passed = sum(step >= (b * total_steps if b < 1 else b) for b in config["boundaries"])
    return config["factor"] ** passed


# warmup_steps in updates, rising linearly from peak/warmup_steps; end_factor of the peak at total_steps; boundaries
# below 1 are shares of the run, from 1 on updates, and each multiplies the rate by factor; plateau: see plateau_update.
SCHEDULES = {
    "warmup_cosine": (_warmup_cosine, {"warmup_steps": 0, "end_factor": 0.0}),
    "constant": (_warmup, {"warmup_steps": 0}),
    "step": (_step, {"boundaries": (0.5, 0.75), "factor": 0.1}),
    "plateau": (_warmup, {"warmup_steps": 0, "factor": 0.5, "patience": 5, "min_delta": 0.0, "min_scale": 0.0}),
}


def plateau_start() -> dict:
    """Returns the plateau state before any evaluation: plain numbers that a checkpoint's JSON can hold."""
    return {"scale": 1.0, "best": None, "waited": 0}


def plateau_update(state: Mapping, value: float | None, config: Mapping, higher_is_better: bool = False) -> dict:
    """Returns the plateau state after an evaluation; `scale` multiplies the learning rate from then on.

    Args:
      state: what the last call returned, or `plateau_start()`.
      value: the watched score; None or a non-finite value is no improvement.
      config: after `patience` evaluations in a row none of which beats the best by more than `min_delta`, `scale`
        is multiplied by `factor`, down to `min_scale`.
      higher_is_better: the score's direction.
    """
    finite = value is not None and math.isfinite(value)
    sign = 1 if higher_is_better else -1
    if finite and (state["best"] is None or sign * (value - state["best"]) > config["min_delta"]):
        return {"scale": state["scale"], "best": float(value), "waited": 0}
    if state["waited"] + 1 < config["patience"]:
        return {**state, "waited": state["waited"] + 1}
    return {**state, "scale": max(state["scale"] * config["factor"], config["min_scale"]), "waited": 0}


def _lookup(table: Mapping, name: str, what: str):
    if name not in table:
        raise UserError(f"{what} {name!r} is unknown; choose one of {', '.join(table)}")
    return table[name]


def slowed(encoders: Mapping[str, Any]) -> Callable[[Any], Any] | None:
    """Returns what makes the updates of slowed encoders smaller; None where there is none.

    The last layer of an encoder with `layer_decay` d learns at the whole rate, the one before at d, then d², and so on
    (Howard & Ruder 2018, arXiv:1801.06146).
    """
    decays = {f"encoders_{m}": options.layer_decay for m, options in encoders.items() if options.layer_decay != 1}
    if not decays:
        return None

    def scale(updates: Any) -> Any:
        result = dict(updates)
        for name, decay in decays.items():
            order = sorted({depth(layer) for layer in updates[name]}, reverse=True)
            times = {layer: decay ** order.index(depth(layer)) for layer in updates[name]}
            result[name] = {
                layer: jax.tree.map(lambda x, factor=times[layer]: x * factor, leaves)
                for layer, leaves in updates[name].items()
            }
        return result

    return scale


# Encoders whose layers' names do not say their order, or that branch.
UNORDERED = (
    "cnn_rnn", "inception_v1", "inception_v3", "textcnn", "frame_cnn", "table_mlp", "ft_transformer",
    "knowledge_attention",
)  # fmt: skip


def depth(name: str) -> tuple[float, ...]:
    """Returns what a layer of an encoder sorts by: its numbers; before them what reads the input, last the rest."""
    if name in READS_INPUT:
        return (-1.0,)
    if name == "top":  # dense layers, of which tokens are made
        return (1e6,)
    numbers = tuple(float(number) for number in re.findall(r"\d+", name))
    return numbers or (float("inf"),)
