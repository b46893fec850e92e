"""Inception v1 and v3, which concatenate parallel convolutions of several sizes.

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

# Channels of each module: 1×1; 3×3 reduction, 3×3; 5×5 reduction, 5×5; pooling projection. Empty for a max pooling.
INCEPTION_V1 = {
    "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64), "pool3": (),
    "4a": (192, 96, 208, 16, 48, 64), "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64), "4e": (256, 160, 320, 32, 128, 128), "pool4": (),
    "5a": (256, 160, 320, 32, 128, 128), "5b": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


def response_norm(x: jax.Array, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> jax.Array:
    """Returns `x [B, H, W, C]` / (k + alpha Σ x²)^beta, Σ over `size` neighbouring channels (Krizhevsky 2012)."""
    squares = jnp.pad(jnp.square(x), ((0, 0), (0, 0), (0, 0), (size // 2, size // 2)))
    sums = sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    return x / (k + alpha * sums) ** beta


class InceptionV1(nn.Module):
    """GoogLeNet without its auxiliary classifiers (Szegedy et al. 2015, arXiv:1409.4842).

    Attributes:
      width: width D of the tokens.
      share: multiplier of the channels of every layer; 1 as in the paper.
      dropout: dropout rate of the last feature map (the paper: 0.4).
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
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as tokens `[B, N, D]` and mask `[B, N]`.

        Raises:
          UserError: a side of the images is below 3 pixels.
        """

        def conv_relu(x: jax.Array, channels: int, kernel: int, name: str, stride: int = 1) -> jax.Array:
            return nn.relu(conv(max(round(self.share * channels), 1), kernel, stride, self.dtype, name=name)(x))

        present = mask[:, 0]  # [B]
        x = conv_relu(zero_masked(x, present).astype(self.dtype), 64, 7, "conv1", stride=2)
        x = response_norm(pool(x, 3, 2, "inception_v1", padding=1))
        x = response_norm(conv_relu(conv_relu(x, 64, 1, "conv2_reduce"), 192, 3, "conv2"))
        x = pool(x, 3, 2, "inception_v1", padding=1)
        for name, channels in self.modules.items():
            if not channels:
                x = pool(x, 3, 2, "inception_v1", padding=1)
                continue
            c1, c3_in, c3, c5_in, c5, c_pool = channels
            x = jnp.concatenate([
                conv_relu(x, c1, 1, f"{name}_1"),
                conv_relu(conv_relu(x, c3_in, 1, f"{name}_3_reduce"), c3, 3, f"{name}_3"),
                conv_relu(conv_relu(x, c5_in, 1, f"{name}_5_reduce"), c5, 5, f"{name}_5"),
                conv_relu(pool(x, 3, 1, "inception_v1", padding=1), c_pool, 1, f"{name}_pool"),
            ], axis=-1)  # fmt: skip
        x = Dropout(self.dropout)(x, train=train)
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, present)


class InceptionV3(nn.Module):
    """Inception v3 without its auxiliary classifier (Szegedy et al. 2016, arXiv:1512.00567), designed for 299×299.

    Attributes:
      width: width D of the tokens.
      share: multiplier of the channels of every layer; 1 as in the paper.
      norm: `batch` as in the paper, `group`, `layer` or `none`.
      dropout: dropout rate of the last feature map.
    """

    width: int
    share: float = 1.0
    norm: str = "batch"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "image"
    layer_order: ClassVar = None
    pool_channels_35: ClassVar[tuple[int, ...]] = (32, 64, 64)  # after pooling, per module on a 35×35 feature map
    inner_channels_17: ClassVar[tuple[int, ...]] = (128, 160, 160, 192)  # per module on 17×17
    num_modules_8: ClassVar[int] = 2  # on 8×8

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes normalised float32 images `[B, H, W, C]` with `mask [B, 1]` as tokens `[B, N, D]` and mask `[B, N]`.

        Raises:
          UserError: a side of the images is below 75 pixels.
        """
        present = mask[:, 0]  # [B]
        counter = iter(range(1000))

        def block(x: jax.Array, channels: int, kernel: Any, stride: int = 1, *, same: bool = True) -> jax.Array:
            name, features = f"{next(counter):02d}", max(round(self.share * channels), 1)
            padding = None if same else 0
            x = conv(features, kernel, stride, self.dtype, padding=padding, bias=False, name=f"conv{name}")(x)
            return nn.relu(Norm(self.norm, self.axis_name, self.dtype, name=f"norm{name}")(x, present, train=train))

        def stack(x: jax.Array, *layers: tuple[int, Any]) -> jax.Array:
            for channels, kernel in layers:
                x = block(x, channels, kernel)
            return x

        def avg_pool(x: jax.Array) -> jax.Array:
            return nn.avg_pool(x, (3, 3), padding=[(1, 1)] * 2)  # pyright: ignore[reportArgumentType]

        def concat(*branches: jax.Array) -> jax.Array:
            return jnp.concatenate(branches, axis=-1)

        def max_pool(x: jax.Array) -> jax.Array:
            return pool(x, 3, 2, "inception_v3")

        x = block(zero_masked(x, present).astype(self.dtype), 32, 3, 2, same=False)
        x = block(block(x, 32, 3, same=False), 64, 3)
        x = max_pool(block(block(max_pool(x), 80, 1), 192, 3, same=False))
        for after_pool in self.pool_channels_35:
            x = concat(
                block(x, 64, 1), stack(x, (48, 1), (64, 5)), stack(x, (64, 1), (96, 3), (96, 3)),
                block(avg_pool(x), after_pool, 1),
            )  # fmt: skip
        x = concat(
            block(x, 384, 3, 2, same=False), block(stack(x, (64, 1), (96, 3)), 96, 3, 2, same=False), max_pool(x)
        )
        for inner in self.inner_channels_17:
            x = concat(
                block(x, 192, 1),
                stack(x, (inner, 1), (inner, (1, 7)), (192, (7, 1))),
                stack(x, (inner, 1), (inner, (7, 1)), (inner, (1, 7)), (inner, (7, 1)), (192, (1, 7))),
                block(avg_pool(x), 192, 1),
            )
        x = concat(
            block(block(x, 192, 1), 320, 3, 2, same=False),
            block(stack(x, (192, 1), (192, (1, 7)), (192, (7, 1))), 192, 3, 2, same=False),
            max_pool(x),
        )
        for _ in range(self.num_modules_8):
            branch_3x3, branch_double = block(x, 384, 1), stack(x, (448, 1), (384, 3))
            x = concat(
                block(x, 320, 1),
                block(branch_3x3, 384, (1, 3)), block(branch_3x3, 384, (3, 1)),
                block(branch_double, 384, (1, 3)), block(branch_double, 384, (3, 1)),
                block(avg_pool(x), 192, 1),
            )  # fmt: skip
        x = Dropout(self.dropout)(x, train=train)
        return Positions(self.width, dtype=self.dtype, name="tokens")(x, present)
