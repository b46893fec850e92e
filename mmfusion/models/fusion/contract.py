"""The interface of fusion strategies: call signatures, declarations and pooling.

A feature-level strategy is called with `(tokens: dict[m, [B, N_m, D]], mask: dict[m, [B, N_m]], *, train) -> Fused`.
A decision-level strategy (`level="decision"`) is called with `(logits: dict[m, [B, C]], present: dict[m, [B]], *,
train) -> [B, C]`. A strategy on features and logits (`level="mixed"`) also receives the keyword argument
`features: dict[m, [B, D]]`, each modality's masked mean. Modalities are processed in sorted order, as jit sorts
dictionaries. An absent modality, whose positions are all masked, contributes exactly nothing.

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
    """Declared properties of a strategy; the known-answer gate checks `additive` to `needs_tokens` both ways.

    Attributes:
      family: family of the strategy, such as `bilinear`.
      paper: source of the method: arXiv id, DOI or OpenReview id; empty without a paper.
      level: `feature`, `decision` or `mixed` (see above).
      additive: the logits are a sum of functions of one modality each.
      synergy: the strategy learns synergistic information, which no single modality carries, such as XOR.
      symmetric: renaming modalities, and the parameters whose names end in theirs, does not change the output.
        Parameters of pairs of modalities are not renamed, so strategies with such parameters do not declare it.
      any_modalities: the strategy accepts any number of modalities, at least one.
      needs_tokens: the output depends on the tokens, not only on each modality's masked mean.
      unimodal_loss: the loss includes each present modality's unimodal logits, mapped by the strategy's static method
        `unimodal(logits)` if it has one.
      classes_only: the strategy is defined only for mutually exclusive classes, not for other kinds of task.
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
    """Output of a feature-level strategy.

    Attributes:
      features: `[B, D]`.
      attention: attention weights `[B, heads, N_query, N_key]` by (query modality, key modality); empty without
        attention.
      branches: by modality, features `[B, D]` of it alone that the strategy trains with a head and a loss of their own;
        empty without any.
    """

    features: jax.Array
    attention: dict[tuple[str, str], jax.Array]
    branches: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


def pool(tokens: dict[str, jax.Array], mask: dict[str, jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Returns the masked mean `[B, D]` of each modality, in sorted order, and their presence `[B, M]`."""
    names = sorted(tokens)
    present = jnp.stack([mask[m].any(axis=1) for m in names], axis=1)  # [B, M]
    return [masked_mean(tokens[m], mask[m]) for m in names], present


def learned_weights(module: nn.Module, names: list[str], present: jax.Array) -> jax.Array:
    """Returns the softmax `[B, M]`, over the modalities in `present [B, M]`, of a learned scalar per modality."""
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
    """Returns W_m x_m + b_m `[B, *shape]` per modality, by layers named after it; call it in a compact method."""
    return [
        nn.DenseGeneral(shape, bias_init=bias_init, dtype=dtype, name=f"{prefix}_{m}")(x)
        for m, x in zip(names, inputs, strict=True)
    ]
