"""Features and attention weights of a trained model.

n rows · B batch · N positions · D width
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.data.batch import Batch
from mmfusion.models.layers import masked_mean
from mmfusion.training.setup import TrainSetup


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a model before its heads; arrays are float32, NaN for a row with an error.

    Attributes:
      fused: input features of the heads `[n, D]`; for decision-level strategies the mean of the modalities' features.
      modalities: per modality the mean of its encoder's tokens `[n, D]`; zeros if the modality is absent.
      present: per modality the mask of the rows that have it `[n]` bool.
      errors: per row the reason why it could not be read, "" for a readable row.
    """

    fused: np.ndarray
    modalities: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    errors: list[str]


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention weights of a fusion strategy.

    Attributes:
      weights: (query modality, key modality) -> weights `[n, heads, N_query, N_key]` float32, NaN for a row with an
        error. Empty if the strategy has no attention.
      errors: per row the reason why it could not be read, "" for a readable row.
    """

    weights: dict[tuple[str, str], np.ndarray]
    errors: list[str]


def compile_inspect_step(setup: TrainSetup) -> Callable[..., dict[str, Any]]:
    """Compiles the step that returns fused features, each modality's embedding and attention weights of a batch."""
    axis_name = setup.partitioner.axis_name

    def step(params: Any, batch_stats: Any, batch: Batch) -> dict[str, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        result: Any = setup.model.apply(variables, setup.preprocess(batch, None), method=_inspect)
        if axis_name is None:
            return result
        return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), result)

    return setup.partitioner.compile_eval(step)


def _inspect(model: nn.Module, batch: Batch) -> dict[str, Any]:
    tokens, mask = model.encode(batch, train=False)
    outputs = model(batch, train=False)
    return {
        "fused": outputs.features.astype(jnp.float32),
        "pooled": {m: masked_mean(tokens[m], mask[m]).astype(jnp.float32) for m in tokens},
        "present": outputs.present,
        "attention": {pair: weights.astype(jnp.float32) for pair, weights in outputs.attention.items()},
    }


def nan_where_bad(tree: Any, errors: Sequence[str]) -> Any:
    """Returns arrays `[n, ...]` with NaN in the rows that have an error."""
    bad = np.array([bool(error) for error in errors], bool)

    def fill(x: np.ndarray) -> np.ndarray:
        x = np.array(x, np.float32)
        x[bad] = np.nan
        return x

    return jax.tree.map(fill, tree)
