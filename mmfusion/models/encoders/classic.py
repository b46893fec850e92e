"""Convolutions with pooling, LeNet-5, AlexNet and VGG, with two optional fully connected layers.

B batch · H W image · C channels · N tokens · D width
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.encoders.image import Positions
from mmfusion.models.layers import Dropout, Norm, normalised_tokens, zero_masked
from mmfusion.models.pooling import max_pool

# Input maps, of six, of each of the sixteen maps of LeNet's second convolution (LeCun et al. 1998, table I).
LENET_TABLE = (
    *[tuple(sorted((i + k) % 6 for k in range(3))) for i in range(6)],
    *[tuple(sorted((i + k) % 6 for k in range(4))) for i in range(6)],
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip


def adaptive_avg_pool(x: jax.Array, size: int) -> jax.Array:
    """Returns the average of `x [B, H, W, C]` over `[B, size, size, C]` windows, which partly overlap if uneven."""
    for axis in (1, 2):
        side = x.shape[axis]
        weights = np.zeros((size, side), np.float32)
        for window in range(size):
            first, last = window * side // size, math.ceil((window + 1) * side / size)
            weights[window, first:last] = 1 / (last - first)
        if side != size:
            x = jnp.moveaxis(jnp.tensordot(jnp.asarray(weights, x.dtype), x, axes=(1, axis)), 0, axis)
    return x


def pool(x: jax.Array, kernel: int, stride: int, name: str, *, padding: int = 0) -> jax.Array:
    """Returns max-pooled `x [B, H, W, C]`; raises UserError naming the encoder `name` if no window fits."""
    if min(x.shape[1:3]) + 2 * padding < kernel:
        raise UserError(
            f"the images are too small: a feature map of {x.shape[1]}×{x.shape[2]} cannot be pooled", path=name
        )
    return max_pool(x, (kernel, kernel), (stride, stride), padding)


class PooledCNN(nn.Module):
    """3×3 convolutions, each followed by 2×2 max pooling, with the feature map as one token: the CNN of many tutorials.

    Attributes:
      width: width D of the tokens.
      channels: channels of each convolution, which has no padding.
      norm: normalisation after each convolution: `batch`, `layer`, `group` or `none`.
      reduce: `flatten` the last feature map, or take its `mean` (global average pooling).
      dropout: dropout rate of the flattened or averaged feature map.
    """

    width: int
    channels: tuple[int, ...] = (32,)
    norm: str = "none"
    reduce: str = "flatten"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = (r"(Conv|Norm)_\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as a token `[B, 1, D]` and its mask.

        Raises:
          UserError: `reduce` is unknown, or the images are too small for the pooling layers.
        """
        if self.reduce not in ("flatten", "mean"):
            raise UserError("unknown value", path="pooled_cnn.reduce", value=self.reduce, choices=("flatten", "mean"))
        x = zero_masked(x, mask[:, 0]).astype(self.dtype)
        for channels in self.channels:
            x = conv(channels, 3, 1, self.dtype, padding=0)(x)
            x = nn.relu(Norm(self.norm, self.axis_name, self.dtype)(x, mask[:, 0], train=train))
            x = pool(x, 2, 2, "pooled_cnn")
        x = x.mean(axis=(1, 2)) if self.reduce == "mean" else x.reshape(x.shape[0], -1)
        x = nn.Dense(self.width, dtype=self.dtype, name="project")(Dropout(self.dropout)(x, train=train))
        return normalised_tokens(x[:, None], mask, self.dtype), mask


class FullyConnected(nn.Module):
    """Average-pools a feature map to `size`×`size` and applies two fully connected ReLU layers with dropout."""

    units: int
    size: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, feature_map: jax.Array, *, train: bool) -> jax.Array:
        """Maps a feature map `[B, H, W, C]` to `[B, 1, 1, units]`."""
        x = adaptive_avg_pool(feature_map, self.size).reshape(feature_map.shape[0], -1)
        for layer in ("6", "7"):  # numbered as in the papers
            x = nn.relu(nn.Dense(self.units, dtype=self.dtype, name=f"fc{layer}")(x))
            x = Dropout(self.dropout)(x, train=train)
        return x[:, None, None]


