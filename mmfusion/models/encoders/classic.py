"""Convolutions with pooling, LeNet-5, AlexNet and VGG, with two fully connected layers where asked for.

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

# Which of LeNet's six maps each of its sixteen second maps reads (LeCun et al. 1998, table I).
LENET_TABLE = (
    *[tuple(sorted((i + k) % 6 for k in range(3))) for i in range(6)],
    *[tuple(sorted((i + k) % 6 for k in range(4))) for i in range(6)],
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip


def adaptive_mean(x: jax.Array, size: int) -> jax.Array:
    """Returns `x [B, H, W, C]` averaged to `[B, size, size, C]`, each cell over the places it covers, even in part."""
    for axis in (1, 2):
        count = x.shape[axis]
        weights = np.zeros((size, count), np.float32)
        for cell in range(size):
            first, last = cell * count // size, math.ceil((cell + 1) * count / size)
            weights[cell, first:last] = 1 / (last - first)
        if count != size:
            x = jnp.moveaxis(jnp.tensordot(jnp.asarray(weights, x.dtype), x, axes=(1, axis)), 0, axis)
    return x


def pool(x: jax.Array, kernel: int, stride: int, name: str, *, padding: int = 0) -> jax.Array:
    """Returns the maximum over windows of `x [B, H, W, C]`; raises UserError naming `name` where none fits."""
    if min(x.shape[1:3]) + 2 * padding < kernel:
        raise UserError(f"{name}: the images are too small, a map of {x.shape[1]}×{x.shape[2]} cannot be pooled")
    pads = [(padding, padding)] * 2
    return nn.max_pool(x, (kernel, kernel), (stride, stride), padding=pads)  # pyright: ignore[reportArgumentType]


class PooledCNN(nn.Module):
    """3×3 convolutions, the maximum of 2×2 after each, and the whole map as one token: the CNN of many tutorials.

    Attributes:
      width: token width D.
      channels: channels of each convolution, which reads no place outside the image.
      norm: after each convolution: `batch`, `layer`, `group` or `none`.
      reduce: `flatten` the last map, or its `mean` (global average pooling).
      dropout: rate on what is left of the map.
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
        """Encodes normalised images `[B, H, W, C]` float32 with `mask [B, 1]` as a token `[B, 1, D]` and its mask.

        Raises:
          UserError: `reduce` is unknown, or the images are too small for so many poolings.
        """
        if self.reduce not in ("flatten", "mean"):
            raise UserError(f"pooled_cnn: reduce={self.reduce!r} is unknown; choose flatten or mean")
        x = zero_masked(x, mask[:, 0]).astype(self.dtype)
        for channels in self.channels:
            x = conv(channels, 3, 1, self.dtype, padding=0)(x)
            x = nn.relu(Norm(self.norm, self.axis_name, self.dtype)(x, mask[:, 0], train=train))
            x = pool(x, 2, 2, "pooled_cnn")
        x = x.mean(axis=(1, 2)) if self.reduce == "mean" else x.reshape(x.shape[0], -1)
        x = nn.Dense(self.width, dtype=self.dtype, name="project")(Dropout(self.dropout)(x, train=train))
        return normalised_tokens(x[:, None], mask, self.dtype), mask


class FullyConnected(nn.Module):
    """Averages a map to `size`×`size` cells and gives it to two layers of ReLU units with dropout."""

    units: int
    size: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, cells: jax.Array, *, train: bool) -> jax.Array:
        """Returns `[B, 1, 1, units]` of `cells [B, H, W, C]`."""
        x = adaptive_mean(cells, self.size).reshape(cells.shape[0], -1)
        for layer in ("6", "7"):  # as the papers count them
            x = nn.relu(nn.Dense(self.units, dtype=self.dtype, name=f"fc{layer}")(x))
            x = Dropout(self.dropout)(x, train=train)
        return x[:, None, None]


