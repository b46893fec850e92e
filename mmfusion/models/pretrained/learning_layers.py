"""The layers of a frozen encoder that learn, which read features that were computed before.

B batch · N positions · D width
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.models.encoders.image import Positions
from mmfusion.models.layers import normalised_tokens
from mmfusion.models.model import FusionModel
from mmfusion.models.pretrained.weights import unpublished


class LearningLayers(nn.Module):
    """Takes the place of an encoder; its parameters have the paths that they have there.

    Attributes:
      width: width D of the tokens.
      layer: the encoder's first layer that learns: `tokens`, or `project`, which a normalisation follows; empty: none,
        and the features are the tokens.
      recurrent: see `Positions`.
    """

    width: int
    layer: str
    recurrent: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Maps features `[B, ...]` and their mask of `compute_features` to tokens `[B, N, D]` and their mask."""
        del train  # layers that learn without published weights have no dropout
        if self.layer == "tokens":
            return Positions(self.width, self.recurrent, self.dtype, name="tokens")(x, mask[:, 0])
        if self.layer == "project":
            return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(x), mask, self.dtype), mask
        return x.astype(self.dtype), mask


def learning_layers(encoder: Any, params: Mapping[str, Any], whole: bool) -> LearningLayers:
    """Returns the layers of an encoder that learn where its published weights are frozen, or none if `whole` is."""
    if whole:
        return LearningLayers(0, "", dtype=encoder.dtype)
    return LearningLayers(encoder.width, unpublished(params)[0], getattr(encoder, "recurrent", "none"), encoder.dtype)


def without_learning(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of an encoder with zeros for those that learn, on which its features do not depend."""
    learning = {layer: jax.tree.map(np.zeros_like, params[layer]) for layer in unpublished(params) if layer in params}
    return {**params, **learning}


def compute_features(
    model: FusionModel, variables: Mapping[str, Any], batch: Any, modality: str, layer: str
) -> tuple[jax.Array, jax.Array]:
    """Returns the input of the layers of a modality's encoder that learn, and its mask.

    Args:
      model: the model.
      variables: its `params` and `batch_stats`, of which those of the encoder are read.
      batch: a preprocessed Batch, of which the modality is read.
      modality: the modality.
      layer: see `LearningLayers`.

    Returns:
      Features `[B, N, C]` with mask `[B, N]`, or a feature map `[B, H, W, C]` with mask `[B, 1]`.
    """
    inputs = []

    def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if layer and context.module.path == (f"encoders_{modality}", layer):
            inputs.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        outputs: Any = model.apply(variables, batch, modality, train=False, method="encode_one")
    tokens, mask = outputs
    if not layer:
        return tokens, mask
    return inputs[0], mask.any(axis=1, keepdims=True) if layer == "tokens" else mask