class LeNet5(nn.Module):
    """LeNet-5 up to its layer of 84 units: 60,000 parameters for grayscale 32×32 images (LeCun et al. 1998).

    As in the paper, subsampling has a learned factor and bias per map, and the second convolution reads the maps listed
    in a table. Smaller images are centred in 32×32 by zero padding; larger images have more than one token.

    Attributes:
      width: width D of the tokens.
    """

    width: int
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = (r"[csf]\d.*", "tokens")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]`, `mask [B, 1]`, as tokens `[B, N, D]` and mask `[B, N]`."""
        del train
        present = mask[:, 0]  # [B]
        x = zero_masked(x, present).astype(self.dtype)
        padding = [max(32 - side, 0) for side in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in padding), (0, 0)))
        x = _scaled_tanh(conv(6, 5, 1, self.dtype, padding=0, name="c1")(x))
        x = self._subsample(x, "s2")
        input_maps = np.concatenate([np.array(maps) for maps in LENET_TABLE])  # [60]
        output_maps = np.repeat(np.arange(16), [len(maps) for maps in LENET_TABLE])
        scale = nn.initializers.normal(1 / math.sqrt(25 * 60 / 16))
        weights = self.param("c3_kernel", scale, (5, 5, 60))
        kernel = (
            jnp.zeros((5, 5, 6, 16), weights.dtype).at[:, :, input_maps, output_maps].set(weights).astype(self.dtype)
        )
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = _scaled_tanh(x + self.param("c3_bias", nn.initializers.zeros, (16,)).astype(self.dtype))
        x = self._subsample(x, "s4")
        x = _scaled_tanh(conv(120, 5, 1, self.dtype, padding=0, name="c5")(x))  # [B, H', W', 120]
        x = _scaled_tanh(nn.Dense(84, dtype=self.dtype, name="f6")(x))
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, present)

    def _subsample(self, x: jax.Array, name: str) -> jax.Array:
        sums = 4 * nn.avg_pool(x, (2, 2), (2, 2))
        factor = self.param(f"{name}_factor", nn.initializers.constant(0.25), x.shape[-1:]).astype(self.dtype)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, x.shape[-1:]).astype(self.dtype)
        return _scaled_tanh(sums * factor + bias)


def _scaled_tanh(x: jax.Array) -> jax.Array:
    """Returns the paper's activation 1.7159 tanh(2x/3), which is 1 at 1 and -1 at -1."""
    return 1.7159 * nn.tanh(x * (2 / 3))


class AlexNet(nn.Module):
    """AlexNet with a single tower, without local response normalisation (Krizhevsky 2014, arXiv:1404.5997).

    Attributes:
      width: width D of the tokens.
      channels: channels of the first convolution; the others have 3, 6, 4 and 4 times as many.
      fc: units of the two fully connected layers (the paper: 4096); 0: none, and every spatial position is a token.
      dropout: dropout rate after each fully connected layer.
    """

    width: int
    channels: int = 64
    fc: int = 0
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = (r"conv\d", "top", "tokens")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as tokens `[B, N, D]` and mask `[B, N]`.

        Raises:
          UserError: a side of the images is below 63 pixels.
        """
        present = mask[:, 0]  # [B]
        x = zero_masked(x, present).astype(self.dtype)
        x = conv(self.channels, 11, 4, self.dtype, padding=2, name="conv1")(x)
        x = pool(nn.relu(x), 3, 2, "alexnet")
        x = pool(nn.relu(conv(3 * self.channels, 5, 1, self.dtype, name="conv2")(x)), 3, 2, "alexnet")
        for number, factor in ((3, 6), (4, 4), (5, 4)):
            x = nn.relu(conv(factor * self.channels, 3, 1, self.dtype, name=f"conv{number}")(x))
        x = pool(x, 3, 2, "alexnet")
        if self.fc:
            x = FullyConnected(self.fc, 6, self.dropout, self.dtype, name="top")(x, train=train)
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, present)


class VGG16(nn.Module):
    """VGG-16, configuration D (Simonyan & Zisserman 2015, arXiv:1409.1556).

    Attributes:
      width: width D of the tokens.
      channels: channels of the first stage; the last has eight times as many.
      norm: normalisation after each convolution: `none` as in the paper, `batch`, `group` or `layer`.
      fc: units of the two fully connected layers (the paper: 4096); 0: none, and every spatial position is a token.
      dropout: dropout rate after each fully connected layer.
      recurrent: LSTM over the last feature map, see `Positions`.
    """

    width: int
    channels: int = 64
    norm: str = "none"
    fc: int = 0
    dropout: float = 0.0
    recurrent: str = "none"
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = (r"(conv|norm)\d_\d", "top", "tokens")
    stages: ClassVar[tuple[int, ...]] = (2, 2, 3, 3, 3)  # convolutions per stage

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as tokens `[B, N, D]` and mask `[B, N]`.

        Raises:
          UserError: a side of the images is below 32 pixels.
        """
        present = mask[:, 0]  # [B]
        x = zero_masked(x, present).astype(self.dtype)
        for stage, count in enumerate(self.stages):
            for layer in range(count):
                name = f"{stage}_{layer}"
                x = conv(self.channels * min(2**stage, 8), 3, 1, self.dtype, name=f"conv{name}")(x)
                x = nn.relu(Norm(self.norm, self.axis_name, self.dtype, name=f"norm{name}")(x, present, train=train))
            x = pool(x, 2, 2, "vgg")
        if self.fc:
            x = FullyConnected(self.fc, 7, self.dropout, self.dtype, name="top")(x, train=train)
        return Positions(self.width, self.recurrent, self.dtype, name="tokens")(x, present)


class VGG11(VGG16):
    """VGG-11, configuration A; attributes as VGG-16."""

    stages: ClassVar[tuple[int, ...]] = (1, 1, 2, 2, 2)
