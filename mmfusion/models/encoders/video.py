"""Video encoders: a CNN per frame followed by a temporal network, and 3D convolutions.

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
    """Small CNN on every frame, averaged over space, followed by a recurrent network or attention over time.

    After CNN + LSTM (Donahue et al. 2015, arXiv:1411.4389). With attention, it is ViViT's factorised encoder with a CNN
    as the spatial encoder (Arnab et al. 2021, arXiv:2103.15691).

    Attributes:
      width: width D of the tokens.
      channels: channels of each layer of the CNN.
      strides: stride of each layer of the CNN.
      norm: normalisation of the CNN: `layer`, `group`, `batch` or `none`.
      over_time: `gru`, `lstm`, `vanilla`, `attention`, or `none`, without interaction between frames.
      layers: number of layers of the temporal network.
      heads: attention heads over time; divides `width`.
      dropout: dropout rate of the frame features and, with attention, of its residual branches.
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
        """Encodes normalised float32 frames `[B, T, H, W, C]` with `mask [B, T]` (a prefix) as tokens `[B, T, D]`.

        Raises:
          UserError: `over_time` is unknown, `channels` and `strides` differ in length, or `heads` does not divide D.
        """
        if self.over_time not in (choices := (*CELLS, "attention", "none")):
            raise UserError("unknown value", path="frame_cnn.over_time", value=self.over_time, choices=choices)
        batch_size, num_frames = x.shape[:2]
        cnn = CNN(
            self.width, self.channels, self.strides, norm=self.norm, dtype=self.dtype, axis_name=self.axis_name,
            name="frame",
        )  # fmt: skip
        feature_map, _ = cnn(x.reshape(batch_size * num_frames, *x.shape[2:]), mask.reshape(-1, 1), train=train)
        frames = feature_map.mean(axis=1).reshape(batch_size, num_frames, -1)  # [B, T, D]
        frames = Dropout(self.dropout)(frames, train=train)
        if self.over_time == "attention":
            frames = frames + jnp.asarray(sinusoids(num_frames, self.width), self.dtype)
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
    """3×3×3 convolutions (Tran et al. 2015, arXiv:1412.0767); fewer than in the paper, strided instead of pooled.

    Attributes:
      width: width D of the tokens.
      channels: channels of each convolution.
      time_strides: temporal stride of each convolution.
      strides: spatial stride of each convolution.
      norm: `layer`, `group`, `batch` or `none`.
      dropout: dropout rate of the last feature map.
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
        """Encodes normalised float32 frames `[B, T, H, W, C]` with `mask [B, T]` (a prefix) as tokens `[B, N, D]`.

        N is T'·H'·W', in row-major order. A time step is unmasked if its first frame is.

        Raises:
          UserError: `channels` and the strides differ in length.
        """
        if not len(self.channels) == len(self.strides) == len(self.time_strides):
            raise UserError(
                f"strides={self.strides} or time_strides={self.time_strides} have another length",
                path="cnn3d.channels",
                value=self.channels,
            )
        x = zero_masked(x, mask).astype(self.dtype)
        for channels, time_stride, stride in zip(self.channels, self.time_strides, self.strides, strict=True):
            x = conv(channels, (3, 3, 3), (time_stride, stride, stride), self.dtype)(x)  # [B, T', H', W', C']
            mask = mask[:, ::time_stride]
            x = zero_masked(nn.gelu(Norm(self.norm, self.axis_name, self.dtype)(x, mask, train=train)), mask)
        x = Dropout(self.dropout)(x, train=train)
        feature_map = nn.Dense(self.width, dtype=self.dtype, name="project")(x)
        positions = self.param("offsets", nn.initializers.normal(0.02), feature_map.shape[2:]).astype(self.dtype)
        batch_size, time_steps, height, width = feature_map.shape[:4]
        tokens = (feature_map + positions).reshape(batch_size, time_steps * height * width, self.width)
        mask = jnp.repeat(mask, height * width, axis=1)
        return normalised_tokens(tokens, mask, self.dtype), mask
