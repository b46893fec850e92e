"""What every fusion strategy declares and returns, and how it pools its tokens.

A feature-level strategy is called with `(tokens: dict[m, [B, N_m, D]], mask: dict[m, [B, N_m]], *, train) -> Fused`.
A decision-level one (`level="decision"`) is called with `(logits: dict[m, [B, C]], present: dict[m, [B]], *, train)
-> [B, C]`; one that reads features beside the logits (`level="mixed"`) is given them as the keyword
`features: dict[m, [B, D]]`, each modality's masked mean. Modalities are taken in sorted order, as jit sorts
dictionaries; one that is absent (all its positions masked) contributes exactly nothing.

B batch · M modalities · N tokens · D width · C outputs of a task
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from mmfusion.models.layers import masked_mean, masked_softmax


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a strategy says of itself; the known-answer gate checks `additive` to `needs_tokens` both ways.

    Attributes:
      family: its family, such as `bilinear`.
      paper: where it comes from, with the arXiv id; empty for what has no paper.
      level: `feature`, `decision` or `mixed` (see above).
      additive: the logits are a sum of functions of one modality each.
      synergy: it learns what no modality tells alone, such as XOR.
      symmetric: renaming modalities, with the parameters whose names end in theirs, changes nothing; parameters of
        pairs of modalities are not renamed, so strategies that have any do not claim it.
      any_modalities: it takes any number of modalities from one up.
      needs_tokens: it reads the tokens themselves and not only each modality's masked mean.
      unimodal_loss: the loss also scores each modality's own logits, where that modality is present (what the
        strategy's static method `unimodal(logits)` makes of them, where it has one).
      classes_only: it fuses what is known of classes that exclude each other, so no other kind of task.
    """

    family: str
    paper: str = ""
    level: str = "feature"
    additive: bool = False
    synergy: bool = True
    symmetric: bool = False
    any_modalities: bool = True
    needs_tokens: bool = False
    unimodal_loss: bool = False
    classes_only: bool = False


@flax.struct.dataclass
class Fused:
    """The result of a feature-level fusion.

    Attributes:
      features: `[B, D]`.
      attention: weights `[B, heads, N_query, N_key]` by (query modality, key modality); empty without attention.
    """

    features: jax.Array
    attention: dict[tuple[str, str], jax.Array]


def pool(tokens: dict[str, jax.Array], mask: dict[str, jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Returns the masked mean `[B, D]` of each modality, in sorted order, and which are present `[B, M]`."""
    names = sorted(tokens)
    present = jnp.stack([mask[m].any(axis=1) for m in names], axis=1)  # [B, M]
    return [masked_mean(tokens[m], mask[m]) for m in names], present


def learned_weights(module: nn.Module, names: list[str], present: jax.Array) -> jax.Array:
    """Returns the softmax `[B, M]` over the `present [B, M]` modalities of one scalar of `module` for each."""
    scores = jnp.stack([module.param(f"score_{m}", nn.initializers.zeros, ()) for m in names])
    return masked_softmax(jnp.broadcast_to(scores, present.shape), present)


def project_each(
    names: list[str],
    inputs: list[jax.Array],
    shape: int | tuple[int, ...],
    dtype: Any,
    prefix: str = "project",
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros,
) -> list[jax.Array]:
    """Returns W_m x_m + b_m `[B, *shape]` of each modality, by layers named after it; call it in a compact method."""
    return [
        nn.DenseGeneral(shape, bias_init=bias_init, dtype=dtype, name=f"{prefix}_{m}")(x)
        for m, x in zip(names, inputs, strict=True)
    ]