class LeNet5(nn.Module):
    """LeNet-5, up to its layer of 84 units: 60,000 parameters for gray images of 32×32 (LeCun et al. 1998).

    Subsampling has a learned factor and bias a map, and the second convolution reads a table's maps only, as in the
    paper. Smaller images are put in the middle of 32×32; larger ones give more than one token.

    Attributes:
      width: token width D.
    """

    width: int
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = (r"[csf]\d.*", "tokens")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised images `[B, H, W, C]` float32 with `mask [B, 1]` as tokens `[B, N, D]` and `[B, N]`."""
        del train
        rows = mask[:, 0]  # [B]
        x = zero_masked(x, rows).astype(self.dtype)
        lack = [max(32 - side, 0) for side in x.shape[1:3]]
        x = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in lack), (0, 0)))
        x = _squash(conv(6, 5, 1, self.dtype, padding=0, name="c1")(x))
        x = self._subsample(x, "s2")
        ins = np.concatenate([np.array(maps) for maps in LENET_TABLE])  # [60]
        outs = np.repeat(np.arange(16), [len(maps) for maps in LENET_TABLE])
        scale = nn.initializers.normal(1 / math.sqrt(25 * 60 / 16))
        drawn = self.param("c3_kernel", scale, (5, 5, 60))
        kernel = jnp.zeros((5, 5, 6, 16), drawn.dtype).at[:, :, ins, outs].set(drawn).astype(self.dtype)
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = _squash(x + self.param("c3_bias", nn.initializers.zeros, (16,)).astype(self.dtype))
        x = self._subsample(x, "s4")
        x = _squash(conv(120, 5, 1, self.dtype, padding=0, name="c5")(x))  # [B, H', W', 120]
        x = _squash(nn.Dense(84, dtype=self.dtype, name="f6")(x))
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, rows)

    def _subsample(self, x: jax.Array, name: str) -> jax.Array:
        sums = 4 * nn.avg_pool(x, (2, 2), (2, 2))
        factor = self.param(f"{name}_factor", nn.initializers.constant(0.25), x.shape[-1:]).astype(self.dtype)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, x.shape[-1:]).astype(self.dtype)
        return _squash(sums * factor + bias)


def _squash(x: jax.Array) -> jax.Array:
    """The paper's 1.7159 tanh(2x/3), 1 at 1 and -1 at -1."""
    return 1.7159 * nn.tanh(x * (2 / 3))


class AlexNet(nn.Module):
    """AlexNet as one tower, without response normalisation (Krizhevsky 2014, arXiv:1404.5997).

    Attributes:
      width: token width D.
      channels: channels of the first convolution; the others have 3, 6, 4 and 4 times as many.
      fc: units of the two fully connected layers (the paper: 4096); 0: none, and every cell is a token.
      dropout: rate after each fully connected layer.
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
        """Encodes normalised images `[B, H, W, C]` float32 with `mask [B, 1]` as tokens `[B, N, D]` and `[B, N]`.

        Raises:
          UserError: a side of the images is below 63 pixels.
        """
        rows = mask[:, 0]  # [B]
        x = zero_masked(x, rows).astype(self.dtype)
        x = conv(self.channels, 11, 4, self.dtype, padding=2, name="conv1")(x)
        x = pool(nn.relu(x), 3, 2, "alexnet")
        x = pool(nn.relu(conv(3 * self.channels, 5, 1, self.dtype, name="conv2")(x)), 3, 2, "alexnet")
        for number, times in ((3, 6), (4, 4), (5, 4)):
            x = nn.relu(conv(times * self.channels, 3, 1, self.dtype, name=f"conv{number}")(x))
        x = pool(x, 3, 2, "alexnet")
        if self.fc:
            x = FullyConnected(self.fc, 6, self.dropout, self.dtype, name="top")(x, train=train)
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, rows)


class VGG16(nn.Module):
    """VGG-16, configuration D (Simonyan & Zisserman 2015, arXiv:1409.1556).

    Attributes:
      width: token width D.
      channels: channels of the first stage; the last has eight times as many.
      norm: `none` as in the paper, or `batch`, `group` or `layer` after each convolution.
      fc: units of the two fully connected layers (the paper: 4096); 0: none, and every cell is a token.
      dropout: rate after each fully connected layer.
      recurrent: how an LSTM reads the last map, see `Positions`.
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
    stages: ClassVar[tuple[int, ...]] = (2, 2, 3, 3, 3)  # convolutions of each

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised images `[B, H, W, C]` float32 with `mask [B, 1]` as tokens `[B, N, D]` and `[B, N]`.

        Raises:
          UserError: a side of the images is below 32 pixels.
        """
        rows = mask[:, 0]  # [B]
        x = zero_masked(x, rows).astype(self.dtype)
        for stage, count in enumerate(self.stages):
            for layer in range(count):
                name = f"{stage}_{layer}"
                x = conv(self.channels * min(2**stage, 8), 3, 1, self.dtype, name=f"conv{name}")(x)
                x = nn.relu(Norm(self.norm, self.axis_name, self.dtype, name=f"norm{name}")(x, rows, train=train))
            x = pool(x, 2, 2, "vgg")
        if self.fc:
            x = FullyConnected(self.fc, 7, self.dropout, self.dtype, name="top")(x, train=train)
        return Positions(self.width, self.recurrent, self.dtype, name="tokens")(x, rows)


class VGG11(VGG16):
    """VGG-11, configuration A; attributes as VGG-16."""

    stages: ClassVar[tuple[int, ...]] = (1, 1, 2, 2, 2)
