"""The token layer of image encoders, and a small strided CNN; each of a feature map's H'·W' positions is a token.

B batch · H W image · C channels · N = H'·W' tokens · D width
"""

from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.layers import Dropout, Norm, normalised_tokens, zero_masked


class Positions(nn.Module):
    """Projects a feature map to tokens, adds learned position embeddings, and normalises.

    Attributes:
      width: width D of the tokens.
      recurrent: `rows` or `cells` (spatial positions) apply an LSTM of D units from the top left before the
        projection; `none` projects the positions directly.
    """

    width: int
    recurrent: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, feature_map: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps a feature map `[B, H', W', C]` and `present [B]` bool to tokens `[B, H'·W' or H', D]` and their mask.

        Raises:
          UserError: `recurrent` is unknown, or the LSTM would have fewer than two steps.
        """
        if self.recurrent not in ("none", "rows", "cells"):
            raise UserError("unknown value", path="recurrent", value=self.recurrent, choices=("none", "rows", "cells"))
        if self.recurrent != "none":
            num_steps = feature_map.shape[1] * (feature_map.shape[2] if self.recurrent == "cells" else 1)
            if num_steps < 2:
                raise UserError(
                    f"a feature map of {feature_map.shape[1]}×{feature_map.shape[2]} has fewer than two steps: give "
                    "larger images, or a smaller stride",
                    path="recurrent",
                    value=self.recurrent,
                )
            cell = nn.OptimizedLSTMCell(self.width, dtype=self.dtype, name="rnn")
            steps = feature_map.reshape(feature_map.shape[0], num_steps, -1)
            feature_map = cast(jax.Array, nn.RNN(cell, name="scan")(steps))  # [B, T, D]
        tokens = nn.Dense(self.width, dtype=self.dtype, name="project")(feature_map)
        tokens = tokens.reshape(tokens.shape[0], -1, self.width)  # [B, N, D]
        positions = self.param("positions", nn.initializers.normal(0.02), tokens.shape[1:])
        mask = jnp.broadcast_to(present[:, None], tokens.shape[:2])  # [B, N]
        return normalised_tokens(tokens + positions.astype(self.dtype), mask, self.dtype), mask


class CNN(nn.Module):
    """Small convolutional network: one strided convolution per layer, without pooling.

    Attributes:
      width: width D of the tokens.
      channels: channels of each layer.
      strides: stride of each layer; 32×32 images have 16 tokens with (2, 2, 2), 64 with (2, 2, 1).
      kernel: kernel size of every convolution, pixels.
      norm: `layer`, `group`, `batch` or `none`.
      dropout: dropout rate of the last feature map.
    """

    width: int
    channels: tuple[int, ...] = (32, 64, 64)
    strides: tuple[int, ...] = (2, 2, 2)
    kernel: int = 3
    norm: str = "layer"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = (r"(Conv|Norm)_\d+", "tokens")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as tokens `[B, N, D]` and mask `[B, N]`.

        Raises:
          UserError: `channels` and `strides` differ in length.
        """
        if len(self.channels) != len(self.strides):
            raise UserError(f"channels={self.channels} have another length", path="cnn.strides", value=self.strides)
        present = mask[:, 0]  # [B]
        x = zero_masked(x, present).astype(self.dtype)
        for channels, stride in zip(self.channels, self.strides, strict=True):
            x = conv(channels, self.kernel, stride, self.dtype)(x)  # [B, H', W', C']
            x = nn.gelu(Norm(self.norm, self.axis_name, self.dtype)(x, present, train=train))
        x = Dropout(self.dropout)(x, train=train)
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, present)
