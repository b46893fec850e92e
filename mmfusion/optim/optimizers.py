"""Optimizers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmfusion.errors import UserError
from mmfusion.optim.freezing import NOTHING, Freezing

SEPARATE = ("auxiliaries_", "probes_")  # modules beside the model: of auxiliary objectives, and probes


def make(config: Mapping, freezing: Freezing = NOTHING) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer that a config's `name`, `clip_norm` and own options describe.

    Weight decay spares parameters of fewer than two axes (biases, norms). Clipping is by the global norm of the summed
    gradients. Parameters of auxiliary objectives and probes are clipped by a norm of their own, so that they do not
    shorten the steps of the model; so are those of encoders that are frozen at the extra argument `step`.

    Args:
      config: `name`, `learning_rate` (initial: each update has its own), `clip_norm` (0 is off), and every key of
        `options(name)`.
      freezing: which parameters are frozen at which steps.

    Raises:
      UserError: the name is unknown or an option is missing.
    """
    name = config["name"]
    missing = [key for key in options(name) if key not in config]
    if missing:
        raise UserError(f"is missing; {name!r} reads {', '.join(options(name))}", path=f"config.optim.{missing[0]}")
    build, _ = OPTIMIZERS[name]
    own = {key: float(config[key]) for key in options(name)}
    clip_norm = float(config["clip_norm"])

    def inner(learning_rate):
        clip = clip_by_group_norm(clip_norm, freezing) if clip_norm else optax.identity()
        return optax.chain(clip, build(learning_rate=learning_rate, **own))

    return optax.inject_hyperparams(inner, hyperparam_dtype=jnp.float32)(learning_rate=float(config["learning_rate"]))


def clip_by_group_norm(max_norm: float, freezing: Freezing = NOTHING) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that clips the gradients of the model, of modules beside it, and of what is frozen.

    Each of the three groups is clipped by its own global norm.
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        separate = [jax.tree_util.keystr(path[:1], simple=True).startswith(SEPARATE) for path, _ in leaves]
        # False, or a scalar bool: what is never frozen costs nothing.
        frozen = jax.tree.leaves(freezing.frozen_mask(updates, extra["step"])) if freezing else [False] * len(leaves)
        squares = [jnp.sum(jnp.square(x)) for _, x in leaves]

        def factor(members):
            own = [jnp.where(m, square, 0.0) for m, square in zip(members, squares, strict=True) if m is not False]
            norm = jnp.sqrt(sum(own))
            return jnp.where(norm < max_norm, 1.0, max_norm / norm)

        of_separate, of_frozen = factor(separate), factor(frozen)
        of_model = factor([not s if f is False else jnp.logical_not(f) for s, f in zip(separate, frozen, strict=True)])
        factors = [
            of_separate if s else of_model if f is False else jnp.where(f, of_frozen, of_model)
            for s, f in zip(separate, frozen, strict=True)
        ]
        clipped = [(x * one).astype(x.dtype) for (_, x), one in zip(leaves, factors, strict=True)]
        return jax.tree.unflatten(tree, clipped), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def options(name: str) -> dict[str, float]:
    """Returns the default options of an optimizer, by name; raises UserError if the name is unknown."""
    return dict(lookup(OPTIMIZERS, name, "config.optim.name")[1])


def _decays(params):
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def _sgd(learning_rate, weight_decay, momentum=None):
    return optax.chain(optax.add_decayed_weights(weight_decay, _decays), optax.sgd(learning_rate, momentum))


def _adamw(learning_rate, b1, b2, weight_decay):
    return optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay, mask=_decays)


def _lion(learning_rate, b1, b2, weight_decay):
    return optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=_decays)


# weight_decay is multiplied by the learning rate: a step takes the share learning_rate x weight_decay of each kernel.
OPTIMIZERS = {
    "sgd": (_sgd, {"weight_decay": 0.0}),
    "momentum": (_sgd, {"momentum": 0.9, "weight_decay": 0.0}),
    "adam": (optax.adam, {"b1": 0.9, "b2": 0.999}),
    "adamw": (_adamw, {"b1": 0.9, "b2": 0.999, "weight_decay": 1e-4}),
    "lion": (_lion, {"b1": 0.9, "b2": 0.99, "weight_decay": 1e-3}),
}


def lookup(table: Mapping, name: str, path: str):
    if name not in table:
        raise UserError("unknown name", path=path, value=name, choices=table)
    return table[name]
