"""What image encoders share, and a small strided CNN; a feature map of H'·W' cells is as many tokens.

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
    """Projects a feature map to tokens, adds a learned embedding of each cell's place, and normalises.

    Attributes:
      width: token width D.
      recurrent: `rows` or `cells` of the map are read by an LSTM of D units from the top left, and its outputs are
        projected; `none`: the cells are.
    """

    width: int
    recurrent: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, cells: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Turns `cells [B, H', W', C]` and `rows [B]` bool into tokens `[B, H'·W' or H', D]` and their mask.

        Raises:
          UserError: `recurrent` is unknown, or the map has no two steps that could be read one after the other.
        """
        if self.recurrent not in ("none", "rows", "cells"):
            raise UserError(f"recurrent={self.recurrent!r} is unknown; choose rows, cells or none")
        if self.recurrent != "none":
            count = cells.shape[1] * (cells.shape[2] if self.recurrent == "cells" else 1)
            if count < 2:
                raise UserError(
                    f"recurrent={self.recurrent}: the map is {cells.shape[1]}×{cells.shape[2]}, with nothing to read "
                    "one after the other: give larger images, or a smaller stride"
                )
            cell = nn.OptimizedLSTMCell(self.width, dtype=self.dtype, name="rnn")
            steps = cells.reshape(cells.shape[0], count, -1)
            cells = cast(jax.Array, nn.RNN(cell, name="scan")(steps))  # [B, T, D]
        tokens = nn.Dense(self.width, dtype=self.dtype, name="project")(cells)
        tokens = tokens.reshape(tokens.shape[0], -1, self.width)  # [B, N, D]
        positions = self.param("positions", nn.initializers.normal(0.02), tokens.shape[1:])
        mask = jnp.broadcast_to(rows[:, None], tokens.shape[:2])  # [B, N]
        return normalised_tokens(tokens + positions.astype(self.dtype), mask, self.dtype), mask


class CNN(nn.Module):
    """A small convolutional network, one strided 3×3 convolution (or `kernel`) a layer, no pooling.

    Attributes:
      width: token width D.
      channels: channels of each layer.
      strides: stride of each layer; (2, 2, 2) makes 16 tokens of 32×32 and 64 of 64×64, (2, 2, 1) 64 of 32×32.
      kernel: side of every convolution, pixels.
      norm: `layer`, `group`, `batch` or `none`.
      dropout: rate on the last feature map.
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
        """Encodes normalised images `[B, H, W, C]` float32 with `mask [B, 1]` as tokens `[B, N, D]` and `[B, N]`.

        Raises:
          UserError: `channels` and `strides` differ in length.
        """
        if len(self.channels) != len(self.strides):
            raise UserError(f"cnn: channels={self.channels} and strides={self.strides} must be of the same length")
        rows = mask[:, 0]  # [B]
        x = zero_masked(x, rows).astype(self.dtype)
        for channels, stride in zip(self.channels, self.strides, strict=True):
            x = conv(channels, self.kernel, stride, self.dtype)(x)  # [B, H', W', C']
            x = nn.gelu(Norm(self.norm, self.axis_name, self.dtype)(x, rows, train=train))
        x = Dropout(self.dropout)(x, train=train)
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, rows)
