"""Residual networks (He et al. 2016, arXiv:1512.03385), with the stride in the 3×3 convolution ("v1.5").

B batch · H W image · C channels · N tokens · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.encoders.image import Positions
from mmfusion.models.layers import Dropout, Norm, zero_masked
from mmfusion.models.pooling import max_pool


class ResidualBlock(nn.Module):
    """Residual block: two 3×3 convolutions, or 1×1, 3×3 and 1×1 with four times the channels (`bottleneck`)."""

    channels: int
    stride: int
    bottleneck: bool
    norm: str
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, present: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H/stride, W/stride, channels or 4·channels]`."""

        def conv_norm(x: jax.Array, channels: int, kernel: int, stride: int, name: str) -> jax.Array:
            x = conv(channels, kernel, stride, self.dtype, bias=False, name=f"conv_{name}")(x)
            return Norm(self.norm, self.axis_name, self.dtype, name=f"norm_{name}")(x, present, train=train)

        if self.bottleneck:
            out = nn.relu(conv_norm(x, self.channels, 1, 1, "1"))
            out = nn.relu(conv_norm(out, self.channels, 3, self.stride, "2"))
            out = conv_norm(out, 4 * self.channels, 1, 1, "3")
        else:
            out = nn.relu(conv_norm(x, self.channels, 3, self.stride, "1"))
            out = conv_norm(out, self.channels, 3, 1, "2")
        if x.shape != out.shape:
            x = conv_norm(x, out.shape[-1], 1, self.stride, "skip")
        return nn.relu(x + out)


class ResNet18(nn.Module):
    """ResNet-18 without its pooling and classifier; stride 32, or 8 with the small stem.

    Attributes:
      width: width D of the tokens.
      channels: channels of the first stage; the last has eight times as many.
      stem: `imagenet` (7×7 stride 2, then 3×3 max pooling) or `small` (3×3 stride 1, for images around 32×32).
      norm: `group`, `batch` (over all devices), `layer` or `none`.
      dropout: dropout rate of the last feature map.
      recurrent: LSTM over the last feature map, see `Positions`.
    """

    width: int
    channels: int = 64
    stem: str = "small"
    norm: str = "group"
    dropout: float = 0.0
    recurrent: str = "none"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = ("conv_stem|norm_stem", r"stage\d_block\d+", "tokens")
    blocks: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)
    bottleneck: ClassVar[bool] = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as tokens `[B, N, D]` and mask `[B, N]`.

        Raises:
          UserError: `stem` is unknown.
        """
        if self.stem not in ("imagenet", "small"):
            raise UserError("unknown value", path="resnet.stem", value=self.stem, choices=("imagenet", "small"))
        imagenet = self.stem == "imagenet"
        present = mask[:, 0]  # [B]
        x = zero_masked(x, present).astype(self.dtype)
        kernel, stride = (7, 2) if imagenet else (3, 1)
        x = conv(self.channels, kernel, stride, self.dtype, bias=False, name="conv_stem")(x)  # [B, H', W', C]
        x = nn.relu(Norm(self.norm, self.axis_name, self.dtype, name="norm_stem")(x, present, train=train))
        if imagenet:
            x = max_pool(x, (3, 3), (2, 2), padding=1)
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
                )(x, present, train=train)
        x = Dropout(self.dropout)(x, train=train)
        return Positions(self.width, self.recurrent, self.dtype, name="tokens")(x, present)


class ResNet34(ResNet18):
    """ResNet-34: blocks of two convolutions, (3, 4, 6, 3) per stage; attributes as ResNet-18."""

    blocks: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)


class ResNet50(ResNet34):
    """ResNet-50: bottleneck blocks, (3, 4, 6, 3) per stage; attributes as ResNet-18."""

    bottleneck: ClassVar[bool] = True


class ResNet101(ResNet50):
    """ResNet-101: bottleneck blocks, (3, 4, 23, 3) per stage; attributes as ResNet-18."""

    blocks: ClassVar[tuple[int, ...]] = (3, 4, 23, 3)
