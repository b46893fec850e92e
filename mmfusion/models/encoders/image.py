"""Picture encoders: a small strided CNN and ResNets; a feature map of H'·W' cells is as many tokens.

B batch · H W picture · C channels · N = H'·W' tokens · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.layers import Dropout, Norm, normalised_tokens, zero_masked


class Positions(nn.Module):
    """Projects a feature map to tokens, adds a learned embedding of each cell's place, and normalises."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, cells: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Turns `cells [B, H', W', C]` and `rows [B]` bool into tokens `[B, H'·W', width]` and their mask."""
        tokens = nn.Dense(self.width, dtype=self.dtype, name="project")(cells)
        tokens = tokens.reshape(tokens.shape[0], -1, self.width)  # [B, N, D]
        places = self.param("positions", nn.initializers.normal(0.02), tokens.shape[1:])
        mask = jnp.broadcast_to(rows[:, None], tokens.shape[:2])  # [B, N]
        return normalised_tokens(tokens + places.astype(self.dtype), mask, self.dtype), mask


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

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised pictures `[B, H, W, C]` float32 with `mask [B, 1]` as tokens `[B, N, D]` and `[B, N]`.

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
        return Positions(self.width, self.dtype, name="tokens")(x, rows)


class ResidualBlock(nn.Module):
    """One residual block: two 3×3 convolutions, or 1×1, 3×3, 1×1 with four times the channels (`bottleneck`)."""

    channels: int
    stride: int
    bottleneck: bool
    norm: str
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H/stride, W/stride, channels or 4·channels]`."""

        def step(x: jax.Array, channels: int, kernel: int, stride: int, name: str) -> jax.Array:
            x = conv(channels, kernel, stride, self.dtype, bias=False, name=f"conv_{name}")(x)
            return Norm(self.norm, self.axis_name, self.dtype, name=f"norm_{name}")(x, rows, train=train)

        if self.bottleneck:
            out = nn.relu(step(x, self.channels, 1, 1, "1"))
            out = nn.relu(step(out, self.channels, 3, self.stride, "2"))
            out = step(out, 4 * self.channels, 1, 1, "3")
        else:
            out = nn.relu(step(x, self.channels, 3, self.stride, "1"))
            out = step(out, self.channels, 3, 1, "2")
        if x.shape != out.shape:
            x = step(x, out.shape[-1], 1, self.stride, "skip")
        return nn.relu(x + out)


class ResNet18(nn.Module):
    """ResNet-18 without its pooling and classifier (He et al. 2016, arXiv:1512.03385); stride 32, or 8 when small.

    Attributes:
      width: token width D.
      channels: channels of the first stage; the last has eight times as many.
      stem: `imagenet` (7×7 stride 2, then 3×3 max pooling) or `small` (3×3 stride 1, for pictures around 32×32).
      norm: `group`, `batch` (over all devices), `layer` or `none`.
      dropout: rate on the last feature map.
    """

    width: int
    channels: int = 64
    stem: str = "small"
    norm: str = "group"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    blocks: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)
    bottleneck: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised pictures `[B, H, W, C]` float32 with `mask [B, 1]` as tokens `[B, N, D]` and `[B, N]`.

        Raises:
          UserError: `stem` is unknown.
        """
        if self.stem not in ("imagenet", "small"):
            raise UserError(f"resnet: stem={self.stem!r} is unknown; choose imagenet or small")
        imagenet = self.stem == "imagenet"
        rows = mask[:, 0]  # [B]
        x = zero_masked(x, rows).astype(self.dtype)
        kernel, stride = (7, 2) if imagenet else (3, 1)
        x = conv(self.channels, kernel, stride, self.dtype, bias=False, name="conv_stem")(x)  # [B, H', W', C]
        x = nn.relu(Norm(self.norm, self.axis_name, self.dtype, name="norm_stem")(x, rows, train=train))
        if imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                x = ResidualBlock(
                    channels=self.channels * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=self.bottleneck,
                    norm=self.norm,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"stage{stage}_block{block}",
                )(x, rows, train=train)
        x = Dropout(self.dropout)(x, train=train)
        return Positions(self.width, self.dtype, name="tokens")(x, rows)


class ResNet50(ResNet18):
    """ResNet-50: bottleneck blocks, (3, 4, 6, 3) a stage; attributes as ResNet-18."""

    blocks: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)
    bottleneck: ClassVar[bool] = True
