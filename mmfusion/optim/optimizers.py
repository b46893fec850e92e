"""Optimizers."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from mmfusion.errors import UserError

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
    return dict(lookup(OPTIMIZERS, name, "optim.name")[1])


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


def lookup(table: Mapping, name: str, what: str):
    if name not in table:
        raise UserError(f"{what} {name!r} is unknown; choose one of {', '.join(table)}")
    return table[name]
