"""Video encoders: a CNN a frame followed by a network over time, and convolutions over space and time.

B batch · T frames · H W image · C channels · N tokens · D width
"""

from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.encoders.image import CNN
from mmfusion.models.encoders.text import CELLS
from mmfusion.models.encoders.transformer import sinusoids
from mmfusion.models.layers import Dropout, Norm, TransformerBlock, normalised_tokens, zero_masked


class FrameCNN(nn.Module):
    """A small CNN on every frame, averaged to a vector, then a recurrent network or attention over time.

    After CNN + LSTM (Donahue et al. 2015, arXiv:1411.4389); attention over time is one of ViViT's forms, its spatial
    encoder a CNN (Arnab et al. 2021, arXiv:2103.15691).

    Attributes:
      width: token width D.
      channels: channels of each of the CNN's layers.
      strides: stride of each.
      norm: of the CNN: `layer`, `group`, `batch` or `none`.
      over_time: `gru`, `lstm`, `vanilla`, `attention`, or `none`, where frames do not meet.
      layers: of the network over time.
      heads: attention heads over time; they divide the width.
      dropout: rate on the frames' vectors and, with attention, on its residual branches.
    """

    width: int
    channels: tuple[int, ...] = (32, 64, 64)
    strides: tuple[int, ...] = (2, 2, 2)
    norm: str = "layer"
    over_time: str = "gru"
    layers: int = 1
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "video"
    layer_order: ClassVar = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised frames `[B, T, H, W, C]` float32 with `mask [B, T]` (a prefix) as tokens `[B, T, D]`.

        Raises:
          UserError: `over_time` is unknown, `channels` and `strides` differ in length, or `heads` do not divide D.
        """
        if self.over_time not in (*CELLS, "attention", "none"):
            raise UserError(
                f"frame_cnn: over_time={self.over_time!r} is unknown; choose {', '.join(CELLS)}, attention or none"
            )
        rows, times = x.shape[:2]
        cnn = CNN(
            self.width, self.channels, self.strides, norm=self.norm, dtype=self.dtype, axis_name=self.axis_name,
            name="frame",
        )  # fmt: skip
        cells, _ = cnn(x.reshape(rows * times, *x.shape[2:]), mask.reshape(-1, 1), train=train)
        frames = cells.mean(axis=1).reshape(rows, times, -1)  # [B, T, D]
        frames = Dropout(self.dropout)(frames, train=train)
        if self.over_time == "attention":
            frames = frames + jnp.asarray(sinusoids(times, self.width), self.dtype)
        for layer in range(self.layers if self.over_time != "none" else 0):
            if self.over_time == "attention":
                block = TransformerBlock(
                    self.heads, self.width, dropout=self.dropout, dtype=self.dtype, name=f"time{layer}"
                )
                frames, _ = block(frames, mask, train=train)
            else:
                cell = CELLS[self.over_time](self.width, dtype=self.dtype, name=f"time{layer}")
                scan = nn.RNN(cell, name=f"scan{layer}")
                frames = cast(jax.Array, scan(frames, seq_lengths=mask.sum(axis=1)))
        return normalised_tokens(frames, mask, self.dtype), mask


class CNN3D(nn.Module):
    """3×3×3 convolutions over time and space (Tran et al. 2015, arXiv:1412.0767): fewer, strided, not pooled.

    Attributes:
      width: token width D.
      channels: channels of each convolution.
      time_strides: stride of each in time.
      strides: stride of each in space.
      norm: `layer`, `group`, `batch` or `none`.
      dropout: rate on the last feature map.
    """

    width: int
    channels: tuple[int, ...] = (32, 64, 64)
    time_strides: tuple[int, ...] = (1, 2, 2)
    strides: tuple[int, ...] = (2, 2, 2)
    norm: str = "batch"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "video"
    layer_order: ClassVar = (r"(Conv|Norm)_\d+", "offsets|project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised frames `[B, T, H, W, C]` float32 with `mask [B, T]` (a prefix) as tokens `[B, N, D]`.

        N is T'·H'·W', the cells of the first time first; a time is real if the first frame under it is.

        Raises:
          UserError: `channels` and the strides differ in length.
        """
        if not len(self.channels) == len(self.strides) == len(self.time_strides):
            raise UserError(
                f"cnn3d: channels={self.channels}, strides={self.strides} and time_strides={self.time_strides} "
                "must be of the same length"
            )
        x = zero_masked(x, mask).astype(self.dtype)
        for channels, time, space in zip(self.channels, self.time_strides, self.strides, strict=True):
            x = conv(channels, (3, 3, 3), (time, space, space), self.dtype)(x)  # [B, T', H', W', C']
            mask = mask[:, ::time]
            x = zero_masked(nn.gelu(Norm(self.norm, self.axis_name, self.dtype)(x, mask, train=train)), mask)
        x = Dropout(self.dropout)(x, train=train)
        cells = nn.Dense(self.width, dtype=self.dtype, name="project")(x)
        positions = self.param("offsets", nn.initializers.normal(0.02), cells.shape[2:]).astype(self.dtype)
        rows, times, height, width = cells.shape[:4]
        tokens = (cells + positions).reshape(rows, times * height * width, self.width)
        mask = jnp.repeat(mask, height * width, axis=1)
        return normalised_tokens(tokens, mask, self.dtype), mask
