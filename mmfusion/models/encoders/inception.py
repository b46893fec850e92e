"""Inception v1 and v3: parallel convolutions of several sizes, concatenated.

B batch · H W image · C channels · N tokens · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.convolution import conv
from mmfusion.models.encoders.classic import pool
from mmfusion.models.encoders.image import Positions
from mmfusion.models.layers import Dropout, Norm, zero_masked

# Channels of each module of v1: 1×1; of and after a reduction 3×3; the same 5×5; after pooling. None: it is a pooling.
INCEPTION_V1 = {
    "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64), "pool3": (),
    "4a": (192, 96, 208, 16, 48, 64), "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64), "4e": (256, 160, 320, 32, 128, 128), "pool4": (),
    "5a": (256, 160, 320, 32, 128, 128), "5b": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


def response_norm(x: jax.Array, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> jax.Array:
    """Returns x / (k + alpha Σ x²)^beta over `size` neighbouring channels of `x [B, H, W, C]` (Krizhevsky 2012)."""
    squares = jnp.pad(jnp.square(x), ((0, 0), (0, 0), (0, 0), (size // 2, size // 2)))
    sums = sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    return x / (k + alpha * sums) ** beta


class InceptionV1(nn.Module):
    """GoogLeNet without its auxiliary classifiers (Szegedy et al. 2015, arXiv:1409.4842).

    Attributes:
      width: token width D.
      share: factor of every layer's channels; 1 as in the paper.
      dropout: rate on the last feature map (the paper: 0.4).
    """

    width: int
    share: float = 1.0
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = None
    modules: ClassVar[dict[str, tuple[int, ...]]] = INCEPTION_V1

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised images `[B, H, W, C]` float32 with `mask [B, 1]` as tokens `[B, N, D]` and `[B, N]`.

        Raises:
          UserError: a side of the images is below 3 pixels.
        """

        def unit(x: jax.Array, channels: int, kernel: int, name: str, stride: int = 1) -> jax.Array:
            return nn.relu(conv(max(round(self.share * channels), 1), kernel, stride, self.dtype, name=name)(x))

        rows = mask[:, 0]  # [B]
        x = unit(zero_masked(x, rows).astype(self.dtype), 64, 7, "conv1", stride=2)
        x = response_norm(pool(x, 3, 2, "inception_v1", padding=1))
        x = response_norm(unit(unit(x, 64, 1, "conv2_reduce"), 192, 3, "conv2"))
        x = pool(x, 3, 2, "inception_v1", padding=1)
        for name, channels in self.modules.items():
            if not channels:
                x = pool(x, 3, 2, "inception_v1", padding=1)
                continue
            one, three_in, three, five_in, five, after_pool = channels
            x = jnp.concatenate([
                unit(x, one, 1, f"{name}_1"),
                unit(unit(x, three_in, 1, f"{name}_3_reduce"), three, 3, f"{name}_3"),
                unit(unit(x, five_in, 1, f"{name}_5_reduce"), five, 5, f"{name}_5"),
                unit(pool(x, 3, 1, "inception_v1", padding=1), after_pool, 1, f"{name}_pool"),
            ], axis=-1)  # fmt: skip
        x = Dropout(self.dropout)(x, train=train)
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, rows)


class InceptionV3(nn.Module):
    """Inception v3 without its auxiliary classifier (Szegedy et al. 2016, arXiv:1512.00567); meant for 299×299.

    Attributes:
      width: token width D.
      share: factor of every layer's channels; 1 as in the paper.
      norm: `batch` as in the paper, `group`, `layer` or `none`.
      dropout: rate on the last feature map.
    """

    width: int
    share: float = 1.0
    norm: str = "batch"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = None
    at35: ClassVar[tuple[int, ...]] = (32, 64, 64)  # channels after pooling, of each module on a map of 35×35
    at17: ClassVar[tuple[int, ...]] = (128, 160, 160, 192)  # channels within, of each on 17×17
    at8: ClassVar[int] = 2  # modules on 8×8

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised images `[B, H, W, C]` float32 with `mask [B, 1]` as tokens `[B, N, D]` and `[B, N]`.

        Raises:
          UserError: a side of the images is below 75 pixels.
        """
        rows = mask[:, 0]  # [B]
        counter = iter(range(1000))

        def unit(x: jax.Array, channels: int, kernel: Any, stride: int = 1, *, same: bool = True) -> jax.Array:
            name, features = f"{next(counter):02d}", max(round(self.share * channels), 1)
            padding = None if same else 0
            x = conv(features, kernel, stride, self.dtype, padding=padding, bias=False, name=f"conv{name}")(x)
            return nn.relu(Norm(self.norm, self.axis_name, self.dtype, name=f"norm{name}")(x, rows, train=train))

        def chain(x: jax.Array, *layers: tuple[int, Any]) -> jax.Array:
            for channels, kernel in layers:
                x = unit(x, channels, kernel)
            return x

        def mean(x: jax.Array) -> jax.Array:
            return nn.avg_pool(x, (3, 3), padding=[(1, 1)] * 2)  # pyright: ignore[reportArgumentType]

        def join(*parts: jax.Array) -> jax.Array:
            return jnp.concatenate(parts, axis=-1)

        def largest(x: jax.Array) -> jax.Array:
            return pool(x, 3, 2, "inception_v3")

        x = unit(zero_masked(x, rows).astype(self.dtype), 32, 3, 2, same=False)
        x = unit(unit(x, 32, 3, same=False), 64, 3)
        x = largest(unit(unit(largest(x), 80, 1), 192, 3, same=False))
        for after_pool in self.at35:
            x = join(
                unit(x, 64, 1), chain(x, (48, 1), (64, 5)), chain(x, (64, 1), (96, 3), (96, 3)),
                unit(mean(x), after_pool, 1),
            )  # fmt: skip
        x = join(unit(x, 384, 3, 2, same=False), unit(chain(x, (64, 1), (96, 3)), 96, 3, 2, same=False), largest(x))
        for c in self.at17:
            x = join(
                unit(x, 192, 1),
                chain(x, (c, 1), (c, (1, 7)), (192, (7, 1))),
                chain(x, (c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))),
                unit(mean(x), 192, 1),
            )
        x = join(
            unit(unit(x, 192, 1), 320, 3, 2, same=False),
            unit(chain(x, (192, 1), (192, (1, 7)), (192, (7, 1))), 192, 3, 2, same=False),
            largest(x),
        )
        for _ in range(self.at8):
            three, double = unit(x, 384, 1), chain(x, (448, 1), (384, 3))
            x = join(
                unit(x, 320, 1),
                unit(three, 384, (1, 3)), unit(three, 384, (3, 1)),
                unit(double, 384, (1, 3)), unit(double, 384, (3, 1)),
                unit(mean(x), 192, 1),
            )  # fmt: skip
        x = Dropout(self.dropout)(x, train=train)
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, rows)
