"""ConvNeXt: depthwise 7×7 convolutions and MLPs (Liu et al. 2022, arXiv:2201.03545).

B batch · H W image · C channels · N tokens · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.encoders.image import Positions
from mmfusion.models.layers import Dropout, zero_masked


class ConvNeXtBlock(nn.Module):
    """x + γ · MLP(norm(depthwise 7×7 convolution of x)), with a learned γ per channel."""

    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to the same shape."""
        channels = x.shape[-1]
        out = conv(channels, 7, 1, self.dtype, groups=channels, name="depthwise")(x)
        out = nn.LayerNorm(dtype=self.dtype, name="norm")(out)
        out = nn.gelu(nn.Dense(4 * channels, dtype=self.dtype, name="mlp_in")(out), approximate=False)
        out = nn.Dense(channels, dtype=self.dtype, name="mlp_out")(out)
        scale = self.param("scale", nn.initializers.constant(1e-6), (channels,)).astype(self.dtype)
        return x + Dropout(self.dropout)(scale * out, train=train)


class ConvNeXtT(nn.Module):
    """ConvNeXt-T without its pooling and classifier; stride 32.

    Dropout on the residual branches replaces the paper's stochastic depth (rate 0.1).

    Attributes:
      width: width D of the tokens.
      channels: channels of the first stage; the last has eight times as many.
      dropout: dropout rate of the residual branches.
    """

    width: int
    channels: int = 96
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = (r"(norm|shrink)\d|stage\d_block\d+", "tokens|norm")
    blocks: ClassVar[tuple[int, ...]] = (3, 3, 9, 3)

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as tokens `[B, N, D]` and mask `[B, N]`.

        The last layer norm is applied to every spatial position; the paper's classifier normalises their mean.

        Raises:
          UserError: a side of the images is below 32 pixels.
        """
        height, width, min_side = *x.shape[1:3], 2 ** (len(self.blocks) + 1)
        if min(height, width) < min_side:
            raise UserError(
                f"images must be at least {min_side} x {min_side} pixels, not {height} x {width}", path="convnext_t"
            )
        present = mask[:, 0]  # [B]
        x = zero_masked(x, present).astype(self.dtype)
        for stage, count in enumerate(self.blocks):
            norm = nn.LayerNorm(dtype=self.dtype, name=f"norm{stage}")
            patch = 4 if stage == 0 else 2
            downsample = conv(self.channels * 2**stage, patch, patch, self.dtype, padding=0, name=f"shrink{stage}")
            x = norm(downsample(x)) if stage == 0 else downsample(norm(x))
            for block in range(count):
                x = ConvNeXtBlock(self.dropout, self.dtype, name=f"stage{stage}_block{block}")(x, train=train)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, present)
